"""Which layers are pruned at which optimizer step, and from which step on their inputs are counted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException

from thanos_lightning.schedule import Event
from thanos_lightning.solver import NM, Pattern
from thanos_lightning.targets import PrunableLayer

GradualNM = Literal["rows", "layers"]


def patterns_at(event: Event, final: Mapping[str, Pattern], gradual_nm: GradualNM) -> dict[str, Pattern]:
    """What each layer is to be pruned to at an event.

    Args:
        event: The event.
        final: Layer name -> its pattern at the end, front to back.
        gradual_nm: How N:M patterns become sparser: "rows" lowers the fraction of dense rows to its final value,
            "layers" prunes more and more layers, front to back, at once to the end.

    Returns:
        Layer name -> pattern. Layers that are still dense are missing.
    """
    patterns: dict[str, Pattern] = {}
    nm_layers = [name for name, pattern in final.items() if isinstance(pattern, NM)]
    for name, pattern in final.items():
        sparsity = event.sparsity(pattern.sparsity)
        if gradual_nm == "layers" and isinstance(pattern, NM):
            if nm_layers.index(name) < math.ceil(sparsity / pattern.sparsity * len(nm_layers)):
                patterns[name] = pattern
        else:
            patterns[name] = pattern.with_sparsity(sparsity)
    return patterns


def changes(
    events: Sequence[Event], final: Mapping[str, Pattern], gradual_nm: GradualNM
) -> list[tuple[Event, dict[str, Pattern]]]:
    """Each event with the layers that it takes further than the one before; events that change nothing are left out."""
    work = []
    reached: dict[str, Pattern] = {}
    for event in events:
        wanted = patterns_at(event, final, gradual_nm)
        changed = {name: pattern for name, pattern in wanted.items() if reached.get(name) != pattern}
        reached.update(changed)
        if changed:
            work.append((event, changed))
    return work


@dataclass(frozen=True)
class Window:
    """The layers whose Hessians are held at one time, and when.

    Attributes:
        event: The event that the window belongs to.
        patterns: Layer name -> what to prune the layer to, front to back.
        start_step: Optimizer steps taken when collecting starts. Equal to `end_step` where nothing is collected from
            training batches.
        end_step: Optimizer steps taken when the window is pruned.
        is_last: Whether the event is complete after it.
    """

    event: Event
    patterns: Mapping[str, Pattern]
    start_step: int
    end_step: int
    is_last: bool

    def state(self) -> list[Any]:
        """What has to be the same when a checkpoint is resumed behind or inside the window: plain values."""
        return [self.start_step, self.end_step, [[name, repr(pattern)] for name, pattern in self.patterns.items()]]


def hessian_bytes(layer: PrunableLayer) -> int:
    """Memory of a layer's accumulator: in_features² fp32 numbers."""
    return 4 * layer.cols**2


def split_by_memory(layers: Sequence[PrunableLayer], budget_gib: float | None) -> list[list[PrunableLayer]]:
    """Split layers, front to back, into groups whose Hessians fit a budget.

    Which layers share their inputs is known only after a forward, so each layer is counted in full: a bound from above.

    Raises:
        ValueError: If one layer alone is over the budget, naming it and what it takes.
    """
    if budget_gib is None:
        return [list(layers)]
    budget = budget_gib * 2**30
    groups: list[list[PrunableLayer]] = [[]]
    held = 0
    for layer in layers:
        needed = hessian_bytes(layer)
        if needed > budget:
            raise ValueError(
                f"the Hessian of layer {layer.name} takes {needed / 2**30:.3g} GiB, more than hessian_memory_gib = "
                f"{budget_gib}: raise it, or add {layer.name!r} to ignore"
            )
        if held + needed > budget and groups[-1]:
            groups.append([])
            held = 0
        groups[-1].append(layer)
        held += needed
    return groups


def plan_windows(
    work: Sequence[tuple[Event, Mapping[str, Pattern]]],
    layers: Mapping[str, PrunableLayer],
    *,
    calibration_steps: int,
    budget_gib: float | None = None,
) -> list[Window]:
    """Place each event's windows before its step, one after the other, the last one ending at it.

    A window never reaches back past the event before: its statistics would be those of weights that are gone.

    Args:
        work: Events in order, and what each prunes.
        layers: Name -> layer.
        calibration_steps: Optimizer steps that a window collects, at most; 0 where nothing is collected in training.
        budget_gib: Memory for the Hessians of a window.

    Returns:
        The windows in order of time.

    Raises:
        ValueError: If an event has more windows than there are steps before it.
    """
    windows: list[Window] = []
    before = 0
    for event, patterns in work:
        groups = split_by_memory([layers[name] for name in patterns], budget_gib)
        available = event.step - before
        length = min(calibration_steps, available // len(groups))
        if calibration_steps and not length:
            raise ValueError(
                f"the event at optimizer step {event.step} needs statistics from {len(groups)} window(s) of at least "
                f"one step each, but there are {available} since {'the last event' if before else 'the start'}: start "
                "or space the events later (start_step, every_n_steps), raise hessian_memory_gib, or give a "
                "calibration_dataloader"
            )
        for index, group in enumerate(groups):
            end = event.step - (len(groups) - 1 - index) * length
            windows.append(
                Window(
                    event=event,
                    patterns={layer.name: patterns[layer.name] for layer in group},
                    start_step=end - length,
                    end_step=end,
                    is_last=index == len(groups) - 1,
                )
            )
        before = event.step
    return windows


def check_begun(windows: Sequence[Window], recorded: Sequence[list[Any]]) -> None:
    """Hold the windows that a checkpoint has behind it, and the open one, against those of this run.

    Args:
        windows: The first ones of this run's plan.
        recorded: `Window.state` of those that the checkpoint has begun.

    Raises:
        MisconfigurationException: If they differ: masks or sums would be taken for those of other events.
    """
    if [window.state() for window in windows] != list(recorded):
        raise MisconfigurationException(
            f"the {len(recorded)} pruning window(s) that the checkpoint has begun are not the first ones of this run: "
            "resume with the schedule, patterns, targets, calibration_steps and hessian_memory_gib that it was trained "
            "with, and the same max_steps where the schedule has fractions"
        )


def check_ahead(windows: Sequence[Window], optimizer_steps: int) -> None:
    """Refuse a next window that should have begun already.

    Args:
        windows: Those that have not begun.
        optimizer_steps: Taken so far.

    Raises:
        MisconfigurationException: Naming the event.
    """
    if windows and windows[0].start_step < optimizer_steps:
        raise MisconfigurationException(
            f"the event at optimizer step {windows[0].event.step} needs the steps from {windows[0].start_step} on, but "
            f"the training goes on at step {optimizer_steps}: start the schedule later (start_step), or fit without "
            "ckpt_path"
        )
