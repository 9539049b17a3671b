"""Plans all windows of a training from the schedule, the layers and the results of the sensitivity scan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from thanos_lightning.layers.targets import Layer
from thanos_lightning.plan.allocation import Allocation, LayerSensitivity, allocate, levels, nothing_to_allocate
from thanos_lightning.plan.options import CALIBRATION_STEPS, PruningOptions
from thanos_lightning.plan.schedule import Event, SparsitySchedule, checked_events
from thanos_lightning.plan.windows import Window, patterns_at, plan_windows, split_by_memory
from thanos_lightning.solver import Pattern

_NO_GRADIENTS = (
    "under ZeRO-3 there are no gradients on calibration.batches where DeepSpeed gathers modules as a whole, such as "
    "mixtures of experts (leaf_module in its configuration)"
)


@dataclass(frozen=True)
class Planner:
    """Plans the windows of a training.

    Raises:
        MisconfigurationException: If output weights ask for gradients where there are none.
    """

    options: PruningOptions
    schedule: SparsitySchedule  # that of the options, or the one that a resumed training began with
    can_differentiate: bool = True  # as of `ParameterAccess`

    def __post_init__(self) -> None:
        if self.lacks_gradients and self.options.calibration.output_weights == "diagonal":
            raise MisconfigurationException(
                f"calibration.output_weights is 'diagonal', but {_NO_GRADIENTS}: leave the batches out to use the "
                "training's gradients, or take 'uniform'"
            )

    @property
    def lacks_gradients(self) -> bool:
        """Whether there are no gradients on the calibration set, as under some ways of sharding."""
        return self.options.calibration.batches is not None and not self.can_differentiate

    @property
    def allocates(self) -> bool:
        """Whether layers get unequal sparsities, by a sensitivity scan.

        The default leaves out layers whose losses are unknown, and gives way if no steps are left for a scan.
        """
        options = self.options
        by_default = options.allocation is None and options.weighs_outputs and not self.lacks_gradients
        return self.needs_scan or (by_default and nothing_to_allocate(options.pattern) is None)

    @property
    def needs_scan(self) -> bool:
        """Whether the training can't run without a sensitivity scan, because the user chose the allocation."""
        return self.options.allocation == Allocation("loss")

    def to_try(self, final: Mapping[str, Pattern]) -> dict[str, list[Pattern]]:
        """The patterns whose losses the scan computes for each layer, from the final ones before the allocation."""
        shared = self.options.pattern
        return {name: levels(pattern) if pattern == shared else [pattern] for name, pattern in final.items()}

    def plan(
        self,
        trainer: Trainer,
        layers: Mapping[str, Layer],
        final: Mapping[str, Pattern],
        sensitivities: Mapping[str, LayerSensitivity] | None,
        *,
        optimizer_steps: int = 0,
        begun_with_scan: bool | None = None,
    ) -> list[Window]:
        """All windows that are known so far. Until a sensitivity scan is complete, these are only its windows.

        The layers come front to back, and `final` has the pattern of each before the allocation. `sensitivities` has
        the scan's result for layers that were scanned already. It is None if there will be no training: then the
        windows after a scan are planned as if it found all layers alike. `begun_with_scan` says whether a resumed
        training began with a window of a scan; None if no window has begun.

        Raises:
            MisconfigurationException: If nothing would be pruned, if the length of the training is needed but unknown,
                or if too few steps are left for a scan that is needed.
            ValueError: If windows do not fit before their events.
        """
        events = checked_events(self.schedule, trainer)
        if not self.allocates:
            return self._plan_pruning(events, layers, final)
        first, calibration = events[0].step, self.options.calibration
        needed = len(split_by_memory(list(layers.values()), calibration.memory_gib))
        # If all moments are held at once, the first event reuses those of the scan
        at_once = calibration.memory_gib is None
        step = first if at_once else first - min(first // 2, needed * self._steps)
        has_room = step >= needed and (at_once or first - step >= needed)
        since = 0 if at_once else step
        if self._steps and not has_room:
            if not self.needs_scan or trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by a connector
                rank_zero_info(
                    f"{first} optimizer step(s) are too few to look at the layers before the first event: all are "
                    "pruned alike"
                )
                return self._plan_pruning(events, layers, final)
            at_its_step = "" if at_once or not first else "look at all with the event (no calibration.memory_gib), "
            raise MisconfigurationException(
                f"the first event is at optimizer step {first}, which leaves too few to look at the layers before, in "
                f"{needed} window(s): start the schedule later (start_step), {at_its_step}give "
                "calibration.batches, or leave the allocation out"
            )
        scan = self._placed([(Event(step, 0.0), final)], layers, scans=True)
        begins_with_it = bool(sensitivities) or scan[0].start_step >= optimizer_steps
        if not self.needs_scan and not (begins_with_it if begun_with_scan is None else begun_with_scan):
            rank_zero_info("the training goes on too late to look at the layers before the first event: all are alike")
            return self._plan_pruning(events, layers, final)
        if sensitivities is None or len(sensitivities) < len(layers):
            # Planned in any case, to raise before the training if the windows after the scan do not fit
            alike = self._plan_pruning(events, layers, final, since=since)
            return scan if sensitivities is not None else [*scan, *alike]
        final = self._allocate(layers, final, sensitivities)
        return [*scan, *self._plan_pruning(events, layers, final, since=since)]

    def _allocate(
        self, layers: Mapping[str, Layer], final: Mapping[str, Pattern], sensitivities: Mapping[str, LayerSensitivity]
    ) -> Mapping[str, Pattern]:
        unknown = [
            name
            for name, pattern in final.items()
            if pattern == self.options.pattern
            and (not sensitivities[name].losses or not (self.needs_scan or sensitivities[name].weighted_losses))
        ]
        if unknown:
            rank_zero_warn(
                f"it is not known what {len(unknown)} layer(s), such as {unknown[0]}, would lose, since no token, or "
                f"no gradient, has reached them: each is pruned to {self.options.pattern.sparsity:.2%}, and only "
                "layers of which it is known share their zeros. Allocation('uniform') is without this warning"
            )
        return allocate(sensitivities, layers, final, self.options.pattern, unknown)

    def _plan_pruning(
        self, events: list[Event], layers: Mapping[str, Layer], final: Mapping[str, Pattern], since: int = 0
    ) -> list[Window]:
        windows = self._placed([(event, patterns_at(event, final)) for event in events], layers, since=since)
        steps = min((window.end_step - window.start_step for window in windows), default=0)
        if steps < self._steps != CALIBRATION_STEPS:
            rank_zero_info(
                f"calibration.steps is {self._steps}, but some windows have only {steps} optimizer step(s) since the "
                "event before"
            )
        return windows

    @property
    def _steps(self) -> int:
        """Most optimizer steps that a window collects; 0 if windows collect nothing in the training."""
        return self.options.calibration.steps if self.options.collects_in_training else 0

    def _placed(
        self, work: list[tuple[Event, Mapping[str, Pattern]]], layers: Mapping[str, Layer], **others: Any
    ) -> list[Window]:
        """Call `plan_windows`, and leave out gradients where there are none."""
        windows = plan_windows(
            work,
            layers,
            calibration_steps=self._steps,
            budget_gib=self.options.calibration.memory_gib,
            weighs_outputs=self.options.weighs_outputs,
            **others,
        )
        if not self.lacks_gradients or not any(window.gradients for window in windows):
            return windows
        rank_zero_warn(
            f"{_NO_GRADIENTS}: errors at all outputs count alike, and layers are pruned alike unless allocation.by is "
            "'loss'. Leave the batches out to use the training's gradients"
        )
        return [replace(window, gradients=False) for window in windows]
