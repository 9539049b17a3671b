"""The command plan: what fit would take on machines that need not be there, and what it would take to fit."""

from __future__ import annotations

import itertools
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.util import find_spec
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy

from thanos_lightning.cli.commands import GIGABYTES
from thanos_lightning.cli.mistakes import Mistake
from thanos_lightning.cli.planned import Outlook, Plan, PlannedCLI, quiet
from thanos_lightning.fit.announce import sized
from thanos_lightning.fit.memory import smaller_windows
from thanos_lightning.plan.estimate import Needs
from thanos_lightning.plan.schedule import steps_of
from thanos_lightning.plan.shares import stage_of
from thanos_lightning.plan.windows import Window

_GIB = 2**30
_LABELS = {
    "masters": "masters: the weights in fp32",
    "moments": "moments of the optimizer",
    "masks": "keep masks",
    "copies": "copies of weights, for a forward",
    "buckets": "buckets: gradients on their way",
    "passing": "gradient buffers",
}
_Change = tuple[str, dict[str, Any]]  # in words, and as arguments of `Plan.outlook`


def plan(
    arguments: list[str],
    *,
    devices: int | None = None,
    num_nodes: int | None = None,
    device: str | None = None,
    memory_gib: float | None = None,
) -> int:
    """Print what fit would take with these arguments. Returns 1 if it does not fit into the memory, else 0."""
    if memory_gib is not None and not 0 < memory_gib < float("inf"):
        raise Mistake(f"--memory-gib is {memory_gib:g}: give a number > 0, such as 80")
    memory = None if device is None else GIGABYTES[device] * 10**9
    if memory_gib is not None:
        memory = round(memory_gib * _GIB)
    for name, value in (("devices", devices), ("num_nodes", num_nodes)):
        if value is not None:
            arguments = [*arguments, f"--trainer.{name}={value}"]
    planned = Plan(PlannedCLI(arguments, for_another=memory is not None))
    outlook = _outlook(planned, memory)
    fits = None if memory is None else outlook.most <= memory
    remedies = _remedies(planned, memory) if memory is not None and not fits else []
    name = f"{planned.ranks} × {device}" if device else f"{planned.ranks} rank{'s' if planned.ranks > 1 else ''}"
    sys.stdout.write(f"{_plan_text(planned, outlook, name, memory, remedies)}\n")
    return 1 if fits is False else 0


def _outlook(planned: Plan, memory: int | None) -> Outlook:
    """The outlook with the windows that the callback will choose, where the user sets no limit for them."""
    outlook = planned.outlook()
    if memory is not None and outlook.most > memory and planned.options.calibration.memory_gib is None:
        _, outlook = _first_that_fits(planned, memory, _smaller_windows(planned)) or ("", outlook)
    return outlook


def _remedies(planned: Plan, memory: int) -> list[str]:
    """Settings with which it would fit, one of each kind."""
    kinds = [_smaller_windows(planned)]
    if not isinstance(planned.strategy, ModelParallelStrategy) and find_spec("deepspeed") is not None:
        kinds += [_other_strategies(planned), _more_ranks(planned)]  # a module of FSDP2 shards itself
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitting = [_first_that_fits(planned, memory, kind) for kind in kinds]
    return [words for words, _ in filter(None, fitting)]


def _first_that_fits(planned: Plan, memory: int, changes: Iterator[_Change]) -> tuple[str, Outlook] | None:
    """The first of the changes with which the training fits, in words, and the outlook with it."""
    for words, change in changes:
        with suppress(MisconfigurationException, ValueError), quiet():  # windows that no longer fit before an event
            outlook = planned.outlook(**change)
            if outlook.most <= memory:
                return words, outlook
    return None


def _smaller_windows(planned: Plan) -> Iterator[_Change]:
    if planned.options.solver.needs_statistics:
        for options in smaller_windows(planned.options, planned.layers):
            yield f"calibration.memory_gib: {options.calibration.memory_gib:g}", {"options": options}


def _other_strategies(planned: Plan) -> Iterator[_Change]:
    now = stage_of(planned.strategy) if isinstance(planned.strategy, DeepSpeedStrategy) else 0
    for stage in (2, 3):
        if planned.ranks > 1 and stage > now:
            yield f"DeepSpeed at stage {stage}", {"strategy": DeepSpeedStrategy(stage=stage)}
    offloaded = DeepSpeedStrategy(stage=3, offload_optimizer=True)
    yield "DeepSpeed at stage 3 with offload_optimizer: true", {"strategy": offloaded}


