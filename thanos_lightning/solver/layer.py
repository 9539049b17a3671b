"""The one door: a weight and a Hessian in, a pruned weight out."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from thanos_lightning.solver.linalg import (
    MAX_DAMPING,
    Curvature,
    FactorizationError,
    NonFiniteError,
    curvature,
    damping_ladder,
    exact_arithmetic,
    input_norms,
)
from thanos_lightning.solver.magnitude import magnitude
from thanos_lightning.solver.pattern import Pattern
from thanos_lightning.solver.refine import better_rows, refine, row_losses
from thanos_lightning.solver.sparsegpt import sparsegpt
from thanos_lightning.solver.team import Alone, RowTeam
from thanos_lightning.solver.thanos import thanos
from thanos_lightning.solver.wanda import wanda
from thanos_lightning.solver.zeros import zero_where

METHODS = ("thanos", "sparsegpt", "wanda", "magnitude")


@dataclass(frozen=True)
class PrunedLayer:
    """A layer after pruning.

    Attributes:
        weight: (out_features, in_features), in the dtype of the weight that was given; exactly +0.0 where pruned.
        mask: The keep mask, True = kept.
        loss: ½ tr(ΔW H ΔWᵀ) with the undamped Hessian: the mean over tokens of ‖ΔW x‖², of the weight as returned.
            NaN where no Hessian was given.
        relative_loss: The loss over ½ tr(W H Wᵀ), the mean over tokens of ‖W x‖². NaN where no Hessian was given.
    """

    weight: Float[Tensor, "rows cols"]
    mask: Bool[Tensor, "rows cols"]
    loss: float
    relative_loss: float


def prune(
    weight: Tensor,
    hessian: Tensor | None,
    pattern: Pattern,
    *,
    method: str = "thanos",
    block_size: int = 128,
    damping: float = 0.01,
    frozen: Tensor | None = None,
    refine_steps: int = 0,
) -> PrunedLayer:
    """Prune one layer. The arguments are not changed, and no gradient is recorded.

    All is computed in float32 whatever the weight's dtype (float64 where the Hessian is float64), without autocast and
    TF32. Weights of inputs that were always zero become zero under "thanos" and "sparsegpt", also where the mask keeps
    them. Where the damped Hessian is not positive definite, ten times the damping is tried, up to 1.0, with a warning.

    Args:
        weight: (out_features, in_features), any floating dtype, finite.
        hessian: (in_features, in_features), H = (2/T) Σ x xᵀ, on the weight's device; its scale changes nothing but
            the loss. May be None for ``method="magnitude"`` without refinement; the losses are NaN then.
        pattern: ``Unstructured``, ``NM`` or ``Structured``.
        method: "thanos", "sparsegpt" (both update the kept weights), "wanda" or "magnitude" (both leave them).
        block_size: Columns pruned jointly. Ignored by "wanda" and "magnitude", and by "thanos" for structured patterns.
        damping: Added to the diagonal of the Hessian, relative to its mean.
        frozen: bool (out_features, in_features), True = has to be zero. They count towards the pattern's zeros; where
            they are more than it asks for, all of them are pruned, and nothing else that the pattern does not ask for.
        refine_steps: Conjugate gradient steps on the kept weights after the method; 0 is the method's paper to the
            letter. A step never raises the loss.

    Returns:
        The pruned weight, its keep mask and its losses.

    Raises:
        ValueError: If an argument is out of range or a shape does not fit; the message says which.
        NonFiniteError: If ``weight`` or ``hessian`` holds NaN or Inf, or the result overflows the weight's dtype.
        FactorizationError: If no damping up to 1.0 makes the Hessian positive definite.

    Example:
        >>> from thanos_lightning.solver import NM, prune
        >>> weight = torch.tensor([[1.0, -2.0, 3.0, 0.5]])
        >>> layer = prune(weight, torch.eye(4), NM(2, 4))
        >>> layer.weight
        tensor([[ 0., -2.,  3.,  0.]])
        >>> layer.mask.tolist()
        [[False, True, True, False]]
        >>> layer.loss
        0.625
    """
    return prune_rows(
        weight,
        hessian,
        pattern,
        method=method,
        block_size=block_size,
        damping=damping,
        frozen=frozen,
        refine_steps=refine_steps,
        team=Alone(len(weight) if weight.ndim else 0),
    )


def prune_rows(
    weight: Tensor,
    hessian: Tensor | None,
    pattern: Pattern,
    *,
    method: str,
    block_size: int,
    damping: float,
    frozen: Tensor | None,
    refine_steps: int,
    team: RowTeam,
) -> PrunedLayer:
    """As `prune`, but of the rows of one member of a team; together the members prune the layer as one process would.

    All members call it, within a stage of the team. The Hessian is the same on all of them, and each factors it.

    Args:
        weight: (rows of this member, in_features).
        hessian: (in_features, in_features).
        pattern: For the whole layer.
        method: See `prune`, like all that follow.
        block_size: Columns pruned jointly.
        damping: Relative to the mean of the Hessian's diagonal.
        frozen: bool (rows of this member, in_features).
        refine_steps: Conjugate gradient steps on the kept weights.
        team: Who has the other rows.

    Returns:
        Weight and mask of this member's rows, and the losses of the whole layer.

    Raises:
        ValueError: As `prune`, on the member whose argument it is.
        NonFiniteError: As `prune`, on the member whose rows they are.
        FactorizationError: On all members.
        TeammateError: If another member has failed in another way.
    """
    check_settings(method, block_size, damping, refine_steps)
    _check_tensors(weight, hessian, frozen)
    if hessian is None and (method != "magnitude" or refine_steps > 0):
        raise ValueError(f"method={method!r} with refine_steps={refine_steps} needs a Hessian; only magnitude does not")
    pattern.check_shape(team.num_rows, weight.shape[1])
    with exact_arithmetic(weight.device):
        original = weight.detach()
        frozen = torch.zeros_like(original, dtype=torch.bool) if frozen is None else frozen
        if hessian is None:
            pruned = magnitude(original.to(torch.promote_types(original.dtype, torch.float32)), frozen, pattern, team)
            return PrunedLayer(original.masked_fill(pruned, 0), ~pruned, math.nan, math.nan)
        H = hessian.detach().to(torch.promote_types(hessian.dtype, torch.float32))
        W = original.to(H.dtype)
        if method == "magnitude":
            updated, pruned = original, magnitude(W, frozen, pattern, team)
        elif method == "wanda":
            updated, pruned = original, wanda(W, input_norms(H), frozen, pattern, team)
        else:
            solve = thanos if method == "thanos" else sparsegpt
            updated, pruned = _with_enough_damping(
                lambda c: solve(W, c, frozen, pattern, block_size, team), H, damping, team
            )
        keep = ~pruned
        result = zero_where(updated.to(original.dtype, copy=True), pruned)
        if refine_steps > 0:
            refined = refine(zero_where(updated.to(H.dtype, copy=True), pruned), W, H, keep, refine_steps)
            result = better_rows(refined.to(original.dtype), result, original, H)
        if not torch.isfinite(result).all():
            raise NonFiniteError(
                f"the pruned weights overflow {original.dtype}: raise damping (now {damping:g}), or keep the weights "
                "in a wider dtype"
            )
        own_losses = [row_losses(after, original, H).sum() for after in (result, torch.zeros_like(original))]
        loss, dense = team.total(torch.stack(own_losses)).tolist()
    return PrunedLayer(result, keep, loss, loss / dense if dense > 0 else math.inf if loss > 0 else 0.0)


def _with_enough_damping(
    solve: Callable[[Curvature], tuple[Tensor, Tensor]], hessian: Tensor, damping: float, team: RowTeam
) -> tuple[Tensor, Tensor]:
    """``solve`` with the first damping of the ladder for which each factorisation succeeds, on all members."""
    for attempt in damping_ladder(damping):
        try:
            with team.stage():
                solution = solve(curvature(hessian, attempt))
        except FactorizationError as error:
            cause = error
            continue
        if attempt != damping and team.index == 0:
            warnings.warn(
                f"the Hessian is not positive definite with damping={damping:g}; {attempt:g} was used: more "
                "calibration tokens, or a higher damping, avoid this",
                stacklevel=4,
            )
        return solution
    raise FactorizationError(
        f"the Hessian is not positive definite, even with {max(damping, MAX_DAMPING):g} times the mean of its diagonal "
        f"added ({cause}). A second moment never is like that: accumulate it with HessianAccumulator, from finite "
        "inputs, without subtracting anything from it"
    ) from cause


def check_settings(method: str, block_size: int, damping: float, refine_steps: int) -> None:
    """Refuse what `prune` would refuse whatever the layer, so that callers can find out early.

    Raises:
        ValueError: Naming the argument and what it may be.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is not known: choose one of {', '.join(METHODS)}")
    if block_size < 1:
        raise ValueError(f"block_size={block_size!r} is not positive: give the number of columns, such as 128")
    if not 0 <= damping < math.inf:
        raise ValueError(f"damping={damping!r} is not a finite number >= 0: try 0.01")
    if refine_steps < 0:
        raise ValueError(f"refine_steps={refine_steps!r} is negative: give a number of steps, or 0 for none")


