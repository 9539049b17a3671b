"""Options of the callback. Options that cannot be right, or that change nothing, are refused."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from torch.utils.data import DistributedSampler

from thanos_lightning.layers.targets import Layer, check_expressions, did_you_mean, examples, matches, to_add
from thanos_lightning.plan.allocation import Allocation, nothing_to_allocate
from thanos_lightning.plan.schedule import SparsitySchedule
from thanos_lightning.solver import NM, Channels, Experts, Pattern, parse_pattern
from thanos_lightning.solver.layer import SolverOptions

CALIBRATION_STEPS = 32  # the default of calibration.steps
MULTIPLE_OF = 64  # the default of multiple_of
BLOCK_STEPS = 64  # the default of calibration.block_steps, on a calibration set
TOKENS_PER_STEP = 512  # of a step in which a block is trained; one sequence if that is longer


@dataclass(frozen=True, eq=False)
class CalibrationOptions:
    """Calibration of the solver: on which batches, and how much an error at each output counts.

    Args:
        batches: A calibration set to prune on instead of training batches. It runs at the event. "datamodule" takes
            `calibration_dataloader()` of the datamodule, or else of the LightningModule. In evaluation mode a batch
            goes through `calibration_step(batch)` if the module has this method. Otherwise a mapping goes through
            `pl_module(**batch)`, and a tuple, a tensor and the like through `training_step(batch, 0)` without its
            `self.log` (not under manual optimization, where that would train). With output weights, the call must
            return the loss (`CausalLM` returns the loss of labels that it draws itself, whose gradients say more). The
            backward of this loss leaves the parameters' gradients alone. Under ZeRO-3, all outputs count alike if
            DeepSpeed gathers modules as a whole, such as mixtures of experts.
        steps: The largest number of optimizer steps whose training batches a window sums before an event. A window
            never reaches back past the previous event.
        attention_mask_key: The batch's key for the mask of real tokens; None counts every token.
        memory_gib: Memory for the second moments of inputs. Layers are split, front to back, into windows that fit,
            of whole blocks if a block fits. Each window collects after the earlier windows are pruned. None takes what
            an event leaves of 90 % of the memory that is free when the training begins.
        output_weights: How much an error of each output counts: within a layer, and between layers in an allocation.
            "diagonal" takes the mean square of the training loss's gradient at the output, over the same batches (the
            diagonal of K-FAC's output factor, arXiv 1503.05671). "uniform" counts all outputs alike, as the papers do.
            None is "diagonal" for the method "thanos", else "uniform".
        block_steps: Adam steps after the solves of an event, in which the kept weights of each block, such as a decoder
            layer, are trained to give what the block gave right before. It needs `batches`: a step takes 512 of their
            tokens, or one sequence. 0 leaves what the solver gives. None is 64 with `batches` and the method
            "thanos", else 0.

    Raises:
        ValueError: If an option can't be right. The message names the option and the fix.

    Examples:
        >>> CalibrationOptions(steps=8, memory_gib=4.0).steps
        8
    """

    batches: str | Iterable[Any] | None = None
    steps: int = CALIBRATION_STEPS
    attention_mask_key: str | None = "attention_mask"
    memory_gib: float | None = None
    output_weights: Literal["diagonal", "uniform"] | None = None
    block_steps: int | None = None

    def __post_init__(self) -> None:
        check_batches("calibration.batches", self.batches)
        check_whole("calibration.steps", self.steps, 1)
        check_name("calibration.attention_mask_key", self.attention_mask_key, "attention_mask")
        is_number = isinstance(self.memory_gib, (int, float)) and not isinstance(self.memory_gib, bool)
        if self.memory_gib is not None and not (is_number and 0 < self.memory_gib < math.inf):
            raise ValueError(
                f"calibration.memory_gib is {self.memory_gib!r}: give a number of GiB > 0, such as 4, or None for "
                "what fits"
            )
        if self.output_weights not in ("diagonal", "uniform", None):
            raise ValueError(
                f"calibration.output_weights is {self.output_weights!r}: choose 'diagonal', 'uniform' or None"
            )
        if self.block_steps is not None:
            check_whole("calibration.block_steps", self.block_steps, 0)
        if self.block_steps and self.batches is None:
            raise ValueError(
                f"calibration.block_steps is {self.block_steps}, but there are no calibration.batches to train blocks "
                "on: give some, or leave it out"
            )


@dataclass(frozen=True)
class ModelSize:
    """The most that a model may have at the end: so many weights, or weights of so many GiB in the file of an export.

    Examples:
        >>> ModelSize(file_gib=0.5).in_weights(bytes_each=2)
        268435456.0
    """

    parameters: float | None = None
    file_gib: float | None = None

    def in_weights(self, bytes_each: float) -> float:
        """The number of weights, of which each takes so many bytes."""
        if self.file_gib is not None:
            return self.file_gib * 2**30 / bytes_each
        assert self.parameters is not None
        return self.parameters

    def in_words(self) -> str:
        """What was asked for."""
        return f"parameters is {self.parameters:g}" if self.file_gib is None else f"file_gib is {self.file_gib:g}"

    def like_this(self, weights: float, bytes_each: float) -> str:
        """A number of weights in the unit that was asked for, rounded up to four digits if this is GiB."""
        if self.file_gib is None:
            return f"{math.ceil(weights)}"
        gib = weights * bytes_each / 2**30
        digit = 10 ** (math.floor(math.log10(gib)) - 3)
        return f"{math.ceil(gib / digit) * digit:.4g}"


def asked_pattern(
    pattern: str,
    sparsity: float | None,
    outlier_fraction: float | None,
    parameters: float | None,
    file_gib: float | None,
) -> Pattern:
    """The pattern as an object. Raises ValueError if it can't be right; at most one of the three sizes may be given."""
    sizes = {"sparsity": sparsity, "parameters": parameters, "file_gib": file_gib}
    given = [name for name, value in sizes.items() if value is not None]
    if given[-1:] in ([], ["sparsity"]):
        return parse_pattern(pattern, sparsity, outlier_fraction)
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are given, which all say how small the model gets: give one of them")
    value = sizes[given[0]]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{given[0]} is {value!r}: give a number > 0, such as {0.9 if parameters is None else 1e9:g}")
    if pattern != "channels":
        raise ValueError(
            f"{given[0]} is {value:g}, but the pattern {pattern!r} makes no model smaller: give pattern 'channels', or "
            "a sparsity"
        )
    return parse_pattern(pattern, 0.5, outlier_fraction)