def _more_ranks(planned: Plan) -> Iterator[_Change]:
    is_sharded = isinstance(planned.strategy, DeepSpeedStrategy)
    strategy = planned.strategy if is_sharded else DeepSpeedStrategy(stage=3)
    with_it = "" if is_sharded else " with DeepSpeed at stage 3"
    for times in (2, 4, 8, 16):
        ranks = times * planned.ranks
        yield f"{ranks} devices in all{with_it}", {"strategy": strategy, "ranks": ranks}


# The table


def _plan_text(planned: Plan, outlook: Outlook, name: str, memory: int | None, remedies: Sequence[str]) -> str:
    """The table for a person, none of its lines longer than 80 characters.

    `name` says how many devices there are. `memory` is that of one. With one of `remedies` the training would fit.
    """
    share = outlook.share
    lines = [outlook.announced, "", f"  {f'each of {name}: {share.strategy}':<50}{'GiB':>14}"]
    parts = {**vars(share.bytes), "other models": outlook.beside}
    for part, size in parts.items():
        if size:
            label = _LABELS.get(part, part) + (" (offloaded)" if part in share.offloaded else "")
            lines.append(f"    {label:<48}{_gib(size):>14}")
    of = "" if memory is None else f" of {_gib(memory)}"
    lines.append(f"  {'in training, and activations come on top':<50}{_gib(outlook.in_training) + of:>14}")
    lines.append(f"  {'at an event, at most':<50}{_gib(max(outlook.at_events)) + of:>14}")
    if share.offloaded:
        elsewhere = sum(getattr(share.bytes, part) for part in share.offloaded)
        lines.append(f"  {'offloaded, to the memory of the CPU or to a disk':<50}{_gib(elsewhere):>14}")
    lines += ["", *_windows(outlook), ""]
    lines.append(f"  a checkpoint  {sized(share.checkpoint)}, of all ranks together")
    if steps_of(planned.trainer) is None:
        lines.append("  steps         not known without the data: --trainer.max_steps says how many")
    elif planned.steps_are_limited:
        lines.append("  steps         at most max_steps: epochs may end it before")
    if memory is not None:
        left = memory - outlook.most
        if left >= 0:
            lines.append(f"  it fits       if activations take no more than {sized(memory - outlook.in_training)}")
        else:
            lines.append(f"  does not fit  {sized(-left)} too much")
            lines += [f"  would fit     {remedy}" for remedy in remedies]
            if not remedies:
                lines.append("  would fit     no single setting that was tried")
    return "\n".join(lines)


def _gib(size: int) -> str:
    return f"{size / _GIB:,.2f}" if size < 10 * _GIB else f"{size / _GIB:,.1f}"


def _windows(outlook: Outlook) -> Iterator[str]:
    """A line for each run of windows that are alike, which says the most memory of them."""
    yield f"  {'step':>6}  {'window':<10}{'layers':>8}{'statistics':>12}{'in all':>10}{'sent':>10}"
    windows = zip(outlook.windows, outlook.estimated.windows, outlook.at_events, strict=True)
    rows: list[tuple[int, tuple[Window, Needs, int]]] = []
    for _, of_step in itertools.groupby(windows, key=lambda row: row[0].event.step):
        rows += enumerate(of_step, 1)

    def alike(row: tuple[int, tuple[Window, Needs, int]]) -> tuple[Any, ...]:
        window, needs, _ = row[1]
        return window.event.step, window.scans, len(window.patterns), _gib(needs.moments), _gib(needs.sent)

    for (step, scans, layers, statistics, sent), group in itertools.groupby(rows, key=alike):
        numbers, alike_windows = zip(*group, strict=True)
        span = f"{numbers[0]} to {numbers[-1]}" if len(numbers) > 1 else f"{numbers[0]}"
        most = _gib(max(size for _, _, size in alike_windows))
        yield f"  {step:>6}  {span:<10}{layers:>8}{statistics:>12}{most:>10}{sent:>10}{'  scan' if scans else ''}"
    yield "  (a window: layers whose statistics are held together; sent: by all ranks; GiB)"
