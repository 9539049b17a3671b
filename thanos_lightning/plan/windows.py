"""Which layers are pruned at which optimizer step, and from which step on their inputs are counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

from thanos_lightning.models.targets import PrunableLayer
from thanos_lightning.plan.schedule import Event
from thanos_lightning.solver import Pattern

# Arguments of the callback on which no window depends
_BESIDE_THE_PLAN = frozenset(
    (
        *("solver.block_size", "solver.damping", "solver.saliency"),
        *("calibration.attention_mask_key", "monitor", "verify_every_n_steps"),
    )
)


def patterns_at(event: Event, final: Mapping[str, Pattern]) -> dict[str, Pattern]:
    """What each layer is to be pruned to at an event.

    All layers become sparser together: by single weights where they are unstructured, by rows where they are N:M (the
    fraction of dense rows falls to its final value), by columns where they are structured.

    Args:
        event: The event.
        final: Layer name -> its pattern at the end, front to back.

    Examples:
        >>> from thanos_lightning.solver import NM
        >>> patterns_at(Event(10, 0.5), {"a": NM(2, 4)})
        {'a': NM(n=2, m=4, outlier_fraction=0.5)}
    """
    return {name: pattern.with_sparsity(event.sparsity(pattern.sparsity)) for name, pattern in final.items()}


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
        scans: Whether the layers are only looked at, to decide how each will be pruned.
    """

    event: Event
    patterns: Mapping[str, Pattern]
    start_step: int
    end_step: int
    is_last: bool
    scans: bool = False

    def state(self) -> list[Any]:
        """What has to be the same when a checkpoint is resumed behind or inside the window: plain values."""
        patterns = [[name, repr(pattern)] for name, pattern in self.patterns.items()]
        return [self.start_step, self.end_step, patterns, *(["scans"] if self.scans else [])]


def hessian_bytes(layer: PrunableLayer, *, coupled: bool = False) -> int:
    """Memory of a layer's accumulator: in_features² fp32 numbers, and where rows are coupled out_features²."""
    return 4 * (layer.cols**2 + coupled * layer.rows**2)


def split_by_memory(
    layers: Sequence[PrunableLayer], budget_gib: float | None, *, coupled: bool = False
) -> list[list[PrunableLayer]]:
    """Split layers, front to back, into groups whose second moments fit a budget.

    Which layers share their inputs is known only after a forward, so each layer is counted in full: a bound from above.

    Args:
        layers: In their order.
        budget_gib: None for one group.
        coupled: Whether there are second moments of outputs, too.

    Raises:
        ValueError: If layers alone are over the budget, naming the largest and what it takes.
    """
    if budget_gib is None:
        return [list(layers)]
    budget = budget_gib * 2**30
    largest = max(layers, key=lambda layer: hessian_bytes(layer, coupled=coupled))
    if (most := hessian_bytes(largest, coupled=coupled)) > budget:
        what = "second moments of inputs and outputs" if coupled else "Hessian"
        number = sum(hessian_bytes(layer, coupled=coupled) > budget for layer in layers)
        others = f" (and of {number - 1} more)" if number > 1 else ""
        raise ValueError(
            f"the {what} of layer {largest.name}{others}: {1.005 * most / 2**30:.3g} GiB, rounded up, more than "
            f"memory_gib = {budget_gib}. Raise it to that, or add "
            f"{'such layers' if others else repr(largest.name)} to ignore"
        )
    groups: list[list[PrunableLayer]] = [[]]
    held = 0
    for layer in layers:
        needed = hessian_bytes(layer, coupled=coupled)
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
    coupled: bool = False,
    since: int = 0,
    scans: bool = False,
) -> list[Window]:
    """Place each event's windows before its step, one after the other, the last one ending at it.

    A window never reaches back past the event before: its statistics would be those of weights that are gone.

    Args:
        work: Events in order, and what each prunes.
        layers: Name -> layer.
        calibration_steps: Optimizer steps that a window collects, at most; 0 where nothing is collected in training.
        budget_gib: Memory for the Hessians of a window.
        coupled: Whether its rows are coupled, for which second moments of outputs are collected.
        since: Optimizer steps taken at the last event that is not among the work.
        scans: Whether the layers are only looked at.

    Returns:
        The windows in order of time.

    Raises:
        ValueError: If an event has more windows than there are steps before it, or no step at all.
    """
    windows: list[Window] = []
    before = since
    for event, patterns in work:
        if calibration_steps and not event.step:
            raise ValueError(
                "an event before the first optimizer step has no training batches to prune on: give "
                "calibration.batches (a list of them, or 'datamodule'), or start the schedule later (start_step)"
            )
        groups = split_by_memory([layers[name] for name in patterns], budget_gib, coupled=coupled)
        available = event.step - before
        length = min(calibration_steps, available // len(groups))
        if calibration_steps and not length:
            raise ValueError(
                f"the event at optimizer step {event.step} needs statistics from {len(groups)} window(s) of at least "
                f"one step each, but there are {available} since {'the last event' if before else 'the start'}: start "
                "or space the events later (start_step, every_n_steps), raise calibration.memory_gib, or "
                "give calibration.batches"
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
                    scans=scans,
                )
            )
        before = event.step
    return windows


def check_begun(windows: Sequence[Window], recorded: Sequence[list[Any]], changed: Mapping[str, str]) -> None:
    """Hold the windows that a checkpoint has behind it, and the open one, against those of this run.

    Args:
        windows: The first ones of this run's plan.
        recorded: `Window.state` of those that the checkpoint has begun.
        changed: The callback's arguments that are not as they were, each with a sentence that says so.

    Raises:
        MisconfigurationException: If they differ: masks or sums would be taken for those of other events.
    """
    if [window.state() for window in windows] != list(recorded):
        raise MisconfigurationException(
            f"the {len(recorded)} pruning window(s) that have begun are not the first ones of this run"
            f"{reasons(changed) or ', though no argument has changed: the model must have'}. Go on as it was begun, or "
            "fit without ckpt_path"
        )


def reasons(changed: Mapping[str, str]) -> str:
    """Of the arguments that are not as they were those that can change a window, to be added to an error.

    Examples:
        >>> reasons({"monitor": "monitor was None and is 'a'", "pattern": "pattern was NM(2, 4) and is NM(1, 4)"})
        ': pattern was NM(2, 4) and is NM(1, 4)'
    """
    sentences = [sentence for name, sentence in changed.items() if name not in _BESIDE_THE_PLAN]
    return f": {'; '.join(sentences)}" if sentences else ""


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
