"""The entry point of the solver: `prune` takes a weight and a Hessian, and returns a pruned layer."""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from thanos_lightning.solver.admm import Penalties, alternate, ends, penalty_schedule, weight_costs
from thanos_lightning.solver.hessian import Factors
from thanos_lightning.solver.linalg import (
    MAX_DAMPING,
    Curvature,
    FactorizationError,
    NonFiniteError,
    damping_ladder,
    exact_arithmetic,
    input_norms,
    subsets_bytes,
)
from thanos_lightning.solver.pattern import Experts, Pattern, Solvable, Structured
from thanos_lightning.solver.refine import losses_by, refine, residual_of, row_losses
from thanos_lightning.solver.saliency import SALIENCIES, Saliency, magnitude, wanda
from thanos_lightning.solver.sparsegpt import sparsegpt
from thanos_lightning.solver.thanos import thanos
from thanos_lightning.solver.zeros import zero_where

T = TypeVar("T")
# ADMM and refinement improve so many weights at a time: 16 MiB of weights, and about ten times as much memory.
_IMPROVED_AT_A_TIME = 2**22
# And at least so many rows, beside which a step of ADMM that interpolates (cols, cols) is cheap.
_ROWS_AT_A_TIME = 2048
Method = Literal["thanos", "sparsegpt", "wanda", "magnitude"]
METHODS: tuple[Method, ...] = get_args(Method)


