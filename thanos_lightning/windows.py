"""Which layers are pruned at which optimizer step, and from which step on their inputs are counted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException

from thanos_lightning.schedule import Event
from thanos_lightning.solver import NM, Pattern
from thanos_lightning.targets import PrunableLayer

# How the sparsity of a model rises from event to event
Progression = Literal["within-layers", "levels", "front-to-back", "back-to-front", "least-loss-first"]
_ROUNDING = 1e-9
# Arguments of the callback on which no window depends
_BESIDE_THE_PLAN = frozenset(
    (
        *("block_size", "damping", "saliency", "attention_mask_key"),
        *("rewarm_steps", "moments", "monitor", "verify_every_n_steps"),
    )
)


def check_progression(progression: Progression, final: Mapping[str, Pattern]) -> None:
    """Refuse a progression that some layer can't take.

    Args:
        progression: Of the model.
        final: Layer -> its pattern; the pattern of all layers has no name.

    Raises:
        ValueError: Naming the layer, where its pattern has no levels.
    """
    if progression == "levels":
        for name, pattern in final.items():
            if not isinstance(pattern, NM) or pattern.m - pattern.n < 2:
                example = " (3:4 would be one, on the way to 2:4)" if not isinstance(pattern, NM) else ""
                where = f" of layer {name}" if name else ""
                raise ValueError(
                    f"progression is 'levels', but the pattern {pattern.name}{where} has no levels before it"
                    f"{example}: choose 'within-layers', or another pattern"
                )


def turns(progression: Progression, final: Mapping[str, Pattern], losses: Mapping[str, float]) -> list[str]:
    """The layers in the order in which they are pruned, where they take turns.

    Args:
        progression: "least-loss-first" reads the losses; "back-to-front" reverses the order of the model.
        final: Layer name -> its pattern at the end, front to back.
        losses: Layer name -> what it loses by that.

    Example:
        >>> turns("least-loss-first", {"a": NM(2, 4), "b": NM(2, 4)}, {"a": 0.2, "b": 0.1})
        ['b', 'a']
    """
    if progression == "least-loss-first":
        return sorted(final, key=lambda name: losses[name])
    return list(final)[::-1] if progression == "back-to-front" else list(final)


def patterns_at(
    event: Event,
    final: Mapping[str, Pattern],
    progression: Progression = "within-layers",
    sizes: Mapping[str, int] | None = None,
    order: Sequence[str] | None = None,
) -> dict[str, Pattern]:
    """What each layer is to be pruned to at an event.

    Args:
        event: The event.
        final: Layer name -> its pattern at the end, front to back.
        progression: "within-layers": all layers become sparser together, by single weights where they are unstructured,
            by rows where they are N:M (the fraction of dense rows falls to its final value), by columns where they are
            structured. The others, but for "levels": layers take turns, each pruned at once to its end.
        sizes: Layer name -> number of weights, by which turns are counted; None counts layers.
        order: The layers in their turns; None is front to back.

    Returns:
        Layer name -> pattern. Layers that are still dense are missing.
    """
    shares = {name: event.sparsity(pattern.sparsity) / pattern.sparsity for name, pattern in final.items()}
    if progression == "within-layers":
        return {name: pattern.with_sparsity(event.sparsity(pattern.sparsity)) for name, pattern in final.items()}
    sizes = sizes or dict.fromkeys(final, 1)
    total, before = sum(sizes[name] for name in final), 0
    begun = set()
    for name in order or list(final):
        if before < shares[name] * total - _ROUNDING * total:
            begun.add(name)
        before += sizes[name]
    return {name: pattern for name, pattern in final.items() if name in begun}


def changes(
    events: Sequence[Event],
    final: Mapping[str, Pattern],
    progression: Progression = "within-layers",
    sizes: Mapping[str, int] | None = None,
    order: Sequence[str] | None = None,
) -> list[tuple[Event, dict[str, Pattern]]]:
    """Each event with the layers that it takes further than the one before; events that change nothing are left out.

    Args:
        events: In order.
        final: Layer name -> its pattern at the end, front to back.
        progression: As for `patterns_at`; or "levels", with which N:M goes through the patterns that keep more, as 3:4
            is on the way to 2:4: to the nearest one to what the event asks for, but past none where there are events
            enough for all.
        sizes: As for `patterns_at`.
        order: As for `patterns_at`.

    Example:
        >>> events = [Event(10, 0.875), Event(20, 1.0)]
        >>> [patterns["a"].name for _, patterns in changes(events, {"a": NM(2, 4)}, "levels")]
        ['3:4', '2:4']
    """
    work = []
    reached: dict[str, Pattern] = {}
    for number, event in enumerate(events, 1):
        if progression == "levels":
            following = len(events) - number
            wanted = {name: _level(event, its, reached.get(name), following) for name, its in final.items()}
        else:
            wanted = patterns_at(event, final, progression, sizes, order)
        changed = {name: pattern for name, pattern in wanted.items() if reached.get(name) != pattern}
        reached.update(changed)
        if changed:
            work.append((event, changed))
    return work


def _level(event: Event, final: Pattern, before: Pattern | None, following: int) -> Pattern:
    """The next level of a layer, with so many events to come."""
    assert isinstance(final, NM), "check_progression comes first"
    assert before is None or isinstance(before, NM)
    most = final.m - final.n
    reached = 0 if before is None else final.m - before.n
    nearest = math.floor(event.sparsity(final.sparsity) / final.sparsity * most + 0.5)
    removed = max(1, reached, min(nearest, reached + 1), most - following)
    return replace(final, n=final.m - removed)


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
        surveys: Whether the layers are only looked at, to decide how each will be pruned.
    """

    event: Event
    patterns: Mapping[str, Pattern]
    start_step: int
    end_step: int
    is_last: bool
    surveys: bool = False

    def state(self) -> list[Any]:
        """What has to be the same when a checkpoint is resumed behind or inside the window: plain values."""
        patterns = [[name, repr(pattern)] for name, pattern in self.patterns.items()]
        return [self.start_step, self.end_step, patterns, *(["surveys"] if self.surveys else [])]


