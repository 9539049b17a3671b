"""Windows: which layers are pruned at which optimizer step, and from which step on their inputs are counted."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

from thanos_lightning.layers.targets import Layer
from thanos_lightning.plan.schedule import Event
from thanos_lightning.solver import Experts, Pattern

# Arguments of the callback that change no window
_BESIDE_THE_PLAN = {
    *("solver.block_size", "solver.damping", "solver.saliency"),
    *("calibration.attention_mask_key", "monitor", "verify_every_n_steps"),
}


def patterns_at(event: Event, final: Mapping[str, Pattern]) -> dict[str, Pattern]:
    """The pattern of each layer at an event, from its final pattern.

    All layers become sparser together: unstructured layers by single weights, N:M layers by rows (the fraction of dense
    rows falls to its final value), structured layers and channels by columns, mixtures by experts. Layers keep their
    order, front to back.
    """
    return {name: pattern.with_sparsity(event.sparsity(pattern.sparsity)) for name, pattern in final.items()}


@dataclass(frozen=True)
class Window:
    """A group of layers whose Hessians are held at the same time, and the steps in which they are held."""

    event: Event
    patterns: Mapping[str, Pattern]  # layer name -> the pattern to prune the layer to, front to back
    start_step: int  # optimizer steps taken when collecting starts; `end_step` if nothing is collected in training
    end_step: int  # optimizer steps taken when the window is pruned
    is_last: bool  # whether this is the event's last window
    scans: bool = False  # whether the window belongs to a sensitivity scan, which prunes nothing
    gradients: bool = False  # whether the loss's gradients at outputs are collected, too, for output weights

    def state(self) -> list[Any]:
        """Plain values that must be unchanged when a training resumes after the window or inside of it."""
        patterns = [[name, repr(pattern)] for name, pattern in self.patterns.items()]
        return [self.start_step, self.end_step, patterns, *(["scans"] if self.scans else [])]


def split_by_memory(layers: Sequence[Layer], budget_gib: float | None) -> list[list[Layer]]:
    """Split layers, front to back, into groups whose second moments fit a budget.

    Layers whose names agree up to their first number, such as those of a decoder layer, stay together where the budget
    allows it, since blocks are trained as a whole; and so do experts of a mixture. Only a forward shows which layers
    share their inputs. So each layer counts in full, which is an upper bound. Without a budget (None), there is one
    group.

    Raises:
        ValueError: If a single layer exceeds the budget. The message names the largest layer and the memory it needs.
    """
    if budget_gib is None:
        return [list(layers)]
    budget = budget_gib * 2**30
    largest = max(layers, key=attrgetter("cols"))
    if (most := _bytes_together([largest])) > budget:
        number = sum(_bytes_together([layer]) > budget for layer in layers)
        others = f" (and of {number - 1} more)" if number > 1 else ""
        raise ValueError(
            f"the Hessian of layer {largest.name}{others} takes {1.005 * most / 2**30:.3g} GiB, rounded up, more than "
            f"memory_gib = {budget_gib}. Raise it to that, or add "
            f"{'such layers' if others else repr(largest.name)} to ignore"
        )
    groups: list[list[Layer]] = [[]]
    size = 0  # bytes of the last group
    parts = _divided(layers, _block_of)
    for finer in (_mixture_of, attrgetter("name")):
        parts = [
            part
            for whole in parts
            for part in ([whole] if _bytes_together(whole) <= budget else _divided(whole, finer))
        ]
    for part in parts:
        if size + _bytes_together(part) > budget and groups[-1]:
            groups.append([])
            size = 0
        groups[-1].extend(part)
        size += _bytes_together(part)
    return groups


def _bytes_together(layers: Sequence[Layer]) -> int:
    """Bytes of the layers' sums in fp32: of each in_features² numbers."""
    return sum(4 * layer.cols**2 for layer in layers)


def _divided(layers: Sequence[Layer], by: Callable[[Layer], str]) -> list[list[Layer]]:
    return [list(part) for _, part in itertools.groupby(layers, key=by)]


def _block_of(layer: Layer) -> str:
    numbered = re.match(r"(.*?\.)?\d+\.", layer.name)
    return numbered.group() if numbered else layer.name


