"""Announces before the first batch what is pruned, when, and about how much memory that takes."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import rich
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities import rank_zero_warn

from thanos_lightning.checkpoints.format import Size, exported_size
from thanos_lightning.event.targets import Targets
from thanos_lightning.layers.census import Census, take_census
from thanos_lightning.plan.estimate import Batches, Estimate, Solving, estimate
from thanos_lightning.plan.options import PruningOptions
from thanos_lightning.plan.schedule import Event, scheduled_events, steps_of
from thanos_lightning.ranks.fragments import FragmentAccess
from thanos_lightning.solver import NM, Channels, Experts, Pattern

if TYPE_CHECKING:
    from thanos_lightning.fit.run import PruningRun

_WIDTH = 80
_MOST_EVENTS = 6  # a longer schedule is abridged


def announce(run: PruningRun) -> None:
    """Print the announcement on rank 0, and warn if most of the model stays dense. All ranks must call it.

    The run's report takes the counts of weights.
    """
    options, trainer, module, past = run.options, run.trainer, run.module, run.past
    census = take_census(module, run.masked)
    summary = past.report.summary
    summary.target_weights, summary.model_weights = census.target_weights, census.model_weights
    if census.share < 0.5:
        rank_zero_warn(
            f"only {census.share:.1%} of the model's weights are in the layers to prune, which can be Linear, "
            f"Conv1D and fused experts; left out are {census.shares()}"
        )
    with torch.random.fork_rng(devices=[]):  # must not change the training's random numbers
        batches = run.collector.batches(trainer, module) if options.calibration.batches is not None else None
    if not trainer.is_global_zero:
        return
    events = scheduled_events(run.planner.schedule, trainer)
    known = Batches.of(trainer.train_dataloader if batches is None else batches)
    estimated = estimate_of(run, module.device, census, known)
    pruned = {window.event.step for window in run.windows[: past.windows_done] if window.is_last and not window.scans}
    events = [event for event in events if event.step not in pruned]
    steps = steps_of(trainer)
    dense = exported_size(module, run.layers, of_deepspeed=isinstance(trainer.strategy, DeepSpeedStrategy))
    taken = past.optimizer_steps
    text = describe(options, run.targets, census, estimated, events, dense=dense, steps=steps, steps_taken=taken)
    rich.get_console().print(f"\n{text}\n", markup=False, highlight=False)


def estimate_of(
    run: PruningRun, device: torch.device, census: Census | None = None, batches: Batches | None = None
) -> Estimate:
    """Estimate what the windows of a run take."""
    return estimate(
        run.options,
        run.layers,
        census or take_census(run.module, run.masked),
        run.windows,
        run.blocks,
        batches or Batches(),
        Solving(
            run.trainer.world_size,
            in_pieces=isinstance(run.access, FragmentAccess),
            again=len(scheduled_events(run.planner.schedule, run.trainer)) > 1,
            device=device.type,
        ),
        accumulated=run.trainer.accumulate_grad_batches,
    )


def describe(
    options: PruningOptions,
    targets: Targets,
    census: Census,
    estimated: Estimate,
    events: Sequence[Event],
    *,
    dense: Size,
    steps: int | None,
    steps_taken: int = 0,
) -> str:
    """The announcement as a block of lines, none longer than 80 characters.

    `dense` is what an export would have without pruning. `steps` is the training's number of optimizer steps; None if
    it is not known.
    """
    layers = f"{census.num_targets} of {census.num_prunable} {census.prunable} layers"
    weights = f"{_millions(census.target_weights)} of {_millions(census.model_weights)} M"
    to_come = [event for event in events if event.step >= steps_taken and (steps is None or event.step <= steps)]
    lines = [_wrapped("", f"Pruning {layers} to {_listed(targets.final.values())}")]
    lines.append(_wrapped("weights", f"{weights}, {census.share:.0%} of the model"))
    if targets.in_words is not None:
        lines.append(_wrapped("blocks", targets.in_words))
    if targets.order_in_words is not None:
        lines.append(_wrapped("order", targets.order_in_words))
    if census.adapters:
        adapted = f"{census.num_adapted} of {census.num_targets} layers to prune have one"
        text = f"{_millions(census.adapters)} M weights of adapters, masked; {adapted}; an export merges them"
        lines.append(_wrapped("lora", text))
    if census.dense:
        lines.append(_wrapped("dense", census.shares()))
    lines.append(_wrapped("export", _exported(targets, dense)))
    lines.append(_wrapped("events", _when(to_come, options, estimated.batches, steps, steps_taken)))
    if to_come:
        sizes = [
            (f"the inputs' statistics {sized(estimated.moments)}", estimated.moments),
            (f"an event {sized(estimated.event)} in all", estimated.event),
            (f"keep masks {sized(estimated.masks)}", estimated.masks),
            (f"hidden states {sized(estimated.states)} on the CPU", estimated.states),
        ]
        needs = ", ".join(text for text, size in sizes if size)
        lines.append(_wrapped("memory", f"about: {needs}"))
    return "\n".join(lines)


def _when(
    events: Sequence[Event], options: PruningOptions, number: int | None, steps: int | None, steps_taken: int
) -> str:
    if not events:
        return f"all are done after {steps_taken} optimizer steps; what is zero stays zero"
    of = "" if steps is None else f" of {steps}"
    batches = f"{'training' if options.collects_in_training else 'calibration'} batch{'es' if number != 1 else ''}"
    before = " before it" if options.collects_in_training else ""
    on = "" if number == 0 else f", on {'' if number is None else f'{number} '}{batches}{before}"
    last = events[-1]
    if len(events) == 1:
        when = f"after optimizer step {last.step}{of}" if last.step else f"before the first{of} steps"
        return f"pruned once, {when}{on}"
    targets = [f"{event.sparsity(options.pattern.sparsity):.0%}" for event in events]
    if len(events) <= _MOST_EVENTS:
        at = ", ".join(str(event.step) for event in events)
        when = f"pruned after optimizer steps {at}{of}, to {', '.join(targets)}"
    else:
        when = (
            f"pruned {len(events)} times, after optimizer steps {events[0].step}, {events[1].step}, …, {last.step}{of}"
            f", to {targets[0]}, {targets[1]}, …, {targets[-1]}"
        )
    return f"{when}{on.replace('before it', 'before each')}"


def _exported(targets: Targets, dense: Size) -> str:
    """What an export will be, and who computes faster with it."""
    size, nonzeros = targets.after(dense)
    kinds = {type(pattern) for pattern in targets.final.values()}
    if Channels in kinds:
        gain = "smaller and faster in every runtime"
    elif Experts in kinds:
        gain = "smaller in every runtime, and as fast for each token"
    elif all(isinstance(pattern, NM) and (pattern.n, pattern.m) == (2, 4) for pattern in targets.final.values()):
        gain = "faster only with a kernel for 2:4"
    else:
        gain = "no faster without a kernel for zeros"
    dtype = {4.0: " in float32, half in bfloat16", 2.0: " in 16 bits"}.get(dense.bytes_each, "")
    file = f"{size.gib:.2f} GiB" if size.gib >= 0.1 else f"{size.gib * 1024:.2g} MiB"
    zeros = "" if nonzeros == size.weights else f", {_millions(nonzeros)} M not 0"
    return f"{_millions(size.weights)} M weights{zeros}; {file}{dtype}; {gain}"


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
    """Bytes in words, such as "1.5 GiB" or "1 MiB"."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{max(1, round(size / 2**20))} MiB"


def _wrapped(label: str, text: str) -> str:
    begin = f"  {label:<8}" if label else ""
    return textwrap.fill(
        text, _WIDTH, initial_indent=begin, subsequent_indent=" " * 10, break_long_words=False, break_on_hyphens=False
    )
