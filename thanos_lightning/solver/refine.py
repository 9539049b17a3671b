"""Better weights for a fixed mask: conjugate gradients on the kept weights.

Legend (Hestenes and Stiefel, 1952; diagonal preconditioner; one system for each row):
    W0  (rows, cols)  weights before pruning
    W   (rows, cols)  weights after pruning; the kept weights are to minimise tr((W - W0) H (W - W0)ᵀ)
    H   (cols, cols)  undamped Hessian
    R   (rows, cols)  minus half the gradient: (W0 - W) H
    Z   (rows, cols)  preconditioned R, zero where pruned
    P   (rows, cols)  search directions, zero where pruned
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from thanos_lightning.solver.linalg import quadratic_forms
from thanos_lightning.solver.zeros import clear_bits, kept_bits

# If the curvature along a direction is below so many eps of the curvature of diag(H), it is only rounding error.
_FLAT = 100


def residual_of(
    weight: Float[Tensor, "rows cols"], original: Float[Tensor, "rows cols"], hessian: Float[Tensor, "cols cols"]
) -> tuple[Float[Tensor, "rows cols"], Float[Tensor, " rows"]]:
    """Compute R and the losses of the rows."""
    change = original - weight
    R = change @ hessian
    return R, losses_by(R, change)


def losses_by(residual: Float[Tensor, "rows cols"], change: Float[Tensor, "rows cols"]) -> Float[Tensor, " rows"]:
    """The losses of the rows, ½ (W0 - W) H (W0 - W)ᵀ, from R and W0 - W."""
    products: Tensor = torch.linalg.vecdot(change, residual)
    return products.clamp_(min=0).div_(2)


def refine(
    weight: Float[Tensor, "rows cols"],
    residual: Float[Tensor, "rows cols"],
    hessian: Float[Tensor, "cols cols"],
    keep: Bool[Tensor, "rows cols"],
    steps: int,
) -> Float[Tensor, "rows cols"]:
    """Take conjugate gradient steps on the kept weights, and return the new W. Each step is one product with H.

    In exact arithmetic no step raises the loss; at convergence rounding can. Directions in which the curvature is only
    rounding error are left out. ``weight``, zero where not kept, is not changed; ``residual`` is overwritten with the R
    of the result. ``hessian`` is undamped, positive semi-definite, and may be singular.
    """
    diagonal = hessian.diagonal()
    preconditioner = torch.where(diagonal > 0, 1 / diagonal, 0)
    eps = torch.finfo(hessian.dtype).eps
    kept = kept_bits(~keep)
    W, R = weight.clone(), residual
    P = clear_bits(R * preconditioner, kept)
    slope = _row_dots(R, P)
    solved = slope * eps**2
    curved, Z = torch.empty_like(P), torch.empty_like(P)
    for _ in range(steps):
        torch.mm(P, hessian, out=curved)
        curvature = _row_dots(P, curved)
        # If the curvature or the slope is only rounding error, the step could have any length
        steep = (curvature > _FLAT * eps * _row_dots(torch.mul(P, diagonal, out=Z), P)) & (slope > solved)
        step = torch.where(steep, slope / curvature, 0)
        W.addcmul_(P, step)
        R.addcmul_(curved, step, value=-1)
        clear_bits(torch.mul(R, preconditioner, out=Z), kept)
        new_slope = _row_dots(R, Z)
        # A row that took no step restarts along its gradient
        P.mul_(torch.where(steep, new_slope / slope, 0)).add_(Z)
        slope = new_slope
    return W


def row_losses(
    weight: Float[Tensor, "rows cols"], original: Float[Tensor, "rows cols"], hessian: Float[Tensor, "cols cols"]
) -> Float[Tensor, " rows"]:
    """½ ΔW H ΔWᵀ of each row, its part of the mean over tokens of ‖ΔW x‖², in the dtype of the Hessian."""
    change = weight.to(hessian.dtype) - original.to(hessian.dtype)
    return quadratic_forms(change, hessian).clamp(min=0) / 2


def _row_dots(left: Float[Tensor, "rows cols"], right: Float[Tensor, "rows cols"]) -> Float[Tensor, "rows 1"]:
    products: Tensor = torch.linalg.vecdot(left, right)
    return products.unsqueeze(1)
