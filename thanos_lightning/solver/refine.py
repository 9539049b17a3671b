"""Better weights for a fixed mask: conjugate gradients on the kept weights.

Legend (Hestenes and Stiefel, 1952; one system per row, all rows at once, diagonal preconditioner):
    W0  (rows, cols)  weights before pruning
    W   (rows, cols)  weights after pruning; minimised over the kept ones: tr((W - W0) H (W - W0)ᵀ)
    H   (cols, cols)  undamped Hessian
    R   (rows, cols)  minus half the gradient, zero where pruned
    P   (rows, cols)  search directions, zero where pruned
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from thanos_lightning.solver.zeros import zero_where


def refine(
    weight: Float[Tensor, "rows cols"],
    original: Float[Tensor, "rows cols"],
    hessian: Float[Tensor, "cols cols"],
    keep: Bool[Tensor, "rows cols"],
    steps: int,
) -> Float[Tensor, "rows cols"]:
    """Take conjugate gradient steps on the kept weights.

    In exact arithmetic no step raises the loss; at convergence rounding can, see ``better_rows``.

    Args:
        weight: W, zero where not kept; not changed.
        original: W0.
        hessian: Undamped H, positive semi-definite; may be singular.
        keep: True = kept.
        steps: Number of steps; each is one (rows, cols) by (cols, cols) product.

    Returns:
        The new weights, zero where not kept.
    """
    diagonal = hessian.diagonal()
    preconditioner = torch.where(diagonal > 0, 1 / diagonal, 0)
    correction = torch.zeros_like(weight)
    pruned = ~keep
    R = zero_where((original - weight) @ hessian, pruned)
    P = R * preconditioner
    slope = (R * P).sum(1, keepdim=True)
    for _ in range(steps):
        curved = P @ hessian
        step = _ratio(slope, (P * curved).sum(1, keepdim=True))
        correction.addcmul_(P, step)
        R.addcmul_(zero_where(curved, pruned), step, value=-1)
        preconditioned = R * preconditioner
        new_slope = (R * preconditioned).sum(1, keepdim=True)
        P.mul_(_ratio(new_slope, slope)).add_(preconditioned)
        slope = new_slope
    return weight + correction


def better_rows(
    candidate: Float[Tensor, "rows cols"],
    current: Float[Tensor, "rows cols"],
    original: Float[Tensor, "rows cols"],
    hessian: Float[Tensor, "cols cols"],
) -> Float[Tensor, "rows cols"]:
    """Row by row, ``candidate`` where its loss is lower than that of ``current``.

    Compares the weights as given, so that rounding to a narrow dtype before the call is judged, too.
    """
    better = row_losses(candidate, original, hessian) < row_losses(current, original, hessian)
    return torch.where(better.unsqueeze(1), candidate, current)


def row_losses(
    weight: Float[Tensor, "rows cols"], original: Float[Tensor, "rows cols"], hessian: Float[Tensor, "cols cols"]
) -> Float[Tensor, " rows"]:
    """½ ΔW H ΔWᵀ of each row: its part of the mean over tokens of ‖ΔW x‖². In the dtype of the Hessian."""
    change = weight.to(hessian.dtype) - original.to(hessian.dtype)
    return ((change @ hessian) * change).sum(1).clamp(min=0) / 2


def _ratio(numerator: Float[Tensor, "rows 1"], denominator: Float[Tensor, "rows 1"]) -> Float[Tensor, "rows 1"]:
    # A row that has converged has 0/0; it stays where it is.
    return torch.where(denominator > 0, numerator / denominator, 0)