@dataclass(frozen=True, eq=False)
class PruningOptions:
    """All options of the callback, checked as far as possible without a model.

    The attributes are the callback's arguments. `pattern` is made of pattern, sparsity and outlier_fraction, and holds
    for all targets without an override. Its sparsity is a guess if parameters or file_gib are given, until
    `with_pattern`. An allocation of None still stands for the default.

    Raises:
        ValueError: If an option can't be right. The message names the option and the fix.
    """

    pattern: Pattern
    parameters: float | None
    file_gib: float | None
    schedule: SparsitySchedule
    targets: str | Sequence[str]
    ignore: str | Sequence[str]
    overrides: Sequence[TargetOverride]
    multiple_of: int
    reorder: bool
    solver: SolverOptions
    calibration: CalibrationOptions
    allocation: Allocation | None
    verify_every_n_steps: int
    monitor: str | None

    def __post_init__(self) -> None:
        for name in ("targets", "ignore"):
            object.__setattr__(self, name, check_expressions(name, getattr(self, name)))
        if not self.targets:
            raise ValueError("targets is []: give at least one glob, such as '*', or leave it out")
        object.__setattr__(self, "overrides", check_overrides(self.overrides))
        check_kind("solver", self.solver, SolverOptions)
        check_kind("calibration", self.calibration, CalibrationOptions)
        if not isinstance(self.schedule, SparsitySchedule):
            raise ValueError(
                f"schedule is {self.schedule!r}: give a SparsitySchedule(start_step, end_step, every_n_steps), one "
                "with at, or None"
            )
        if self.allocation is not None:
            check_kind("allocation", self.allocation, Allocation)
        method = self.solver.method
        if self.allocation == Allocation("loss"):
            if not self.solver.needs_statistics:
                raise ValueError(
                    f"method {method!r} reports no losses, and allocation by 'loss' needs them: choose 'thanos', "
                    "'sparsegpt' or 'wanda', or allocate by 'uniform'"
                )
            if (reason := nothing_to_allocate(self.pattern)) is not None:
                raise ValueError(reason)
        check_whole("verify_every_n_steps", self.verify_every_n_steps, 0)
        check_whole("multiple_of", self.multiple_of, 1, "channels")
        if self.multiple_of != MULTIPLE_OF and not self._has(Channels):
            raise ValueError(
                f"multiple_of is {self.multiple_of}, but no pattern is 'channels', whose number it rounds: leave it out"
            )
        if self._has(Experts) and not self.solver.needs_statistics:
            raise ValueError(
                f"the pattern 'experts' drops those that give least, and method {method!r} looks at no batches: take "
                "'thanos'"
            )
        if not isinstance(self.reorder, bool):
            raise ValueError(f"reorder is {self.reorder!r}: give True or False")
        check_name("monitor", self.monitor, "val/loss")
        refuse_unused(self.solver, self.calibration, self._patterns)

    @property
    def _patterns(self) -> list[Pattern]:
        return [self.pattern, *(other.parsed() for other in self.overrides)]

    def _has(self, kind: type[Pattern]) -> bool:
        return any(isinstance(pattern, kind) for pattern in self._patterns)

    @property
    def size(self) -> ModelSize | None:
        """The most that the model may have at the end, if it was asked for in place of a sparsity."""
        size = ModelSize(self.parameters, self.file_gib)
        return None if size == ModelSize() else size

    def with_pattern(self, final: Mapping[str, Pattern]) -> PruningOptions:
        """The same options with the sparsity that channels or experts really get in the final patterns."""
        if not isinstance(self.pattern, (Channels, Experts)):
            return self
        return replace(self, pattern=next(other for other in final.values() if type(other) is type(self.pattern)))

    @property
    def weighs_outputs(self) -> bool:
        """Whether errors at some outputs count more than at others."""
        weights = self.calibration.output_weights or ("diagonal" if self.solver.method == "thanos" else "uniform")
        return weights != "uniform"

    @property
    def reorders(self) -> bool:
        """Whether channels get another order, where they may: only before optimizers have moments of the weights."""
        has_statistics = self.solver.needs_statistics and not self.collects_in_training
        return self.reorder and has_statistics and self._has(NM) and self.schedule.begins_at_once

    @property
    def block_steps(self) -> int:
        """Steps in which each block is trained at an event."""
        if self.calibration.block_steps is not None:
            return self.calibration.block_steps
        return BLOCK_STEPS if self.calibration.batches is not None and self.solver.method == "thanos" else 0

    @property
    def collects_in_training(self) -> bool:
        """Whether the second moments come from training batches."""
        return self.solver.needs_statistics and self.calibration.batches is None

    def in_words(self) -> dict[str, str]:
        """Each option as one line of text, which a resumed training compares with its own options."""
        words: dict[str, str] = {}
        for option in fields(self):
            value = getattr(self, option.name)
            if isinstance(value, (SolverOptions, CalibrationOptions)):
                words |= {f"{option.name}.{name}": described(entry) for name, entry in vars(value).items()}
            else:
                words[option.name] = described(list(map(repr, value)) if option.name == "overrides" else value)
        return words


