"""Coupled rows: ADMM and refinement on all rows of a layer together, so that rows compensate each other's errors.

Legend (the loss is that of K-FAC, Martens and Grosse, arXiv 1503.05671; ADMM as in admm.py, and refinement as in
refine.py, but with all rows in one system):
    W0, W  (rows, cols)  weights before and after pruning; the steps minimise ½ tr(ΔWᵀ G ΔW H), with ΔW = W - W0
    H      (cols, cols)  damped Hessian of the inputs
    G      (rows, rows)  K-FAC output factor, the second moment of the outputs' gradients; positive definite, any scale
    c, g   (cols,), (rows,)  cost of a weight per square, by its input and by its output: see admm.py
    e, Q   eigenvalues and eigenvectors of H / √c_j √c_k, and of G / √g_i √g_k

Weights are in units of √g_i √c_j, so that the penalty of a step is ρ for each weight. In the basis of the eigenvectors
X is then an elementwise product: X - W0 = Q_G (ρ / (e_G e_Hᵀ + ρ) ∘ (Q_Gᵀ (Z - U - W0) Q_H)) Q_Hᵀ.
"""

import itertools
import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from thanos_lightning.solver.admm import Iterates, penalty_schedule, weight_costs
from thanos_lightning.solver.linalg import FactorizationError, damped, inverse_factor
from thanos_lightning.solver.pattern import Pattern
from thanos_lightning.solver.refine import refine
from thanos_lightning.solver.zeros import zero_where


def coupled_loss(
    change: Float[Tensor, "rows cols"], outputs: Float[Tensor, "rows rows"], hessian: Float[Tensor, "cols cols"]
) -> float:
    """½ tr(ΔWᵀ G ΔW H).

    Examples:
        >>> coupled_loss(torch.tensor([[1.0], [1.0]]), torch.tensor([[1.0, -0.5], [-0.5, 1.0]]), torch.eye(1))
        0.5
    """
    return float(((outputs @ change @ hessian) * change).sum(dtype=torch.float64)) / 2


def couple(
    weight: Float[Tensor, "rows cols"],
    original: Float[Tensor, "rows cols"],
    keep: Bool[Tensor, "rows cols"],
    frozen: Bool[Tensor, "rows cols"],
    hessian: Float[Tensor, "cols cols"],
    outputs: Float[Tensor, "rows rows"],
    cost: Float[Tensor, " cols"],
    pattern: Pattern,
    *,
    damping: float,
    admm_steps: int,
    refine_steps: int,
) -> tuple[Float[Tensor, "rows cols"], Bool[Tensor, "rows cols"]]:
    """Improve mask and weights. Each row and each n:m group keeps as many weights as before.

    Weights of dead inputs become zero.

    Args:
        weight: W, zero where not kept; the steps begin there. Not changed.
        original: W0.
        keep: True = kept. Not changed.
        frozen: Weights that stay pruned.
        hessian: Undamped H.
        outputs: G.
        cost: c.
        pattern: The groups are those of n:m, or else whole rows.
        damping: The damping of the method.
        admm_steps: ADMM steps on mask and weights; 0 leaves the mask as it is.
        refine_steps: Conjugate gradient steps on the kept weights after that.

    Returns:
        The new weights and the new mask, or ``weight`` and ``keep`` if the steps don't lower the loss.

    Raises:
        FactorizationError: If G is not positive definite, or the eigenvectors can't be computed.
    """
    H = damped(hessian, damping)
    G = outputs / outputs.diagonal().mean()  # squares of a tiny G would underflow in float32
    dead = hessian.diagonal() == 0
    # Damping would count changes of dead inputs' weights as loss
    weight, original = weight.masked_fill(dead, 0), original.masked_fill(dead, 0)
    W, new_keep = weight, keep
    if admm_steps > 0:
        try:
            W, new_keep = _alternate(weight, original, keep, frozen, H, G, cost, dead, pattern, admm_steps)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise FactorizationError(f"eigenvectors were not found ({error})") from error
    W = refine(W, G @ (original - W) @ H, H, new_keep & ~dead, refine_steps, outputs=G)
    better = coupled_loss(W - original, G, H) < coupled_loss(weight - original, G, H)
    return (W, new_keep) if better else (weight, keep)


def _alternate(
    weight: Float[Tensor, "rows cols"],
    original: Float[Tensor, "rows cols"],
    keep: Bool[Tensor, "rows cols"],
    frozen: Bool[Tensor, "rows cols"],
    H: Float[Tensor, "cols cols"],
    G: Float[Tensor, "rows rows"],
    cost: Float[Tensor, " cols"],
    dead: Bool[Tensor, " cols"],
    pattern: Pattern,
    steps: int,
) -> tuple[Float[Tensor, "rows cols"], Bool[Tensor, "rows cols"]]:
    of_cols, of_rows = cost.sqrt(), weight_costs(G, inverse_factor(G), 0.0).sqrt()
    unit = of_rows.unsqueeze(1) * of_cols
    A_H, A_G = H / of_cols / of_cols.unsqueeze(1), G / of_rows / of_rows.unsqueeze(1)
    W0 = original * unit
    U = A_G @ (W0 - weight * unit) @ A_H
    (e_H, Q_H), (e_G, Q_G) = _eigenvectors(A_H), _eigenvectors(A_G)
    del A_H, A_G
    e = e_G.clamp_(min=0).unsqueeze(1) * e_H.clamp_(min=0)
    rho = penalty_schedule(steps)
    U = zero_where(U.div_(rho[0]), keep)
    # Damping gives the weights of dead inputs a cost, but they cost nothing
    iterates = Iterates.begin(weight * unit, W0, U, keep, frozen, (~dead).to(unit.dtype), pattern)
    for now, following in itertools.pairwise([*rho, math.inf]):
        turned = (Q_G.mT @ iterates.from_original @ Q_H).mul_(now).div_(e + now)
        iterates.project(Q_G @ turned @ Q_H.mT, now / following)
    return zero_where(iterates.end().div_(unit), ~iterates.keep | dead), iterates.keep


def _eigenvectors(matrix: Float[Tensor, "size size"]) -> tuple[Float[Tensor, " size"], Float[Tensor, "size size"]]:
    # MPS takes as long as the CPU
    values, vectors = torch.linalg.eigh(matrix.cpu() if matrix.device.type == "mps" else matrix)
    return values.to(matrix.device), vectors.to(matrix.device)
