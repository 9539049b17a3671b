"""SparseGPT: prune column after column, and let the columns to the right adapt.

Legend (Frantar and Alistarh, arXiv 2301.00774, algorithm 1):
    Wᵀ  (cols, rows)  transposed weights, so that the column at hand is contiguous
    U   (cols, cols)  factor of the inverse Hessian; row j of U is all that pruning column j needs
    E   (width, rows) errors of a block: E_j = W_j / U_jj where pruned, 0 elsewhere
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from thanos_lightning.solver.linalg import Curvature
from thanos_lightning.solver.pattern import NM, Solvable, Structured, Unstructured
from thanos_lightning.solver.saliency import (
    choose_sparse_rows,
    conditional_importance,
    importance,
    lowest,
    lowest_columns,
    lowest_in_groups,
)


def sparsegpt(
    weight: Float[Tensor, "rows cols"],
    curvature: Curvature,
    frozen: Bool[Tensor, "rows cols"],
    pattern: Solvable,
    block_size: int,
) -> tuple[Float[Tensor, "rows cols"], Bool[Tensor, "rows cols"]]:
    """Prune by SparseGPT's algorithm. Return the new weights and the choice, True = pruned.

    Unstructured weights are chosen per block, those of n:m per group, and structured columns once, before any update.
    One product updates the columns after a block. n:m rounds the width of a block up to whole groups. ``weight`` is not
    changed.
    """
    rows, cols = weight.shape
    U, pivots = curvature.factor, curvature.factor.diagonal()
    W = weight.masked_fill(curvature.dead, 0)
    Wt = W.mT.contiguous()
    sparse_rows = torch.ones_like(W[:, :1], dtype=torch.bool)
    budgets: list[int] = []
    if not isinstance(pattern, (NM, Structured)):
        budgets = _block_budgets(frozen, pattern, block_size)
    else:
        sparse_rows = choose_sparse_rows(importance(W, curvature.norms).square(), frozen, pattern)
    if isinstance(pattern, NM):
        block_size += -block_size % pattern.m
    pruned = torch.zeros_like(frozen)
    if isinstance(pattern, Structured):
        pruned = lowest_columns(conditional_importance(W, pivots), frozen, sparse_rows, pattern)
    E = torch.empty(min(block_size, cols), rows, dtype=Wt.dtype, device=Wt.device)
    for number, start in enumerate(range(0, cols, block_size)):
        stop = min(start + block_size, cols)
        # An n:m choice covers one group, and sees the updates of all columns before the group.
        step = pattern.m if isinstance(pattern, NM) else stop - start
        for first in range(start, stop, step):
            part = slice(first, first + step)
            if not isinstance(pattern, Structured):
                scores = conditional_importance(Wt[part].mT, pivots[part]).masked_fill_(frozen[:, part], -torch.inf)
                if isinstance(pattern, NM):
                    pruned[:, part] = lowest_in_groups(scores, frozen[:, part], sparse_rows, pattern)
                else:
                    pruned[:, part] = lowest(scores, budgets[number])
            per_error = pruned[:, part].mT / pivots[part].unsqueeze(1)
            for j in range(first, first + step):
                error = torch.mul(Wt[j], per_error[j - first], out=E[j - start])
                Wt[j + 1 : stop].addr_(U[j, j + 1 : stop], error, alpha=-1)
        Wt[stop:].addmm_(U[start:stop, stop:].mT, E[: stop - start], alpha=-1)
    return Wt.mT.masked_fill(pruned, 0), pruned


def _block_budgets(frozen: Bool[Tensor, "rows cols"], pattern: Unstructured, block_size: int) -> list[int]:
    """How many weights each block loses: its frozen weights, and a share of the rest in proportion to its free ones."""
    blocks = [frozen[:, start : start + block_size] for start in range(0, frozen.shape[1], block_size)]
    per_block = torch.stack([block.sum() for block in blocks]).tolist()
    free = frozen.numel() - sum(per_block)
    rest = max(0, pattern.num_pruned(*frozen.shape) - sum(per_block))
    budgets, seen, given = [], 0, 0
    for block, required in zip(blocks, per_block, strict=True):
        seen += block.numel() - required
        # Running sums are rounded, not shares, so that the shares add up to the rest exactly.
        share = rest * seen // free - given if free else 0
        given += share
        budgets.append(required + share)
    return budgets