@dataclass(frozen=True)
class SolverOptions:
    """How to prune a layer. These defaults were measured best; the defaults of `prune` are those of the paper.

    Args:
        method: "thanos", "sparsegpt" (both update the kept weights), "wanda" or "magnitude" (both leave them).
        block_size: Columns pruned jointly. Ignored by "wanda" and "magnitude", and by "thanos" for structured patterns.
        damping: Added to the diagonal of the Hessian, relative to the mean of that diagonal.
        saliency: Score by which "thanos" chooses weights of unstructured and n:m patterns. "wanda" is |W_ij| ‖X_j‖, as
            in the paper; "obs" is W_ij² / [H⁻¹]_jj (Hassibi and Stork, 1993), the loss if all inputs not yet passed
            adapt; "balanced" is the geometric mean of both losses.
        admm_steps: Steps of ADMM (the alternating direction method of multipliers) after the method. They improve mask
            and weights, see admm.py. Each row and each n:m group keeps as many weights as before. More steps lower the
            loss as a rule: 8 gain much over 4, and 16 gain little over 8. Structured patterns keep their mask, and take
            conjugate gradient steps instead.
        refine_steps: Conjugate gradient steps on the kept weights after that. No step raises the loss.

    Rows that ADMM or refinement makes worse keep the method's weights. `as_published` gives the methods of the papers.

    Raises:
        ValueError: If an argument is out of range; the message says what it may be.

    Examples:
        >>> SolverOptions(damping=0.001).admm_steps
        8
    """

    method: Method = "thanos"
    block_size: int = 128
    damping: float = 0.01
    saliency: Saliency = "balanced"
    admm_steps: int = 8
    refine_steps: int = 2

    def __post_init__(self) -> None:
        for name, known in (("method", METHODS), ("saliency", SALIENCIES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is not known: choose one of {', '.join(known)}")
        for name, least in (("block_size", 1), ("admm_steps", 0), ("refine_steps", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                mend = f"give one, such as {getattr(SolverOptions, name)}"
                raise ValueError(f"{name}={value!r} is not a whole number >= {least}: {mend}")
        is_number = isinstance(self.damping, (int, float)) and not isinstance(self.damping, bool)
        if not (is_number and 0 <= self.damping < math.inf):
            raise ValueError(f"damping={self.damping!r} is not a finite number >= 0: try 0.01")

    @classmethod
    def as_published(cls, method: Method = "thanos", **changes: Any) -> "SolverOptions":
        """Make the options of a method exactly as in its paper, apart from ``changes``.

        Args:
            method: As above.
            **changes: Arguments that differ from the paper.

        Examples:
            >>> SolverOptions.as_published(block_size=64).saliency
            'wanda'
        """
        chooses = {"saliency": "wanda"} if method == "thanos" else {}  # the other methods have their own
        return cls(method, **{**chooses, "admm_steps": 0, "refine_steps": 0, **changes})

    def unused(self, pattern: Pattern) -> dict[str, str]:
        """List the arguments that have no effect with a pattern, each with the reason.

        Examples:
            >>> from thanos_lightning.solver import NM
            >>> SolverOptions("wanda").unused(NM(2, 4))["saliency"]
            "method 'wanda' has its own"
        """
        if isinstance(pattern, Experts):
            return {field.name: f"the pattern {pattern.name!r} solves no layer" for field in fields(self)}
        unused = {}
        if self.method not in ("thanos", "sparsegpt"):
            unused["block_size"] = f"method {self.method!r} prunes no blocks of columns"
            if self.admm_steps == self.refine_steps == 0:
                unused["damping"] = f"method {self.method!r} without admm_steps and refine_steps inverts no Hessian"
        elif self.method == "thanos" and isinstance(pattern, Structured):
            unused["block_size"] = f"method 'thanos' prunes all columns of the pattern {pattern.name!r} at once"
            unused["saliency"] = f"a pattern of whole columns ({pattern.name!r}) has its own"
        if self.method != "thanos":
            unused["saliency"] = f"method {self.method!r} has its own"
        return unused

    @property
    def needs_statistics(self) -> bool:
        """Whether pruning a layer needs statistics of its inputs."""
        return self.method != "magnitude" or self.admm_steps > 0 or self.refine_steps > 0

    @property
    def uses_correlations(self) -> bool:
        """Whether pruning a layer needs products of different inputs, and not the squares alone."""
        return self.method not in ("magnitude", "wanda") or self.admm_steps > 0 or self.refine_steps > 0

    def peak_bytes(
        self, rows: int, cols: int, *, pattern: Pattern | None = None, device: torch.device | str = "cpu"
    ) -> int:
        """Estimate the memory that pruning a float32 layer takes, beside its weight and Hessian.

        In numbers of four bytes, with b columns, c rows and d = min(cb, 2²²), it is the largest of these: 4.6 b² to
        factor the Hessian; b² + 4.2 cb to prune ("sparsegpt": 5.2 cb), or up to 8.3 cb ("wanda") and 7.1 cb
        ("magnitude") without a factor; 2 cb + 7.5 d to refine without ADMM; for ADMM 1.5 cb + 6 d, plus b² up to 6
        steps and 3 b² for more; for refinement after ADMM 1.5 cb + 11 d, plus b² or 2 b². Structured patterns have no
        ADMM. The systems that "thanos" solves at a time take up to 11 MiB more on CPUs, and 240 MiB elsewhere. A layer
        of 28,672 columns and 8,192 rows takes 15 GB for the factor, beside a Hessian of 3.3 GB. The estimate leaves out
        up to 2.5 d where some rows stay unchanged, a scaled copy (cb) for output weights, and up to 4 b² of factors
        that training keeps from one layer to the next with the same inputs.

        Args:
            rows: out_features.
            cols: in_features.
            pattern: Pattern of the layer; None assumes half of the weights.
            device: Device on which the layer is pruned.

        Examples:
            >>> SolverOptions.as_published().peak_bytes(2048, 2048) // 2**20
            94
        """
        size = rows * cols
        numbers = []
        if self.method in ("thanos", "sparsegpt"):
            numbers += [4.6 * cols**2, cols**2 + (4.2 if self.method == "thanos" else 5.2) * size]
        else:
            numbers.append((8.3 if self.method == "wanda" else 7.1) * size)
        exchanges = pattern is None or pattern.group_width(cols) > 0
        if self.method == "thanos" and exchanges:
            sparsity = 0.5 if pattern is None else pattern.sparsity
            system = min(self.block_size, cols) * min(sparsity, 1 - sparsity)
            numbers[-1] += subsets_bytes(rows, system, torch.device(device)) / 4
        chunk = min(size, _at_a_time(cols))
        if self.admm_steps > 0 and exchanges:
            interpolated = len(ends(penalty_schedule(self.admm_steps))) > 1
            numbers.append((3 if interpolated else 1) * cols**2 + 1.5 * size + 6 * chunk)
            if self.refine_steps > 0:
                numbers.append((2 if interpolated else 1) * cols**2 + 1.5 * size + 11 * chunk)
        elif self.admm_steps + self.refine_steps > 0:
            numbers.append(2 * size + 7.5 * chunk)
        return round(4 * max(numbers))


@dataclass(frozen=True)
class PrunedLayer:
    """A layer after pruning.

    Attributes:
        weight: (out_features, in_features), in the dtype of the given weight; exactly +0.0 where pruned.
        mask: The keep mask, True = kept.
        loss: ½ tr(ΔW H ΔWᵀ) with the undamped Hessian: the mean over tokens of ‖ΔW x‖², of the weight as returned.
            NaN without a Hessian.
        relative_loss: The loss over ½ tr(W H Wᵀ), the mean over tokens of ‖W x‖². NaN without a Hessian.
    """

    weight: Float[Tensor, "rows cols"]
    mask: Bool[Tensor, "rows cols"]
    loss: float
    relative_loss: float


# More than eight parameters, and sixty lines for what each of them means: the one door for who has a matrix alone
def prune(
    weight: Tensor,
    hessian: Tensor | None,
    pattern: Pattern,
    *,
    method: Method = "thanos",
    block_size: int = 128,
    damping: float = 0.01,
    saliency: Saliency = "wanda",
    admm_steps: int = 0,
    refine_steps: int = 0,
    frozen: Tensor | None = None,
    output_weights: Tensor | None = None,
) -> PrunedLayer:
    """Prune one layer. The arguments are not changed, and no gradient is recorded.

    The solver computes in float32 for every dtype of the weight (in float64 if the Hessian is float64), without
    autocast and TF32. Weights of inputs that were always zero become zero under "thanos" and "sparsegpt", also where
    the mask keeps them. If the damped Hessian is not positive definite, the solver warns and retries with ten times the
    damping, up to 1.0.

    For the same mask, float32 weights are within 1e-3 of float64 weights if the damped Hessian has a condition number
    up to 1e4. Up to 1e6 the error stays below the condition number times 1.2e-7. Masks differ where scores nearly tie:
    at 1e4, in a few of 10,000 entries. ``SolverOptions.peak_bytes`` estimates the memory.

    Args:
        weight: (out_features, in_features), any floating dtype, finite.
        hessian: (in_features, in_features), H = (2/T) Σ x xᵀ, on the weight's device; its scale changes only the
            loss. May be None for ``method="magnitude"`` without refinement; the losses are NaN then.
        pattern: ``Unstructured``, ``NM``, ``Structured`` or ``Channels``.
        method: See ``SolverOptions``, also for the arguments up to refine_steps.
        block_size: Columns pruned jointly.
        damping: Added to the diagonal of the Hessian, relative to the mean of that diagonal.
        saliency: Score by which "thanos" chooses weights.
        admm_steps: ADMM steps that improve mask and weights.
        refine_steps: Conjugate gradient steps on the kept weights.
        frozen: bool (out_features, in_features), True = has to be zero. Frozen weights count towards the pattern's
            zeros. All of them are pruned, even beyond that number; other weights only as the pattern asks for.
        output_weights: (out_features,), finite and positive: how much the squared error of each output counts wherever
            rows compete, that is in all choices that are not within one row. None counts all outputs alike. The
            returned losses ignore output weights.

    Returns:
        The pruned weight, its keep mask and its losses.

    Raises:
        ValueError: If an argument is out of range or a shape does not fit; the message says which.
        NonFiniteError: If ``weight`` or ``hessian`` holds NaN or Inf, or the result overflows the weight's dtype.
        FactorizationError: If no damping up to 1.0 makes the Hessian positive definite.

    Examples:
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
    options = SolverOptions(method, block_size, damping, saliency, admm_steps, refine_steps)
    inputs = None if hessian is None else Factors(hessian)
    return prune_layer(weight, inputs, pattern, options, frozen, output_weights)


def prune_layer(
    weight: Tensor,
    inputs: Factors | None,
    pattern: Pattern,
    options: SolverOptions,
    frozen: Tensor | None = None,
    output_weights: Tensor | None = None,
) -> PrunedLayer:
    """Prune as `prune` does. ``inputs`` holds the Hessian and its factors, which layers with the same inputs share."""
    _check_tensors(weight, None if inputs is None else inputs.hessian, frozen, output_weights)
    if inputs is None and options.needs_statistics:
        raise ValueError(
            f"method={options.method!r} with admm_steps={options.admm_steps} and refine_steps={options.refine_steps} "
            "needs a Hessian; only magnitude without these does not"
        )
    pattern = _solvable(pattern, weight)
    with exact_arithmetic(weight.device):
        original = weight.detach()
        frozen = torch.zeros_like(original, dtype=torch.bool) if frozen is None else frozen
        if inputs is None:
            W, _ = _scaled(original, torch.promote_types(original.dtype, torch.float32), output_weights)
            pruned = magnitude(W, frozen, pattern)
            return PrunedLayer(original.masked_fill(pruned, 0), ~pruned, math.nan, math.nan)
        result, keep, lost = _solve(original, inputs, frozen, pattern, options, output_weights)
        _check_result(result, options)
        of_all = row_losses(torch.zeros_like(original), original, inputs.hessian).sum()
        loss, dense = torch.stack([lost, of_all]).tolist()
    return PrunedLayer(result, keep, loss, relative(loss, dense))


def _solvable(pattern: Pattern, weight: Tensor) -> Solvable:
    if isinstance(pattern, Experts):
        raise ValueError(f"{pattern!r} is for all experts of a mixture together, not for one layer: take another")
    pattern.check_shape(*weight.shape)
    return pattern


def relative(loss: float, dense: float) -> float:
    """Divide a loss by the loss of removing the whole weight: infinity if only the latter is 0, and 0 if both are 0."""
    return loss / dense if dense > 0 else math.inf if loss > 0 else 0.0


def losses_at(
    weight: Tensor,
    inputs: Factors,
    patterns: Sequence[Pattern],
    options: SolverOptions,
    output_weights: Tensor | None = None,
) -> tuple[list[Float[Tensor, " rows"]], Float[Tensor, " rows"]]:
    """Predict the loss of each row at several patterns, by the method alone. All patterns share one factor.

    Each pattern is tried on the given weight, which is not changed. Tensors and errors are as in `prune`.

    Returns:
        For each pattern (out_features,), ½ ΔW H ΔWᵀ of each row, which `PrunedLayer.loss` sums up; and ½ W H Wᵀ of each
        row.

    Examples:
        >>> from thanos_lightning.solver import NM
        >>> rows = torch.tensor([[1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]])
        >>> losses_at(rows, Factors(torch.eye(4)), [NM(2, 4), NM(3, 4)], SolverOptions(damping=0.0))
        ([tensor([2.5000, 2.5000]), tensor([0.5000, 0.5000])], tensor([15., 15.]))
    """
    H = inputs.hessian
    _check_tensors(weight, H, None, output_weights)
    solvable = [_solvable(pattern, weight) for pattern in patterns]
    with exact_arithmetic(weight.device):
        original = weight.detach()
        frozen = torch.zeros_like(original, dtype=torch.bool)

        def losses(weight: Float[Tensor, "rows cols"], keep: Bool[Tensor, "rows cols"]) -> Float[Tensor, " rows"]:
            _check_result(weight, options)
            return row_losses(weight, original, H)

        by_pattern, _ = _by_method(original, inputs, frozen, solvable, options, output_weights, losses)
        return by_pattern, losses(torch.zeros_like(original), frozen)


def _solve(
    original: Float[Tensor, "rows cols"],
    inputs: Factors,
    frozen: Bool[Tensor, "rows cols"],
    pattern: Solvable,
    options: SolverOptions,
    output_weights: Tensor | None,
) -> tuple[Float[Tensor, "rows cols"], Bool[Tensor, "rows cols"], Float[Tensor, ""]]:
    """Return the weights in their own dtype, their keep mask and their loss."""
    H = inputs.hessian
    [(result, keep)], curvature = _by_method(
        original, inputs, frozen, [pattern], options, output_weights, lambda weight, keep: (weight, keep)
    )
    if options.admm_steps == options.refine_steps == 0:
        return result, keep, row_losses(result, original, H).sum()
    shared: Penalties | None = None
    if options.admm_steps > 0 and pattern.group_width(original.shape[1]) > 0:
        if curvature is None:
            _, curvature = _with_enough_damping(lambda _: None, inputs, options.damping)
        cost = weight_costs(H, curvature.factor, options.damping)
        shared = inputs.penalties(cost, options.damping, options.admm_steps)
    del curvature
    loss = H.new_zeros(())
    # The other rows stay dense or were pruned before: they have lost nothing, and have nothing to gain
    lossy = (original != 0).logical_and_(~keep).any(dim=1)
    for rows in _row_chunks(lossy, original.shape[1]):
        weight, rows_keep = result[rows], keep[rows]
        losses = _improve(original[rows], weight, rows_keep, frozen[rows], H, pattern, shared, options)
        if not isinstance(rows, slice):
            result[rows], keep[rows] = weight, rows_keep
        loss += losses.sum()
    return result, keep, loss


def _by_method(
    original: Float[Tensor, "rows cols"],
    inputs: Factors,
    frozen: Bool[Tensor, "rows cols"],
    patterns: Sequence[Solvable],
    options: SolverOptions,
    output_weights: Float[Tensor, " rows"] | None,
    then: Callable[[Float[Tensor, "rows cols"], Bool[Tensor, "rows cols"]], T],
) -> tuple[list[T], Curvature | None]:
    """Call ``then`` with the weights and the mask that the method alone finds for each pattern; return its results.

    For output weights g, the methods prune the rows scaled by √g_i. The weighted loss Σ_i g_i ‖ΔW_i X‖² is the plain
    loss of the scaled rows, and the update of a row is linear in the row. So the methods need no output weights. The
    steps on single rows after the method don't need them either.
    """
    H = inputs.hessian
    W, scale = _scaled(original, H.dtype, output_weights)

    def unchanged(pattern: Solvable) -> tuple[Tensor, Tensor]:
        pruned = (
            magnitude(W, frozen, pattern)
            if options.method == "magnitude"
            else wanda(W, input_norms(H), frozen, pattern)
        )
        return zero_where(original.clone(), pruned), ~pruned

    def updated(pattern: Solvable, curvature: Curvature) -> tuple[Tensor, Tensor]:
        if options.method == "sparsegpt":
            weight, pruned = sparsegpt(W, curvature, frozen, pattern, options.block_size)
        else:
            weight, pruned = thanos(W, curvature, frozen, pattern, options.block_size, options.saliency)
        if scale is not None:
            weight.div_(scale)
        return zero_where(weight.to(original.dtype), pruned), ~pruned

    if options.method in ("magnitude", "wanda"):
        return [then(*unchanged(pattern)) for pattern in patterns], None
    return _with_enough_damping(
        lambda curvature: [then(*updated(pattern, curvature)) for pattern in patterns], inputs, options.damping
    )


def _scaled(
    original: Float[Tensor, "rows cols"], dtype: torch.dtype, output_weights: Float[Tensor, " rows"] | None
) -> tuple[Float[Tensor, "rows cols"], Float[Tensor, "rows 1"] | None]:
    """Return the rows scaled by √g_i for output weights g, and √g_i."""
    W = original.to(dtype)
    if output_weights is None:
        return W, None
    scale = output_weights.detach().to(dtype).sqrt().unsqueeze(1)
    return W * scale, scale


def _improve(
    original: Float[Tensor, "rows cols"],
    pruned: Float[Tensor, "rows cols"],
    keep: Bool[Tensor, "rows cols"],
    frozen: Bool[Tensor, "rows cols"],
    H: Float[Tensor, "cols cols"],
    pattern: Solvable,
    shared: Penalties | None,
    options: SolverOptions,
) -> Float[Tensor, " rows"]:
    """Take the ADMM and refinement steps on some rows. Overwrite weights and mask of the rows whose loss falls.

    Return the losses of the rows, with the weights in their own dtype.
    """
    W0, W = original.to(H.dtype), pruned.to(H.dtype)
    R, losses = residual_of(W, W0, H)
    steps, new_keep = options.refine_steps, keep
    if shared is None:
        steps += options.admm_steps
    else:
        start = W
        W, new_keep = alternate(start, W0, R, keep, frozen, pattern, shared)
        if steps > 0:
            R, reached = residual_of(W, W0, H)
            worse = (~(reached < losses)).nonzero().squeeze(1)  # waits for the device, unlike the code below
            if len(worse):  # refinement starts from the method's weights in these rows
                W[worse], new_keep[worse] = start[worse], keep[worse]
                R[worse], _ = residual_of(W[worse], W0[worse], H)
    if steps > 0:
        W = refine(W, R, H, new_keep, steps)
    candidate = W.to(original.dtype)
    if steps > 0 and candidate.dtype == W.dtype:
        new_losses = losses_by(R, W0.sub(W))
    else:
        new_losses = row_losses(candidate, original, H)
    del R
    better = new_losses < losses
    better_rows = better.unsqueeze(1)
    pruned.copy_(torch.where(better_rows, candidate, pruned))
    keep.copy_(torch.where(better_rows, new_keep, keep))
    return torch.where(better, new_losses, losses)


def _at_a_time(cols: int) -> int:
    return max(_IMPROVED_AT_A_TIME, _ROWS_AT_A_TIME * cols)


def _row_chunks(chosen: Bool[Tensor, " rows"], cols: int) -> Iterator[slice | Int[Tensor, " some"]]:
    """Split the chosen rows into chunks of equal size, up to one row, so that a chunk takes bounded memory."""
    indices = chosen.nonzero().squeeze(1)
    all_chosen = len(indices) == len(chosen)
    chunks = -(-len(indices) * cols // _at_a_time(cols))
    for chunk in range(chunks):
        part = slice(len(indices) * chunk // chunks, len(indices) * (chunk + 1) // chunks)
        yield part if all_chosen else indices[part]


def _with_enough_damping(solve: Callable[[Curvature], T], inputs: Factors, damping: float) -> tuple[T, Curvature]:
    """Call ``solve`` with the first damping of the ladder for which every factorisation succeeds.

    Return its result, and the curvature that it got.
    """

    def tried(attempt: float) -> tuple[T, Curvature]:
        curvature = inputs.curvature(attempt)
        return solve(curvature), curvature

    for attempt in damping_ladder(damping):
        try:
            found = tried(attempt)
        except FactorizationError as error:
            why = str(error)  # not the error itself, whose frames hold the matrices of this attempt
            continue
        if attempt != damping:
            warnings.warn(
                f"the Hessian is not positive definite with damping={damping:g}; {attempt:g} was used: more "
                "calibration tokens, or a higher damping, avoid this",
                stacklevel=5,
            )
        return found
    raise FactorizationError(
        f"the Hessian is not positive definite, even with {max(damping, MAX_DAMPING):g} times the mean of its diagonal "
        f"added ({why}). A second moment never is like that: accumulate it with HessianAccumulator, from finite "
        "inputs, without subtracting anything from it"
    )


def _check_tensors(
    weight: Tensor, hessian: Tensor | None, frozen: Tensor | None, output_weights: Tensor | None
) -> None:
    if weight.ndim != 2 or weight.numel() == 0 or not weight.is_floating_point():
        raise ValueError(
            f"weight of shape {tuple(weight.shape)} and dtype {weight.dtype} is not a non-empty floating-point matrix "
            "(out_features, in_features)"
        )
    if not _is_finite(weight):
        raise NonFiniteError("the weight holds NaN or Inf: the training has diverged, or the checkpoint is broken")
    for name, tensor in (("hessian", hessian), ("frozen", frozen), ("output_weights", output_weights)):
        if tensor is not None and tensor.device != weight.device:
            raise ValueError(f"{name} is on {tensor.device} and the weight on {weight.device}: move one of them")
    if frozen is not None and (frozen.dtype != torch.bool or frozen.shape != weight.shape):
        raise ValueError(
            f"frozen has shape {tuple(frozen.shape)} and dtype {frozen.dtype}; it has to be bool, and of the "
            f"weight's shape {tuple(weight.shape)}: True = has to stay zero"
        )
    if output_weights is not None:
        if output_weights.shape != weight.shape[:1] or not output_weights.is_floating_point():
            raise ValueError(
                f"output_weights has shape {tuple(output_weights.shape)} and dtype {output_weights.dtype}; it has to "
                f"be floating-point, one number for each of the {len(weight)} rows of the weight"
            )
        if not (_is_finite(output_weights) and output_weights.min() > 0):
            raise ValueError(
                "output_weights holds numbers that are not finite and positive: give each output that may err freely "
                "a small weight, such as a hundredth of the mean"
            )
    if hessian is None:
        return
    cols = weight.shape[1]
    if hessian.shape != (cols, cols) or not hessian.is_floating_point():
        raise ValueError(
            f"hessian of shape {tuple(hessian.shape)} and dtype {hessian.dtype} does not fit a weight of shape "
            f"{tuple(weight.shape)}: it has to be a floating-point ({cols}, {cols})"
        )
    if not _is_finite(hessian):
        raise NonFiniteError(
            "the hessian holds NaN or Inf: an activation overflowed, or a batch holds NaN. Use a wider dtype, or mend "
            "the data"
        )
    if not torch.equal(hessian, hessian.mT) and (hessian - hessian.mT).abs().max() > 1e-3 * hessian.abs().max():
        raise ValueError(
            "hessian is not symmetric: it has to be H = (2/T) Σ x xᵀ, as HessianAccumulator.compute() gives"
        )


def _check_result(result: Tensor, options: SolverOptions) -> None:
    if not _is_finite(result):
        raise NonFiniteError(
            f"the pruned weights overflow {result.dtype}: raise damping (now {options.damping:g}), or keep the weights "
            "in a wider dtype"
        )


def _is_finite(tensor: Tensor) -> bool:
    # The extremes show NaN and infinities. On CPUs they take a tenth of the time of isfinite
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())