def hessian_bytes(layer: PrunableLayer, *, joined: bool = False) -> int:
    """Memory of a layer's accumulator: in_features² fp32 numbers, and where rows are joined out_features²."""
    return 4 * (layer.cols**2 + joined * layer.rows**2)


def split_by_memory(
    layers: Sequence[PrunableLayer], budget_gib: float | None, *, joined: bool = False
) -> list[list[PrunableLayer]]:
    """Split layers, front to back, into groups whose second moments fit a budget.

    Which layers share their inputs is known only after a forward, so each layer is counted in full: a bound from above.

    Args:
        layers: In their order.
        budget_gib: None for one group.
        joined: Whether there are second moments of outputs, too.

    Raises:
        ValueError: If layers alone are over the budget, naming the largest and what it takes.
    """
    if budget_gib is None:
        return [list(layers)]
    budget = budget_gib * 2**30
    largest = max(layers, key=lambda layer: hessian_bytes(layer, joined=joined))
    if (most := hessian_bytes(largest, joined=joined)) > budget:
        what = "second moments of inputs and outputs" if joined else "Hessian"
        number = sum(hessian_bytes(layer, joined=joined) > budget for layer in layers)
        others = f" (and of {number - 1} more)" if number > 1 else ""
        raise ValueError(
            f"the {what} of layer {largest.name}{others}: {1.005 * most / 2**30:.3g} GiB, rounded up, more than "
            f"hessian_memory_gib = {budget_gib}. Raise it to that, or add "
            f"{'such layers' if others else repr(largest.name)} to ignore"
        )
    groups: list[list[PrunableLayer]] = [[]]
    held = 0
    for layer in layers:
        needed = hessian_bytes(layer, joined=joined)
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
    joined: bool = False,
    since: int = 0,
    surveys: bool = False,
) -> list[Window]:
    """Place each event's windows before its step, one after the other, the last one ending at it.

    A window never reaches back past the event before: its statistics would be those of weights that are gone.

    Args:
        work: Events in order, and what each prunes.
        layers: Name -> layer.
        calibration_steps: Optimizer steps that a window collects, at most; 0 where nothing is collected in training.
        budget_gib: Memory for the Hessians of a window.
        joined: Whether its rows are joined, for which second moments of outputs are collected.
        since: Optimizer steps taken at the last event that is not among the work.
        surveys: Whether the layers are only looked at.

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
                "an event before the first optimizer step has no training batches to prune on: give a "
                "calibration_dataloader (a list of batches, or 'datamodule'), or start the schedule later (start_step)"
            )
        groups = split_by_memory([layers[name] for name in patterns], budget_gib, joined=joined)
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
                    surveys=surveys,
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

    Example:
        >>> reasons({"damping": "damping was 0.01 and is 0.1", "pattern": "pattern was NM(2, 4) and is NM(1, 4)"})
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
