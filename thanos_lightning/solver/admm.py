"""ADMM, the alternating direction method of multipliers: it improves the mask and the weights that a method found.

Legend (Boyd et al., 2011, section 9.1; for pruning Boža, arXiv 2401.02938, and Meng et al., arXiv 2406.07831; rows are
independent; W0, H and R as in refine.py):
    X    (rows, cols)  dense weights with a small loss: X minimises ½ tr((X - W0) H (X - W0)ᵀ) plus the sum of
                       ½ ρ c_j (X - Z + U)² over all weights. The solution is X = W0 + (Z - U - W0) M
    Z    (rows, cols)  sparse weights: X + U where kept, zero elsewhere. Each group keeps the weights of the largest
                       c_j (X + U)², as many as before
    U    (rows, cols)  multipliers over ρ c_j: how strongly the loss pulls each pruned weight back; zero where kept
    c    (cols,)       cost of a weight per square: the geometric mean of H_jj, its loss if no other weight adapts, and
                       of 1 / [H⁻¹]_jj, its loss if all other weights adapt (Hassibi and Stork, 1993)
    ρ                  penalty: it grows from step to step, so that masks change much at first and then settle
    M    (cols, cols)  ρ C (H + ρ C)⁻¹, with C = diag(c)

X is over-relaxed (section 3.4.3 of Boyd et al.): 1.3 X - 0.3 Z takes its place, with the Z of the step before. If √c is
the unit of each column, H + ρ C has no eigenvalue below ρ. So it is well conditioned even where H is singular.
"""

import itertools
import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from thanos_lightning.solver.linalg import FactorizationError, damped, damped_diagonal, inverse
from thanos_lightning.solver.pattern import Pattern
from thanos_lightning.solver.saliency import ranks_in_groups
from thanos_lightning.solver.zeros import zero_where

# Measured on some layers of a language model. Masks change less with a higher ρ, and settle later with a lower ρ. At
# ρ = 1, without relaxation and with uncorrelated inputs, a pruned weight comes back if its loss exceeds that of the
# kept weight that it replaces.
_LOWEST, _LAST, _GROWTH = 0.35, 1.1, 1.07
_RELAXATION = 1.3
# If first / last penalty is above this ratio, the M of their geometric mean does as well as an M for each step.
_NEARLY_CONSTANT = 0.7


@dataclass(frozen=True)
class Penalties:
    """The penalties ρ c of all steps, and M."""

    cost: Float[Tensor, " cols"]  # c, positive
    dead: Bool[Tensor, " cols"]  # True for inputs that were always zero
    rho: list[float]  # ρ of each step
    first: Float[Tensor, "cols cols"]  # M of the first step
    last: Float[Tensor, "cols cols"] | None  # M of the last step; None if one M serves all steps

    def towards_last(self, rho: float, out: Float[Tensor, "cols cols"] | None) -> Float[Tensor, "cols cols"]:
        """Interpolate M linearly in log ρ: the result does as well as the exact M for this penalty."""
        if self.last is None:
            return self.first
        return torch.lerp(
            self.first, self.last, math.log(rho / self.rho[0]) / math.log(self.rho[-1] / self.rho[0]), out=out
        )


def penalty_schedule(steps: int) -> list[float]:
    """ρ of each step."""
    first = max(_LOWEST, _LAST / _GROWTH ** (steps - 1))
    return [first * (_LAST / first) ** (step / max(1, steps - 1)) for step in range(steps)]


def ends(rho: list[float]) -> list[float]:
    """The penalties for which M is computed: the first and the last, or one for all steps."""
    return [rho[0], rho[-1]] if rho[0] < _NEARLY_CONSTANT * rho[-1] else [math.sqrt(rho[0] * rho[-1])]


def weight_costs(
    hessian: Float[Tensor, "cols cols"], factor: Float[Tensor, "cols cols"], damping: float
) -> Float[Tensor, " cols"]:
    """Compute c of the damped Hessian, from the undamped H and from U of the damped H (linalg.py)."""
    return (damped_diagonal(hessian, damping) / factor.square().sum(0)).sqrt()