def default_schedule(calibration: CalibrationOptions) -> SparsitySchedule:
    """When to prune where the user does not say: once before the first step, if there is a calibration set."""
    is_at_once = isinstance(calibration, CalibrationOptions) and calibration.batches is not None
    return SparsitySchedule(at=[0] if is_at_once else [0.1, 0.2, 0.3, 0.4])


def check_kind(name: str, value: Any, kind: type) -> None:
    """Raise a ValueError if a value is not an instance of the options class."""
    if not isinstance(value, kind):
        raise ValueError(f"{name} is {described(value)}: give {kind.__name__}(...)")


def check_whole(name: str, value: Any, least: int, of: str = "optimizer steps") -> None:
    """Raise a ValueError if a value is not a whole number, or is below `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} is {value!r}: give a whole number of {of} ≥ {least}")


def check_name(name: str, value: Any, example: str) -> None:
    """Raise a ValueError if a value is neither a non-empty string nor None."""
    if value is not None and (not isinstance(value, str) or not value):
        raise ValueError(f"{name} is {value!r}: give a name, such as {example!r}, or None")


def check_batches(name: str, value: Any) -> None:
    """Raise a ValueError if a value can't be a calibration set, as far as this shows without iterating over it."""
    if value is None or value == "datamodule":
        return
    mend = "give a DataLoader, a list of batches, or 'datamodule'"
    if isinstance(value, Iterator):
        raise ValueError(f"{name} is an iterator, which the first event would use up: {mend}")
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise ValueError(f"{name} is {reprlib.repr(value)}: {mend}")
    if number_of_batches(value) == 0:
        raise ValueError(f"{name} has no batch ({described(value)}): {mend}")
    if isinstance(value, Sequence) and isinstance(value[0], (str, bytes)):
        raise ValueError(f"{name} holds text ({reprlib.repr(value[0])}), not batches: {mend}")


def refuse_unused(solver: SolverOptions, calibration: CalibrationOptions, patterns: Sequence[Pattern]) -> None:
    """Refuse options that have no effect under any pattern, since the user expects an effect."""
    of_all = [solver.unused(pattern) for pattern in patterns]
    for name, reason in of_all[0].items():
        if all(name in unused for unused in of_all) and getattr(solver, name) != getattr(SolverOptions(), name):
            raise ValueError(f"solver.{name} is {described(getattr(solver, name))}, but {reason}: leave it out")
    reasons = {}
    if calibration.batches is not None:
        reasons["steps"] = "layers are pruned on calibration.batches, not on training batches"
    if not solver.needs_statistics:
        names = [field.name for field in fields(calibration)]
        reasons = dict.fromkeys(names, f"method {solver.method!r} looks at no batches")
    for field in fields(calibration):
        value = getattr(calibration, field.name)
        if field.name in reasons and value not in (field.default, "uniform"):
            raise ValueError(f"calibration.{field.name} is {described(value)}, but {reasons[field.name]}: leave it out")


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> dict[str, str]:
    """The changed arguments, each with a sentence that says how. Those that `before` lacks are not compared."""
    return {
        name: f"{name} was {before[name]} and is {value}"
        for name, value in now.items()
        if name in before and before[name] != value
    }