def _mixture_of(layer: Layer) -> str:
    return layer.name if layer.part is None else layer.name.rsplit(".", 2)[0]


def plan_windows(
    work: Sequence[tuple[Event, Mapping[str, Pattern]]],
    layers: Mapping[str, Layer],
    *,
    calibration_steps: int,
    budget_gib: float | None = None,
    since: int = 0,
    scans: bool = False,
    weighs_outputs: bool = False,
) -> list[Window]:
    """Place each event's windows one after the other, so that the last window ends at the event's step.

    A window never reaches back past the previous event, since older statistics belong to weights that are gone. `work`
    has the events in order, each with the patterns of the layers that it prunes, and `since` the optimizer steps of the
    last event before them. `calibration_steps` is 0 if nothing is collected in the training. With `weighs_outputs`,
    gradients are collected in windows in which rows or layers compete for zeros.

    Raises:
        ValueError: If an event has fewer steps before it than windows that collect, or if a layer exceeds the budget.
    """
    windows: list[Window] = []
    before = since
    for event, patterns in work:
        if calibration_steps and not event.step:
            raise ValueError(
                "an event before the first optimizer step has no training batches to prune on: give "
                "calibration.batches (a list of them, or 'datamodule'), or start the schedule later (start_step)"
            )
        groups = split_by_memory([layers[name] for name in patterns], budget_gib)
        _check_together(groups, patterns, budget_gib)
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
            of_group = {layer.name: patterns[layer.name] for layer in group}
            compete = scans or any(pattern.rows_compete for pattern in of_group.values())
            windows.append(
                Window(
                    event=event,
                    patterns=of_group,
                    start_step=end - length,
                    end_step=end,
                    is_last=index == len(groups) - 1,
                    scans=scans,
                    gradients=weighs_outputs and compete,
                )
            )
        before = event.step
    return windows


def _check_together(
    groups: Sequence[Sequence[Layer]], patterns: Mapping[str, Pattern], budget_gib: float | None
) -> None:
    """Refuse to compare experts of a mixture that are not all in one window."""
    window_of: dict[str, int] = {}
    for index, group in enumerate(groups):
        for layer in group:
            mixture = _mixture_of(layer)
            if isinstance(patterns[layer.name], Experts) and window_of.setdefault(mixture, index) != index:
                experts = [other for others in groups for other in others if _mixture_of(other) == mixture]
                needed = _bytes_together(experts)
                raise ValueError(
                    f"all experts of {mixture} are compared, and their Hessians take {1.005 * needed / 2**30:.3g} GiB, "
                    f"rounded up, more than memory_gib = {budget_gib}. Raise it to that"
                )


def check_begun(windows: Sequence[Window], recorded: Sequence[list[Any]], changed: Mapping[str, str]) -> None:
    """Refuse to go on if the first windows of this run are not those that had begun at a checkpoint.

    Masks or sums would belong to other events. `recorded` has each window's `state`, `changed` the callback's arguments
    that have changed, each with a sentence that says how.
    """
    if [window.state() for window in windows] != list(recorded):
        raise MisconfigurationException(
            "this run would prune other layers, or at other steps, than the checkpoint did"
            f"{reasons(changed) or ', though no argument has changed: the model must have'}. "
            "Resume with the settings and the model of the checkpoint, or fit without ckpt_path"
        )


def reasons(changed: Mapping[str, str]) -> str:
    """The changed arguments that can change a window, as the end of an error message."""
    sentences = [sentence for name, sentence in changed.items() if name not in _BESIDE_THE_PLAN]
    return f": {'; '.join(sentences)}" if sentences else ""


def check_ahead(windows: Sequence[Window], optimizer_steps: int) -> None:
    """Refuse a plan whose next window should have begun already. `windows` are those that have not begun."""
    if windows and windows[0].start_step < optimizer_steps:
        raise MisconfigurationException(
            f"the event at optimizer step {windows[0].event.step} needs the steps from {windows[0].start_step} on, but "
            f"the training goes on at step {optimizer_steps}: start the schedule later (start_step), or fit without "
            "ckpt_path"
        )
