"""Forecasts before the first batch what is pruned, when, and about how much memory that takes."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thanos_lightning.calibration.hidden_states import TOKENS_PER_STEP
from thanos_lightning.events.footprint import event_bytes, moments_bytes, sent_bytes, training_bytes
from thanos_lightning.models.census import Census
from thanos_lightning.models.stack import Block
from thanos_lightning.models.targets import PrunableLayer
from thanos_lightning.plan.schedule import Event
from thanos_lightning.plan.windows import Window
from thanos_lightning.solver import Experts, Pattern
from thanos_lightning.solver.layer import SolverOptions

_WIDTH = 80
_MOST_EVENTS = 6  # a longer schedule is abridged


@dataclass(frozen=True)
class Needs:
    """About what one window takes.

    Attributes:
        moments: Bytes for second moments, on each rank.
        event: Peak bytes at its end, with the second moments, on the rank that needs most.
        sent: Bytes that all ranks together send to solve and to write it.
    """

    moments: int
    event: int
    sent: int


@dataclass(frozen=True)
class Forecast:
    """About what one event takes, in bytes.

    Attributes:
        moments: Bytes for second moments, on each rank.
        event: Peak bytes of an event, with the second moments, on the rank that needs most.
        masks: Bytes for all masks, on each rank.
        states: Bytes of the CPU's memory for what blocks get and give, on each rank, beside what an event takes.
    """

    moments: int
    event: int
    masks: int
    states: int = 0


@dataclass(frozen=True)
class Calibration:
    """The batches that an event is pruned on.

    Attributes:
        batches: Number of batches; None if it is not known.
        tokens: Tokens in each batch; None if it is not known.
        of_training: Whether these are training batches.
        length: Tokens in each sequence; None if it is not known.
        blocks: Number of blocks that are trained on them.
        block_steps: For how many steps.
    """

    batches: int | None
    tokens: int | None
    of_training: bool
    length: int | None = None
    blocks: int = 0
    block_steps: int = 0


def needs(
    layers: Sequence[PrunableLayer],
    options: SolverOptions,
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
    """Estimate a window by formulas.

    `blocks` are those that are trained. `dropped` names layers that no solver sees, since whole experts go. The rest is
    as for `event_bytes`.
    """
    solved = [layer for layer in layers if layer.name not in dropped]
    moments = moments_bytes(layers, coupled=coupled) if options.needs_statistics else 0
    peak = event_bytes(
        solved, options, ranks=ranks, coupled=coupled, pattern=pattern, gathers=gathers, again=again, device=device
    )
    beside = moments_bytes([layer for layer in layers if layer.name in dropped], coupled=coupled)
    return Needs(
        moments=moments,
        event=max([peak + beside, *(training_bytes(block, solved, ranks) for block in blocks)]),
        sent=sent_bytes(layers, ranks, coupled=coupled, gathers=gathers, again=again),
    )


def dropped_in(window: Window) -> set[str]:
    """The layers of a window that go as parts of whole experts."""
    return {name for name, pattern in window.patterns.items() if isinstance(pattern, Experts)}


def forecast(
    layers: Mapping[str, PrunableLayer],
    census: Census,
    calibration: Calibration,
    windows: Sequence[Needs],
    *,
    ranks: int,
    is_sharded: bool,
) -> Forecast:
    """Estimate an event that consists of `windows`.

    `is_sharded` says whether each rank has a shard of the masks.
    """
    targets = list(layers.values())
    shown = sum(layer.rows * layer.cols for layer in targets if layer.shows_its_mask)
    return Forecast(
        moments=max(window.moments for window in windows),
        event=max(window.event for window in windows),
        masks=(census.target_weights - shown) // (ranks if is_sharded else 1),
        states=_states(targets, calibration, len(windows)) // ranks,
    )


def _states(layers: Sequence[PrunableLayer], calibration: Calibration, windows: int) -> int:
    """Of one window: what its first block gets, and what each block gives."""
    if not calibration.blocks:
        return 0
    wanted = calibration.block_steps * max(TOKENS_PER_STEP, calibration.length or 0)
    there = (calibration.batches or 0) * (calibration.tokens or 0)
    return 2 * layers[0].cols * min(wanted, there) * (calibration.blocks // windows + 1)


# What a batch holds


def tokens_per_batch(batches: Any) -> tuple[int | None, int | None, int | None]:
    """The batches of a list or a dataloader, the tokens in each, and in each sequence; None for what is not known.

    Looks at one sample at most, and leaves the training's random numbers as they are.

    Examples:
        >>> tokens_per_batch([{"input_ids": torch.zeros(8, 128, dtype=torch.long)}] * 3)
        (3, 1024, 128)
    """
    number = tokens = length = None
    with suppress(Exception), torch.random.fork_rng(devices=[]):  # an estimate must not end a training
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
