"""A better mask, block after block: what Thanos does to each block of columns, with all columns already pruned.

Legend (W0, W, H and R as in refine.py; c as in exchange.py; the columns of a block are all that these are about):
    A  (b, b)     the block of H, with a little more on its diagonal
    g  (rows, b)  R + W A: with weights x in the block, and the other columns as they are, half the loss is
                  ½ x A xᵀ - g xᵀ and a constant
    x  (rows, b)  the best weights for the mask at hand: A[k, k] x[k] = g[k] for the kept k of a row

What is added to A pulls x to W: the loss falls at each block, and where it no longer does, it is at the minimum of the
undamped loss. A pass over all blocks costs one (rows, cols) by (cols, cols) product and the small systems.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from thanos_lightning.solver.exchange import exchange
from thanos_lightning.solver.linalg import FactorizationError, solve_subsets
from thanos_lightning.solver.pattern import NM, Pattern, Structured

_BLOCK = 128
# Added to A, relative to its diagonal: enough for float32, too little to hold anything back.
_PULL = 1e-3


def sweep(
    weight: Float[Tensor, "rows cols"],
    original: Float[Tensor, "rows cols"],
    hessian: Float[Tensor, "cols cols"],
    keep: Bool[Tensor, "rows cols"],
    frozen: Bool[Tensor, "rows cols"],
    pattern: Pattern,
    sweeps: int,
) -> tuple[Float[Tensor, "rows cols"], Bool[Tensor, "rows cols"]]:
    """In each block give the kept weights the best values while the other columns stay, before and after an exchange.

    Where the exchange doesn't pay, the row keeps the block's mask. Each row keeps as many weights as it had, and so
    does each n:m group. Structured patterns keep their mask.

    Args:
        weight: W, zero where not kept; not changed.
        original: W0.
        hessian: Undamped H.
        keep: True = kept.
        frozen: Weights that stay pruned.
        pattern: Where exchanges are allowed.
        sweeps: Passes over all blocks.

    Returns:
        The new weights, zero where not kept, and the new mask.
    """
    W, keep = weight.clone(), keep.clone()
    R = (original - W) @ hessian
    cols = W.shape[1]
    step = _BLOCK + (-_BLOCK % pattern.m if isinstance(pattern, NM) else 0)
    blocks = [slice(start, min(start + step, cols)) for start in range(0, cols, step)]
    matrices = [_pulled(hessian[block, block]) for block in blocks]
    costs = [_cost(A) for A in matrices]
    as_they_are = W.new_ones(len(W), 1)
    for number in range(sweeps):
        for block, A, cost in zip(blocks, matrices, costs, strict=True):
            w, k = W[:, block], keep[:, block]
            g = torch.addmm(R[:, block], w, A)
            try:
                x = solve_subsets(A, k, g)
                if not isinstance(pattern, Structured):
                    left = torch.addmm(g, x, A, alpha=-1)
                    tried = exchange(
                        x, left, k, frozen[:, block], cost, as_they_are, pattern, scattered=number % 2 == 1
                    )
                    y = solve_subsets(A, tried, g)
                    # at a minimum that is -½ g xᵀ
                    pays = (torch.linalg.vecdot(y, g) > torch.linalg.vecdot(x, g)).unsqueeze(1)
                    x, k = torch.where(pays, y, x), torch.where(pays, tried, k)
            except FactorizationError:
                continue  # the block stays as it is: an improvement less, and not an error
            R.addmm_(x - w, hessian[block], alpha=-1)
            W[:, block], keep[:, block] = x, k
    return W, keep


def _pulled(block: Float[Tensor, "b b"]) -> Float[Tensor, "b b"]:
    A = block.clone()
    diagonal = A.diagonal()
    # a dead input touches no other, so that any positive number makes A invertible
    diagonal.copy_(torch.where(diagonal > 0, diagonal * (1 + _PULL), 1))
    return A


def _cost(A: Float[Tensor, "b b"]) -> Float[Tensor, " b"]:
    """c, if only the columns of the block adapt."""
    lower, failed = torch.linalg.cholesky_ex(A)
    if failed.item() != 0:
        return A.diagonal()
    return (A.diagonal() / torch.cholesky_inverse(lower).diagonal()).sqrt()