def described(value: Any) -> str:
    """One line that describes an argument. Another process describes an equal argument alike.

    Examples:
        >>> described([{"input_ids": None}]), described(("*", "lm_head")), described("2:4")
        ('list of 1 batch(es)', "['*', 'lm_head']", "'2:4'")
    """
    if isinstance(value, NM) and not value.outlier_fraction:
        return repr(value.name)
    if isinstance(value, Iterable) and not isinstance(value, str):
        if isinstance(value, Sequence) and all(isinstance(item, str) for item in value):
            return repr(list(value))
        length = number_of_batches(value)
        return type(value).__name__ + ("" if length is None else f" of {length} batch(es)")
    return f"{value:g}" if isinstance(value, float) and value.is_integer() else repr(value)


def number_of_batches(batches: Iterable[Any]) -> int | None:
    """The number of batches, of all ranks that share them; None if it is not known before an iteration."""
    try:
        return len(batches) * ranks_sharing(batches)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):  # such as the DataLoader of an IterableDataset
        return None


def ranks_sharing(batches: Iterable[Any]) -> int:
    """The number of ranks among which a DistributedSampler shares the batches of a DataLoader; 1 without one."""
    samplers = getattr(batches, "sampler", None), getattr(getattr(batches, "batch_sampler", None), "sampler", None)
    return next((sampler.num_replicas for sampler in samplers if isinstance(sampler, DistributedSampler)), 1)


@dataclass(frozen=True)
class TargetOverride:
    """Another pattern for some of the targets.

    Args:
        targets: Globs or `re:` expressions of module names, as for the callback's targets.
        pattern: "2:4" (any N:M), "unstructured", "structured", "channels" or "experts".
        sparsity: Final sparsity, for all but N:M.
        outlier_fraction: Fraction of the rows that stay dense.

    Examples:
        >>> TargetOverride(targets=["*.down_proj"], pattern="unstructured", sparsity=0.5).parsed()
        Unstructured(sparsity=0.5)
    """

    targets: str | Sequence[str]
    pattern: str
    sparsity: float | None = None
    outlier_fraction: float | None = None

    def parsed(self) -> Pattern:
        """The pattern as an object, or the ValueError of `parse_pattern`."""
        return parse_pattern(self.pattern, self.sparsity, self.outlier_fraction)


def check_overrides(overrides: Sequence[TargetOverride]) -> tuple[TargetOverride, ...]:
    """Return the overrides, or raise a ValueError if one can't be right, as far as this shows without a model."""
    mend = "give a list of TargetOverride(targets, pattern)"
    if not isinstance(overrides, Sequence) or isinstance(overrides, str):
        raise ValueError(f"overrides is {overrides!r}: {mend}")
    for override in overrides:
        if not isinstance(override, TargetOverride):
            raise ValueError(f"overrides holds {override!r}: {mend}")
        check_expressions("an override's targets", override.targets)
        override.parsed()
    return tuple(overrides)


def assign_patterns(
    layers: Mapping[str, Layer], pattern: Pattern, overrides: Sequence[TargetOverride] = ()
) -> dict[str, Pattern]:
    """The final pattern of each layer. If several overrides match a layer, the last one counts.

    Raises:
        ValueError: If an override matches no target, or if a pattern does not fit the shape of a layer.
    """
    patterns = dict.fromkeys(layers, pattern)
    for override in overrides:
        for expression in check_expressions("an override's targets", override.targets):
            matched = [name for name in layers if matches(name, expression)]
            if not matched:
                raise ValueError(
                    f"override target {expression!r} matches none of the layers to prune"
                    f"{did_you_mean(expression, layers)}: {examples(layers)}"
                )
            patterns.update(dict.fromkeys(matched, override.parsed()))
    misfits: dict[str, ValueError] = {}
    for name, layer in layers.items():
        try:
            patterns[name].check_shape(layer.rows, layer.cols)
        except ValueError as error:
            misfits[name] = error
    if misfits:
        first, why = next(iter(misfits.items()))
        raise ValueError(
            f"{len(misfits)} of {len(layers)} layers can't take their pattern ({examples(misfits)}). Layer {first}: "
            f"{why}. Or add {to_add(misfits)} to ignore, or override the pattern"
        )
    return patterns
