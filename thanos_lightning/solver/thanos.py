"""Thanos: prune a block of columns jointly, and let every column that is left adapt.

Legend (arXiv 2504.05346, its update of a block; b = stop - start is the block's width):
    W  (rows, cols)  weights as they are now; the block is W[:, start:stop], what is left is W[:, start:]
    U  (b, b)        the block of the factor: V = Uᵀ U is the top left corner of (H[start:, start:])⁻¹
    q                the weights of a row to be pruned in this block
    λ                multipliers of a row: λ V[q, q] = W[q]; Λ (rows, b) holds them at their columns, zero elsewhere
    E  (rows, b)     E = Λ Uᵀ, so that the paper's update of what is left, Λ (H[start:, start:])⁻¹[:b], is one product:
                     E U[start:stop, start:]
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from thanos_lightning.solver.linalg import Curvature, cholesky, solve_subsets
from thanos_lightning.solver.pattern import NM, Channels, Solvable, Structured
from thanos_lightning.solver.saliency import (
    choose_regular,
    choose_sparse_rows,
    importance,
    lowest,
    lowest_in_groups,
    num_to_prune,
    scales,
)
from thanos_lightning.solver.zeros import zero_where

# Between two looks at the scores, at most so many columns go, and at most this share of those that are to go.
_ROUND, _SHARE = 16, 1 / 32


def thanos(
    weight: Float[Tensor, "rows cols"],
    curvature: Curvature,
    frozen: Bool[Tensor, "rows cols"],
    pattern: Solvable,
    block_size: int,
    saliency: str = "wanda",
) -> tuple[Float[Tensor, "rows cols"], Bool[Tensor, "rows cols"]]:
    """Prune by the paper's algorithm. Return the new weights and the choice, True = pruned.

    n:m rounds the width of a block up to whole groups. Structured and channels prune all their columns in one block as
    wide as the layer. ``saliency`` is the score of unstructured and n:m choices, see ``scales``. ``weight`` is not
    changed.
    """
    W = weight.masked_fill(curvature.dead, 0)
    if isinstance(pattern, Structured):
        if isinstance(pattern, Channels):
            pruned = eliminate(W, curvature, frozen.all(0), pattern.num_columns(W.shape[1])) | frozen
        else:
            pruned = choose_regular(importance(W, curvature.norms), frozen, pattern)
        _prune_block(W, curvature.factor, 0, pruned)
        return W, pruned
    cols = W.shape[1]
    sparse_rows, budget = torch.ones_like(W[:, :1], dtype=torch.bool), 0
    if isinstance(pattern, NM):
        sparse_rows = choose_sparse_rows(importance(W, curvature.norms).square(), frozen, pattern)
        block_size += -block_size % pattern.m
    else:
        budget = num_to_prune(pattern, frozen)
    pruned = torch.zeros_like(frozen)
    for start, scale in scales(saliency, curvature, block_size):
        block = slice(start, min(start + block_size, cols))
        if isinstance(pattern, NM):
            scores = importance(W[:, block], scale[: block.stop - start]).masked_fill_(frozen[:, block], -torch.inf)
            pruned[:, block] = lowest_in_groups(scores, frozen[:, block], sparse_rows, pattern)
        else:
            # All weights from here on compete for the rest of the budget. The block takes its part of the choice.
            scores = importance(W[:, start:], scale).masked_fill_(frozen[:, start:], -torch.inf)
            pruned[:, block] = lowest(scores, budget, width=block.stop - start)
            budget -= int(pruned[:, block].sum())
        _prune_block(W, curvature.factor, start, pruned[:, block])
    return W, pruned


def _prune_block(
    W: Float[Tensor, "rows cols"], factor: Float[Tensor, "cols cols"], start: int, pruned: Bool[Tensor, "rows width"]
) -> None:
    """Prune the chosen weights of a block in place, and update all columns from ``start`` on."""
    stop = start + pruned.shape[1]
    E = _errors(W[:, start:stop], factor[start:stop, start:stop], pruned)
    W[:, start:].addmm_(E, factor[start:stop, start:], alpha=-1)
    zero_where(W[:, start:stop], pruned)


def _errors(
    W: Float[Tensor, "rows width"], U: Float[Tensor, "width width"], pruned: Bool[Tensor, "rows width"]
) -> Float[Tensor, "rows width"]:
    """E = Λ Uᵀ for a block.

    The system of a row is as large as its q. If q is more than half of the block, a smaller system in the kept weights
    k gives the same update: P[k, k] y = P[k, q] W[q], with P = V⁻¹. The row then loses D, which is W on q and -y on k.
    With Λ = D P this gives E = D U⁻¹.
    """
    counts = pruned.sum(1)
    touched = counts > 0
    if not touched.any():
        return torch.zeros_like(W)
    columns = pruned[touched.to(torch.uint8).argmax()]
    if (pruned == (columns & touched.unsqueeze(1))).all():
        return _shared_errors(W * touched.unsqueeze(1), U, columns)
    E = torch.empty_like(W)
    many = counts > pruned.shape[1] // 2
    few_rows, many_rows = (~many).nonzero().squeeze(1), many.nonzero().squeeze(1)
    if len(few_rows) > 0:
        E[few_rows] = solve_subsets(U.mT @ U, pruned[few_rows], W[few_rows]) @ U.mT
    if len(many_rows) > 0:
        R = torch.linalg.solve_triangular(U, torch.eye(len(U), dtype=U.dtype, device=U.device), upper=True)
        P = R @ R.mT
        removed = zero_where(W[many_rows], ~pruned[many_rows])
        E[many_rows] = (removed - solve_subsets(P, ~pruned[many_rows], removed @ P)) @ R
    return E


def _shared_errors(
    W: Float[Tensor, "rows width"], U: Float[Tensor, "width width"], columns: Bool[Tensor, " width"]
) -> Float[Tensor, "rows width"]:
    """E = Λ Uᵀ where every row loses the same columns: one factorisation for all rows."""
    chosen = U[:, columns]
    return torch.cholesky_solve(W[:, columns].mT, cholesky(chosen.mT @ chosen)).mT @ chosen.mT


def eliminate(
    W: Float[Tensor, "rows cols"], curvature: Curvature, first: Bool[Tensor, " cols"], count: int
) -> Bool[Tensor, " cols"]:
    """Choose ``count`` columns, all of ``first`` among them, that a layer can best do without together.

    If ``first`` has more than ``count``, it is the choice. Each choice takes the earlier ones' updates into account: V
    is H⁻¹ of the columns that are left. Removing column j adds ‖W_:j‖² / V_jj to twice the loss if all others adapt
    (Hassibi and Stork, 1993, for a column), and ‖W_:j‖² ‖X_j‖² if none does. The geometric mean of both chose best: the
    calibration has only some of the tokens that a model will see.
    """
    W, V, gone = W.clone(), curvature.factor.mT @ curvature.factor, first.clone()
    _remove(W, V, first)
    left = count - int(first.count_nonzero())
    at_once = max(1, min(_ROUND, int(_SHARE * left)))
    while left > 0:
        energy = W.square().sum(0)
        scores = (energy * curvature.norms / V.diagonal().sqrt()).masked_fill_(gone, torch.inf)
        chosen = torch.zeros_like(gone)
        chosen[scores.argsort(stable=True)[: min(left, at_once)]] = True
        _remove(W, V, chosen)
        gone |= chosen
        left -= at_once
    return gone


def _remove(W: Float[Tensor, "rows cols"], V: Float[Tensor, "cols cols"], chosen: Bool[Tensor, " cols"]) -> None:
    """Remove columns Q in place, and let the others adapt: W - W_:Q E and V - V_:Q E, with E = V[Q, Q]⁻¹ V[Q, :]."""
    if not chosen.any():
        return
    across = V[:, chosen]
    E = torch.cholesky_solve(across.mT, cholesky(across[chosen]))
    W.addmm_(W[:, chosen], E, alpha=-1)
    V.addmm_(across, E, alpha=-1)
    W[:, chosen] = 0
    V[:, chosen] = 0
    V[chosen] = 0