def penalties(
    hessian: Float[Tensor, "cols cols"], cost: Float[Tensor, " cols"], damping: float, steps: int
) -> Penalties:
    """Compute what all rows of a layer share in all steps, from c and the undamped H.

    The steps minimise the damped loss, with the damping of the method.
    """
    A = damped(hessian, damping)
    root = cost.sqrt()
    A.div_(root).div_(root.unsqueeze(1))
    rho = penalty_schedule(steps)
    maps, before = [], 0.0
    try:
        for end in ends(rho):
            A.diagonal().add_(end - before)
            maps.append(inverse(A).mul_(end * root.unsqueeze(1)).div_(root))
            before = end
    except FactorizationError as error:
        raise FactorizationError("the Hessian has an eigenvalue that is far below zero") from error
    return Penalties(cost, hessian.diagonal() == 0, rho, maps[0], maps[1] if len(maps) > 1 else None)


@dataclass
class Iterates:
    """What the steps update in place, and what they need of the layer."""

    original: Float[Tensor, "rows cols"]  # W0
    U: Float[Tensor, "rows cols"]  # multipliers, as in the legend; contiguous
    from_original: Float[Tensor, "rows cols"]  # Z - U - W0; contiguous
    keep: Bool[Tensor, "rows cols"]  # True = kept; contiguous
    frozen: Bool[Tensor, "rows cols"]  # weights that stay pruned
    scale: Float[Tensor, " cols"]  # √c
    width: int  # of a group
    relaxation: float = _RELAXATION  # how far X moves away from the last Z; 1 means no relaxation

    def project(self, moved: Float[Tensor, "rows cols"], ratio: float) -> None:
        """Take the second half of a step: update the mask, U and Z - U - W0.

        ``moved`` is X - W0 and is overwritten. ``ratio`` is the ρ of this step over the ρ of the next step, since U is
        relative to ρ.
        """
        # relaxation * X + (1 - relaxation) * Z + U, with Z = from_original + U + W0
        total = moved.mul_(self.relaxation).add_(self.original)
        total.add_(self.from_original, alpha=1 - self.relaxation).add_(self.U, alpha=2 - self.relaxation)
        scores = (total.abs() * self.scale).masked_fill_(self.frozen, -1)
        self.keep.copy_(_strongest(scores, self.keep, self.width))
        torch.mul(total, ratio, out=self.U)
        zero_where(self.U, self.keep)
        torch.where(self.keep, total, -self.U, out=self.from_original).sub_(self.original)


def alternate(
    weight: Float[Tensor, "rows cols"],
    original: Float[Tensor, "rows cols"],
    residual: Float[Tensor, "rows cols"],
    keep: Bool[Tensor, "rows cols"],
    frozen: Bool[Tensor, "rows cols"],
    pattern: Pattern,
    shared: Penalties,
) -> tuple[Float[Tensor, "rows cols"], Bool[Tensor, "rows cols"]]:
    """Take the steps. Each row and each n:m group keeps as many weights as before.

    The first U follows from the residual of ``weight``, so that the steps begin where the method ended. Weights of dead
    inputs become zero. ``weight`` is Z, zero where not kept, and not changed; ``original`` is W0; ``residual`` is R,
    and overwritten. Return the new weights, zero where not kept, and the new mask.
    """
    # Damping gives the weights of dead inputs a cost, but they cost nothing
    scale = shared.cost.sqrt().masked_fill_(shared.dead, 0)
    U = zero_where(residual.div_(shared.rho[0] * shared.cost), keep)
    from_original = (weight - original).contiguous().sub_(U)
    keep = keep.clone(memory_format=torch.contiguous_format)
    iterates = Iterates(original, U, from_original, keep, frozen, scale, pattern.group_width(weight.shape[1]))
    moved = torch.empty_like(U)
    M = torch.empty_like(shared.first) if shared.last is not None else None
    for rho, following in itertools.pairwise([*shared.rho, math.inf]):
        torch.mm(from_original, shared.towards_last(rho, M), out=moved)
        iterates.project(moved, rho / following)
    # U of the last step is 0, so that this is Z
    return zero_where(from_original.add_(original), ~keep | shared.dead), keep


def _strongest(
    scores: Float[Tensor, "rows cols"], keep: Bool[Tensor, "rows cols"], width: int
) -> Bool[Tensor, "rows cols"]:
    """True for the largest scores of each group, as many as ``keep`` has there. Of equal scores the first wins."""
    counts = keep.view(-1, width).sum(1, keepdim=True)
    return (ranks_in_groups(scores.view(-1, width).neg()) < counts).view_as(keep)
