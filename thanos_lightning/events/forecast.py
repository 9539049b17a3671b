"""Forecasts before the first batch what is pruned, when, and roughly how much memory and time that takes."""

from __future__ import annotations

import textwrap
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from thanos_lightning.calibration.batches import BATCHES_PER_BACKWARD
from thanos_lightning.calibration.hidden_states import TOKENS_PER_STEP
from thanos_lightning.events.footprint import event_bytes, moments_bytes, sent_bytes, sharing, training_bytes
from thanos_lightning.events.reconstruct import MOST_PASSES
from thanos_lightning.models.census import Census
from thanos_lightning.models.stack import Block
from thanos_lightning.models.targets import PrunableLayer
from thanos_lightning.plan.schedule import Event
from thanos_lightning.plan.windows import Window
from thanos_lightning.report.progress import duration, open_phase
from thanos_lightning.report.stopwatch import finish
from thanos_lightning.sharding.owners import busiest
from thanos_lightning.solver import Experts, HessianAccumulator, Pattern, prune
from thanos_lightning.solver.layer import SolverOptions
from thanos_lightning.solver.linalg import exact_arithmetic

_WIDTH = 80
_MOST_EVENTS = 6  # a longer schedule is abridged
# The solve of a (c, b) layer takes this factor times as long as b³ + 4cb² operations at the rate of a matrix product.
# Each later step takes as long as two products of weight and Hessian. Measured on 256 to 2,048 columns, on one thread
# of an AMD EPYC: the forecast is within a factor of 1.5.
_METHOD = {"thanos": 2.4, "sparsegpt": 2.4, "wanda": 1.0, "magnitude": 0.3}
_COUPLED = 2.5  # a solve with coupled rows takes so many times as long
# The products of a step in which a block is trained take as long as so many forwards, and all else (casts, masks, Adam)
# as long as so many operations in float32 for each weight. Measured on SmolLM2-135M, on one thread of an Intel Xeon.
_FORWARDS, _ALL_ELSE = 3, 1600
_MEASURING_SECONDS, _MEASUREMENTS, _MEASURED_SIZE = 0.02, 4, 512
_rates: dict[tuple[torch.device, str | None], float] = {}  # by device and precision; a process measures each once


@dataclass(frozen=True)
class Rates:
    """How fast a device computes.

    Attributes:
        exact: Operations per second of a matrix product in float32.
        forward: The same in the precision of the forward.
        solves: Shape of a layer -> the seconds of its solve, where they were measured.
    """

    exact: float
    forward: float
    solves: Mapping[tuple[int, int], float] = field(default_factory=dict)

    @classmethod
    def measured(cls, device: torch.device, trainer: Trainer) -> Rates:
        """Measure products for a twentieth of a second each, once in a process."""
        return cls(_rate(device), _rate(device, trainer))

    def solving(self, layer: PrunableLayer, options: SolverOptions, *, coupled: bool) -> float:
        """Seconds in which one rank solves a layer."""
        found = self.solves.get((layer.rows, layer.cols))
        return _operations(layer, options, coupled) / self.exact if found is None else found


@dataclass(frozen=True)
class Needs:
    """Roughly what one window takes.

    Attributes:
        moments: Bytes for second moments, on each rank.
        event: Peak bytes at its end, with the second moments, on the rank that needs most.
        sent: Bytes that all ranks together send to solve and to write it.
        solving_seconds: Time of the rank that solves longest.
    """

    moments: int
    event: int
    sent: int
    solving_seconds: float


@dataclass(frozen=True)
class Forecast:
    """Roughly what one event takes, in bytes and in seconds.

    Attributes:
        moments: Bytes for second moments, on each rank.
        event: Peak bytes of an event, with the second moments, on the rank that needs most.
        masks: Bytes for all masks, on each rank.
        calibrating_seconds: Time to run a calibration set, or to count training batches. None if it is not known.
        scanning_seconds: Time of the sensitivity scan before the first event.
        solving_seconds: Time of all solves.
        states: Bytes of the CPU's memory for what blocks get and give, on each rank, beside what an event takes.
        reconstructing_seconds: Time to train the blocks.
    """

    moments: int
    event: int
    masks: int
    calibrating_seconds: float | None
    scanning_seconds: float
    solving_seconds: float
    states: int = 0
    reconstructing_seconds: float = 0.0