def _check_tensors(weight: Tensor, hessian: Tensor | None, frozen: Tensor | None) -> None:
    if weight.ndim != 2 or weight.numel() == 0 or not weight.is_floating_point():
        raise ValueError(
            f"weight of shape {tuple(weight.shape)} and dtype {weight.dtype} is not a non-empty floating-point matrix "
            "(out_features, in_features)"
        )
    if not torch.isfinite(weight).all():
        raise NonFiniteError("the weight holds NaN or Inf: the training has diverged, or the checkpoint is broken")
    if frozen is not None:
        if frozen.dtype != torch.bool or frozen.shape != weight.shape:
            raise ValueError(
                f"frozen has shape {tuple(frozen.shape)} and dtype {frozen.dtype}; it has to be bool, and of the "
                f"weight's shape {tuple(weight.shape)}: True = has to stay zero"
            )
        _check_device("frozen", frozen, weight)
    if hessian is None:
        return
    cols = weight.shape[1]
    if hessian.shape != (cols, cols) or not hessian.is_floating_point():
        raise ValueError(
            f"hessian of shape {tuple(hessian.shape)} and dtype {hessian.dtype} does not fit a weight of shape "
            f"{tuple(weight.shape)}: it has to be a floating-point ({cols}, {cols})"
        )
    _check_device("hessian", hessian, weight)
    if not torch.isfinite(hessian).all():
        raise NonFiniteError(
            "the hessian holds NaN or Inf: an activation overflowed in the batches that it was made of"
        )
    if (hessian - hessian.mT).abs().max() > 1e-3 * hessian.abs().max():
        raise ValueError(
            "hessian is not symmetric: it has to be H = (2/T) Σ x xᵀ, as HessianAccumulator.compute() gives"
        )


def _check_device(name: str, tensor: Tensor, weight: Tensor) -> None:
    if tensor.device != weight.device:
        raise ValueError(f"{name} is on {tensor.device} and the weight on {weight.device}: move one of them")
