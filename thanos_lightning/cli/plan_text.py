"""What the command plan prints."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from thanos_lightning.events.announce import sized
from thanos_lightning.events.estimate import Needs
from thanos_lightning.plan.training_steps import steps_of
from thanos_lightning.plan.windows import Window

if TYPE_CHECKING:
    from thanos_lightning.cli.planned import Outlook, Plan

GIB = 2**30
_LABELS = {"copies": "copies of weights, for a forward", "passing": "gradients on their way"}


def plan_text(planned: Plan, outlook: Outlook, name: str, memory: int | None, remedies: Sequence[str]) -> str:
    """The table for a person, none of its lines longer than 80 characters.

    `name` says how many devices there are. `memory` is that of one. With one of `remedies` the training would fit.
    """
    share = outlook.share
    lines = [outlook.announced, "", f"  {f'each of {name}: {share.strategy}':<50}{'GiB':>14}"]
    parts = {**vars(share.held), "other models": outlook.beside}
    for part, size in parts.items():
        if size:
            label = _LABELS.get(part, part) + (" (offloaded)" if part in share.offloaded else "")
            lines.append(f"    {label:<48}{_gib(size):>14}")
    of = "" if memory is None else f" of {_gib(memory)}"
    lines.append(f"  {'in training, and activations come on top':<50}{_gib(outlook.in_training) + of:>14}")
    lines.append(f"  {'at an event, at most':<50}{_gib(max(outlook.at_events)) + of:>14}")
    if share.offloaded:
        elsewhere = sum(getattr(share.held, part) for part in share.offloaded)
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
    return f"{size / GIB:,.2f}" if size < 10 * GIB else f"{size / GIB:,.1f}"


def _windows(outlook: Outlook) -> Iterator[str]:
    """A line for each run of windows that are alike, which says the most memory of them."""
    yield f"  {'step':>6}  {'window':<10}{'layers':>8}{'statistics':>12}{'in all':>10}{'sent':>10}"
    rows = []
    for _, of_step in itertools.groupby(
        zip(outlook.windows, outlook.estimated.windows, outlook.at_events, strict=True),
        key=lambda row: row[0].event.step,
    ):
        rows += list(enumerate(of_step, 1))

    def alike(row: tuple[int, tuple[Window, Needs, int]]) -> tuple[Any, ...]:
        window, one, _ = row[1]
        return window.event.step, window.scans, len(window.patterns), _gib(one.moments), _gib(one.sent)

    for (step, scans, layers, statistics, sent), group in itertools.groupby(rows, key=alike):
        numbers, those = zip(*group, strict=True)
        span = f"{numbers[0]} to {numbers[-1]}" if len(numbers) > 1 else f"{numbers[0]}"
        most = _gib(max(size for _, _, size in those))
        yield f"  {step:>6}  {span:<10}{layers:>8}{statistics:>12}{most:>10}{sent:>10}{'  scan' if scans else ''}"