@dataclass(frozen=True)
class Calibration:
    """The batches that an event is pruned on.

    Attributes:
        batches: Number of batches; None if it is not known.
        tokens: Tokens in each batch; None if it is not known.
        of_training: Whether these are training batches, so that only counting them takes time.
        differentiates: Whether backwards run on the calibration set, for output weights.
        coupled: Whether rows are coupled.
        length: Tokens in each sequence; None if it is not known.
        blocks: Number of blocks that are trained on them.
        block_steps: For how many steps.
    """

    batches: int | None
    tokens: int | None
    of_training: bool
    differentiates: bool
    coupled: bool = False
    length: int | None = None
    blocks: int = 0
    block_steps: int = 0


def needs(
    layers: Sequence[PrunableLayer],
    options: SolverOptions,
    rates: Rates,
    *,
    ranks: int,
    coupled: bool = False,
    pattern: Pattern | None = None,
    gathers: bool = False,
    again: bool = False,
    device: torch.device | None = None,
    blocks: Sequence[Block] = (),
    dropped: Collection[str] = (),
) -> Needs:
    """Forecast a window by formulas.

    `blocks` are those that are trained. `dropped` names layers that no solver sees, since whole experts go. The rest is
    as for `event_bytes`.
    """
    solved = [layer for layer in layers if layer.name not in dropped]
    seconds = {layer.name: rates.solving(layer, options, coupled=coupled) for layer in solved}
    moments = moments_bytes(layers, coupled=coupled) if options.needs_statistics else 0
    peak = event_bytes(
        solved, options, ranks=ranks, coupled=coupled, pattern=pattern, gathers=gathers, again=again, device=device
    )
    beside = moments_bytes([layer for layer in layers if layer.name in dropped], coupled=coupled)
    return Needs(
        moments=moments,
        event=max([peak + beside, *(training_bytes(block, solved, ranks) for block in blocks)]),
        sent=sent_bytes(layers, ranks, coupled=coupled, gathers=gathers, again=again),
        solving_seconds=busiest({layer.name: layer for layer in solved}, seconds, ranks, coupled=coupled),
    )


def dropped_in(window: Window) -> set[str]:
    """The layers of a window that go as parts of whole experts."""
    return {name for name, pattern in window.patterns.items() if isinstance(pattern, Experts)}


def forecast(
    layers: Mapping[str, PrunableLayer],
    census: Census,
    options: SolverOptions,
    calibration: Calibration,
    rates: Rates,
    windows: Sequence[Needs],
    *,
    ranks: int,
    is_sharded: bool,
    levels: int,
) -> Forecast:
    """Forecast an event that consists of `windows`.

    `is_sharded` says whether each rank has a shard of the masks. `levels` is the number of sparsities at which a scan
    looks at each layer; 0 without a scan.
    """
    targets = list(layers.values())
    published = SolverOptions.as_published(options.method)
    scans = [_operations(layer, published, False) / rates.exact for layer in targets]
    shown = sum(layer.rows * layer.cols for layer in targets if layer.shows_its_mask)
    return Forecast(
        moments=max(window.moments for window in windows),
        event=max(window.event for window in windows),
        masks=(census.target_weights - shown) // (ranks if is_sharded else 1),
        calibrating_seconds=_calibrating(targets, census, calibration, ranks, rates, len(windows))
        if options.needs_statistics
        else 0.0,
        scanning_seconds=levels * sum(scans) / ranks,
        solving_seconds=sum(window.solving_seconds for window in windows),
        states=_states(targets, calibration, len(windows)) // ranks,
        reconstructing_seconds=reconstructing_seconds(census, calibration, rates) / ranks,
    )


def reconstructing_seconds(census: Census, calibration: Calibration, rates: Rates) -> float:
    """Time to train all blocks on one rank."""
    tokens = _tokens_of_steps(calibration)
    steps = tokens / max(TOKENS_PER_STEP, calibration.length or 0)
    return census.target_weights * (_FORWARDS * 2 * tokens / rates.forward + _ALL_ELSE * steps / rates.exact)


def _tokens_of_steps(calibration: Calibration) -> int:
    wanted = calibration.block_steps * max(TOKENS_PER_STEP, calibration.length or 0) if calibration.blocks else 0
    there = (calibration.batches or 0) * (calibration.tokens or 0)
    return min(wanted, MOST_PASSES * there)


def _states(layers: Sequence[PrunableLayer], calibration: Calibration, windows: int) -> int:
    """Of one window: what its first block gets, and what each block gives."""
    there = (calibration.batches or 0) * (calibration.tokens or 0)
    tokens = min(_tokens_of_steps(calibration), there)
    return 2 * layers[0].cols * tokens * (calibration.blocks // windows + 1)


def _operations(layer: PrunableLayer, options: SolverOptions, coupled: bool) -> float:
    rows, cols = layer.rows, layer.cols
    steps = options.admm_steps + options.refine_steps
    once = _METHOD[options.method] * (cols**3 + 4 * rows * cols**2) + steps * 4 * rows * cols**2
    return once * (_COUPLED if coupled else 1.0)


def _calibrating(
    layers: Sequence[PrunableLayer], census: Census, calibration: Calibration, ranks: int, rates: Rates, windows: int
) -> float | None:
    if calibration.batches is None or calibration.tokens is None:
        return None
    moments = sum(2 * _reached(group[0]) * group[0].cols ** 2 for group in sharing(layers))
    if calibration.coupled:
        moments += sum(2 * _reached(layer) * layer.rows**2 for layer in layers)
    tokens = calibration.batches * calibration.tokens
    if calibration.of_training:
        return tokens * moments / rates.exact
    passes = 1.0
    if calibration.differentiates:
        passes += 1 / BATCHES_PER_BACKWARD["coupled" if calibration.coupled else "alone"]
    idle = sum((1 - _reached(layer)) * layer.rows * layer.cols for layer in layers)
    run = 2 * (census.model_weights - idle) * passes / rates.forward
    return tokens / ranks * (windows * run + moments / rates.exact)


def _reached(layer: PrunableLayer) -> float:
    """The fraction of the tokens that reach a layer."""
    return 1.0 if layer.expert is None else layer.expert.reached


def _rate(device: torch.device, trainer: Trainer | None = None) -> float:
    """Operations per second of a matrix product in float32, or in the precision of a Trainer's forward."""
    precision = None if trainer is None else str(trainer.precision_plugin.precision)
    if (device, precision) not in _rates:
        dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
        context = exact_arithmetic(device) if trainer is None else trainer.precision_plugin.forward_context()
        with torch.no_grad(), context:
            _rates[device, precision] = _measure(device, dtype)
    return _rates[device, precision]


def _measure(device: torch.device, dtype: torch.dtype) -> float:
    size = _MEASURED_SIZE if device.type == "cpu" else 8 * _MEASURED_SIZE
    matrix = torch.ones(size, size, device=device, dtype=dtype)

    def multiply(times: int) -> float:
        begin = time.perf_counter()
        for _ in range(times):
            torch.nn.functional.linear(matrix, matrix)
        finish(device)
        return time.perf_counter() - begin

    multiply(1)  # the first call sets up the library
    times = max(1, int(_MEASURING_SECONDS / _MEASUREMENTS / max(multiply(1), 1e-6)))
    # The fastest measurement counts, since other processes may slow down the rest
    return 2 * size**3 * times / min(multiply(times) for _ in range(_MEASUREMENTS))


def timed_solves(
    layers: Mapping[str, PrunableLayer],
    patterns: Mapping[str, Pattern],
    options: SolverOptions,
    device: torch.device,
    *,
    coupled: bool,
) -> dict[tuple[int, int], float]:
    """Seconds of the solve of one random layer of each shape, on a device; to the pattern of the last that has it."""
    solved = {name: pattern for name, pattern in patterns.items() if not isinstance(pattern, Experts)}
    by_shape = {(layers[name].rows, layers[name].cols): pattern for name, pattern in solved.items()}
    shapes = sorted(by_shape, key=lambda shape: shape[0] * shape[1] ** 2)
    found: dict[tuple[int, int], float] = {}
    if not shapes:
        return found
    generator = torch.Generator(device).manual_seed(0)
    with open_phase("Timing a layer of each shape", len(shapes) + 1, "solves") as phase:
        for rows, cols in [shapes[0], *shapes]:  # the first call sets up libraries, and its time is forgotten
            weight = torch.randn(rows, cols, generator=generator, device=device)
            inputs = HessianAccumulator(cols, device=device)
            for _ in range(2):
                inputs.update(torch.randn(cols, cols, generator=generator, device=device))
            hessian = inputs.compute()
            outputs = torch.eye(rows, device=device) if coupled else None
            finish(device)
            begin = time.perf_counter()
            prune(weight, hessian, by_shape[rows, cols], output_weights=outputs, **vars(options))
            finish(device)
            found[rows, cols] = time.perf_counter() - begin
            phase.advance()
    return found


# What a batch holds


def tokens_per_batch(batches: Any) -> tuple[int | None, int | None, int | None]:
    """The batches of a list or a dataloader, the tokens in each, and in each sequence; None for what is not known.

    Looks at one sample at most, and leaves the training's random numbers as they are.

    Examples:
        >>> tokens_per_batch([{"input_ids": torch.zeros(8, 128, dtype=torch.long)}] * 3)
        (3, 1024, 128)
    """
    number = tokens = length = None
    with suppress(Exception), torch.random.fork_rng(devices=[]):  # a forecast must not end a training
        number = len(batches)
    with suppress(Exception), torch.random.fork_rng(devices=[]):
        if isinstance(batches, Sequence):
            tokens, length = _tokens(batches[0])
        else:
            found, length = _tokens(batches.dataset[0])
            tokens = None if found is None else found * batches.batch_size
    return number, tokens, length


def _tokens(batch: Any) -> tuple[int, int] | tuple[None, None]:
    """The tokens of `input_ids`, or else of the first tensor, and of a sequence; None if that is floating-point."""
    if isinstance(batch, Mapping):
        batch = batch.get("input_ids", next(iter(batch.values())))
    while isinstance(batch, (list, tuple)):
        batch = batch[0]
    if isinstance(batch, Tensor) and batch.ndim and not batch.is_floating_point():
        return batch.numel(), batch.shape[-1]
    return None, None


# The forecast as text


def describe(
    census: Census,
    patterns: Iterable[Pattern],
    events: Sequence[Event],
    main: Pattern,
    calibration: Calibration,
    outlook: Forecast,
    *,
    steps: int | None,
    steps_taken: int,
    channels: str | None = None,
    order: str | None = None,
) -> str:
    """The announcement as a block of lines, none longer than 80 characters.

    `patterns` has the final pattern of each layer, and `main` is the main pattern. `steps` is the training's number of
    optimizer steps; None if it is not known. `channels` says how many are kept, where some are pruned, and
    `order` whether they get another order.
    """
    layers = f"{census.num_targets} of {census.num_prunable} {census.prunable} layers"
    weights = f"{_millions(census.target_weights)} of {_millions(census.model_weights)} M"
    to_come = [event for event in events if event.step >= steps_taken and (steps is None or event.step <= steps)]
    lines = [_wrapped("", f"Pruning {layers} to {_listed(patterns)}")]
    lines.append(_wrapped("weights", f"{weights}, {census.share:.0%} of the model"))
    if channels is not None:
        lines.append(_wrapped("blocks", channels))
    if order is not None:
        lines.append(_wrapped("order", order))
    if census.adapters:
        adapted = f"{census.num_adapted} of {census.num_targets} layers to prune have one"
        text = f"{_millions(census.adapters)} M weights of adapters, masked; {adapted}; an export merges them"
        lines.append(_wrapped("lora", text))
    if census.dense:
        lines.append(_wrapped("dense", census.shares()))
    lines.append(_wrapped("events", _when(to_come, main, calibration, steps, steps_taken)))
    if to_come:
        sizes = [
            (f"statistics {sized(outlook.moments)}", outlook.moments),
            (f"an event {sized(outlook.event)} in all", outlook.event),
            (f"masks {sized(outlook.masks)}", outlook.masks),
            (f"hidden states {sized(outlook.states)} on the CPU", outlook.states),
        ]
        needs = ", ".join(text for text, size in sizes if size)
        lines.append(_wrapped("memory", f"about: {needs}"))
        lines.append(_wrapped("time", _how_long(outlook, calibration, len(to_come))))
    return "\n".join(lines)


def _when(events: Sequence[Event], main: Pattern, calibration: Calibration, steps: int | None, steps_taken: int) -> str:
    if not events:
        return f"all are done after {steps_taken} optimizer steps; what is zero stays zero"
    of = "" if steps is None else f" of {steps}"
    batches = "" if calibration.batches is None else f" {calibration.batches}"
    what = f"{batches} training batches before it" if calibration.of_training else f"{batches} calibration batches"
    on = f", on{what}" if calibration.batches != 0 else ""
    last = events[-1]
    if len(events) == 1:
        when = f"once, after optimizer step {last.step}{of}" if last.step else f"once, before the first{of} steps"
        return f"{when}{on}"
    targets = [f"{event.sparsity(main.sparsity):.0%}" for event in events]
    if len(events) <= _MOST_EVENTS:
        when = f"after optimizer steps {', '.join(str(event.step) for event in events)}{of}, to {', '.join(targets)}"
    else:
        when = (
            f"{len(events)}, after optimizer steps {events[0].step}, {events[1].step}, …, {last.step}{of}, to "
            f"{targets[0]}, {targets[1]}, …, {targets[-1]}"
        )
    return f"{when}{on.replace('before it', 'before each')}"


def _how_long(outlook: Forecast, calibration: Calibration, events: int) -> str:
    parts = [("solving", outlook.solving_seconds)]
    if outlook.calibrating_seconds is not None and calibration.batches != 0:
        parts.insert(0, ("counting" if calibration.of_training else "calibrating", outlook.calibrating_seconds))
    if outlook.reconstructing_seconds:
        parts.append(("reconstructing", outlook.reconstructing_seconds))
    told = ", ".join(f"{what} {duration(seconds)}" for what, seconds in parts)
    each = " an event" if events > 1 else ""
    text = (
        f"about {duration(sum(seconds for _, seconds in parts))}{each} ({told})" if len(parts) > 1 else f"about {told}"
    )
    if outlook.calibrating_seconds is None:
        text += f"{each}, and what {'counting' if calibration.of_training else 'running'} the batches takes"
    if outlook.scanning_seconds:
        text += f"; before the first, about {duration(outlook.scanning_seconds)} to find out what each layer would lose"
    return text


def _listed(patterns: Iterable[Pattern]) -> str:
    counts = Counter(
        pattern.name + (f" {pattern.sparsity:.4g}" if ":" not in pattern.name or pattern.outlier_fraction else "")
        for pattern in patterns
    )
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{name} ({number})" for name, number in counts.items())


def _millions(number: int) -> str:
    return f"{number / 1e6:,.1f}" if number >= 50_000 else f"{number / 1e6:.2g}"


def sized(size: int) -> str:
    """Format bytes.

    Examples:
        >>> sized(3 * 2**29), sized(2**20)
        ('1.5 GiB', '1 MiB')
    """
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{max(1, round(size / 2**20))} MiB"


def _wrapped(label: str, text: str) -> str:
    begin = f"  {label:<8}" if label else ""
    return textwrap.fill(
        text, _WIDTH, initial_indent=begin, subsequent_indent=" " * 10, break_long_words=False, break_on_hyphens=False
    )
