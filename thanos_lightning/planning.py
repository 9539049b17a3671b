"""All windows of a training: from its schedule, its layers, and what a survey found out about them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from thanos_lightning.allocation import Allocation
from thanos_lightning.arguments import CALIBRATION_STEPS
from thanos_lightning.schedule import Event, SparsitySchedule
from thanos_lightning.sharding import ParameterAccess
from thanos_lightning.solver import NM, Pattern
from thanos_lightning.surveying import LayerSurvey, allocate, levels, sparsest
from thanos_lightning.targets import PrunableLayer
from thanos_lightning.windows import Window, patterns_at, plan_windows, split_by_memory


def check_allocation(pattern: Pattern) -> None:
    """Refuse an allocation that can't be met.

    Raises:
        ValueError: Naming what leaves nothing to allocate.
    """
    if isinstance(pattern, NM) and not pattern.outlier_fraction:
        raise ValueError(
            f"{pattern.name} in all rows of all layers leaves nothing to allocate: give the outlier_fraction of the "
            "rows of all layers together that are to stay dense"
        )
    if pattern.sparsity >= (most := sparsest(pattern).sparsity):
        raise ValueError(
            f"a sparsity of {pattern.sparsity} leaves nothing to allocate, since no layer is looked at beyond "
            f"{most:g}: leave the allocation out, or ask for less"
        )


def default_allocation(pattern: Pattern) -> Allocation | None:
    """By loss; None where there is nothing to allocate.

    Examples:
        >>> from thanos_lightning.solver import Unstructured
        >>> default_allocation(Unstructured(0.6)), default_allocation(NM(2, 4))
        (Allocation(by='loss'), None)
    """
    try:
        check_allocation(pattern)
    except ValueError:
        return None
    return Allocation("loss")


@dataclass(frozen=True)
class Planner:
    """Plans the windows of a training.

    Attributes:
        pattern: The main pattern, whose layers share an allocation.
        schedule: When, and how sparse by then.
        allocation: Of unequal sparsities; None for layers that are alike.
        gives_way: Whether the allocation is the default, which nobody asked for: it leaves out layers of which it is
            not known what they lose, and all where there is no room to look at them.
        calibration_steps: Optimizer steps that a window collects, at most; 0 where none collects in the training.
        memory_gib: For the Hessians of a window; None holds all at once.
        joins_rows: Whether second moments of outputs are among them.
    """

    pattern: Pattern
    schedule: SparsitySchedule
    allocation: Allocation | None
    gives_way: bool
    calibration_steps: int
    memory_gib: float | None
    joins_rows: bool = False

    @property
    def needs_survey(self) -> bool:
        """Whether there is no way to go on without one."""
        return self.allocation is not None and not self.gives_way

    def to_survey(self, final: Mapping[str, Pattern]) -> dict[str, list[Pattern]]:
        """What each layer is tried at before the first event.

        Args:
            final: Name -> the pattern at the end, where all are alike.
        """
        if self.allocation is None or self.allocation.by != "loss":
            return {name: [pattern] for name, pattern in final.items()}
        shared = levels(self.pattern, *self.allocation.limits(self.pattern.sparsity))
        return {name: shared if pattern == self.pattern else [pattern] for name, pattern in final.items()}

    def plan(
        self,
        trainer: Trainer,
        layers: Mapping[str, PrunableLayer],
        final: Mapping[str, Pattern],
        surveys: Mapping[str, LayerSurvey],
        *,
        optimizer_steps: int,
        begun_with_survey: bool | None,
    ) -> list[Window]:
        """All windows, as far as they are known: those behind a survey follow when it is complete.

        Args:
            trainer: Knows how long it trains.
            layers: Name -> layer, front to back.
            final: Name -> the pattern at the end, where all are alike.
            surveys: Name -> what has been found out.
            optimizer_steps: Taken so far.
            begun_with_survey: Whether the first window that a resumed training has begun is one of a survey; None
                where none has begun.

        Raises:
            MisconfigurationException: If nothing would be pruned, fractions of the training can't be told, or there is
                no room for a survey that is needed.
            ValueError: If windows don't fit before their events.
        """
        events = events_in(self.schedule, trainer)
        if self.allocation is None:
            return self._plan_pruning(events, layers, final)
        first, collects = events[0].step, self.calibration_steps > 0
        needed = len(split_by_memory(list(layers.values()), self.memory_gib, joined=self.joins_rows))
        # Where all is held at once, the first event takes what its survey was told.
        at_once = self.memory_gib is None
        step = first if at_once else first - min(first // 2, needed * self.calibration_steps)
        has_room = step >= needed and (at_once or first - step >= needed)
        since = 0 if at_once else step
        if collects and not has_room:
            if not self.needs_survey or trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by a connector
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
        survey = plan_windows(
            [(Event(step, 0.0), final)],
            layers,
            calibration_steps=self.calibration_steps,
            budget_gib=self.memory_gib,
            joined=self.joins_rows,
            surveys=True,
        )
        begins_with_it = bool(surveys) or survey[0].start_step >= optimizer_steps
        if not self.needs_survey and not (begins_with_it if begun_with_survey is None else begun_with_survey):
            rank_zero_info("the training goes on too late to look at the layers before the first event: all are alike")
            return self._plan_pruning(events, layers, final)
        if len(surveys) < len(layers):
            # refuses what can't be before the training
            self._plan_pruning(events, layers, final, since=since)
            return survey
        final = self._allocate(self.allocation, layers, final, surveys)
        return [*survey, *self._plan_pruning(events, layers, final, since=since)]

    def _allocate(
        self,
        allocation: Allocation,
        layers: Mapping[str, PrunableLayer],
        final: Mapping[str, Pattern],
        surveys: Mapping[str, LayerSurvey],
    ) -> Mapping[str, Pattern]:
        unknown = [
            name
            for name, pattern in final.items()
            if pattern == self.pattern
            and (not surveys[name].losses or (self.gives_way and surveys[name].weighted_losses is None))
        ]
        if unknown:
            rank_zero_warn(
                f"it is not known what {len(unknown)} layer(s), such as {unknown[0]}, would lose, since no token, or "
                f"no gradient, has reached them: each is pruned to {self.pattern.sparsity:.2%}, and only layers of "
                "which it is known share their zeros. allocation='uniform' is without this warning"
            )
        known = {name: pattern for name, pattern in final.items() if name not in unknown}
        allocated = allocate(allocation, surveys, layers, known, self.pattern)
        return {
            name: final[name] if name in unknown else allocated[name]
            for name in final
            if name in unknown or name in allocated  # others stay dense
        }

    def _plan_pruning(
        self,
        events: list[Event],
        layers: Mapping[str, PrunableLayer],
        final: Mapping[str, Pattern],
        since: int = 0,
    ) -> list[Window]:
        windows = plan_windows(
            [(event, patterns_at(event, final)) for event in events],
            layers,
            calibration_steps=self.calibration_steps,
            budget_gib=self.memory_gib,
            joined=self.joins_rows,
            since=since,
        )
        steps = min((window.end_step - window.start_step for window in windows), default=0)
        if steps < self.calibration_steps != CALIBRATION_STEPS:
            rank_zero_info(
                f"calibration.steps is {self.calibration_steps}, but some windows have only {steps} optimizer step(s) "
                "since the event before"
            )
        return windows


def check_trained(trainer: Trainer) -> None:
    """Refuse a fit that ended before its first step, which Lightning ends without a word.

    Raises:
        MisconfigurationException: Naming what left nothing to train.
    """
    if trainer.global_step > 0:  # a finished training was resumed
        return
    if trainer.fit_loop.max_batches == 0:
        raise MisconfigurationException(
            "the training dataloader has no batch, so nothing was trained or pruned: give one that isn't empty"
        )
    for name in ("limit_train_batches", "max_steps", "max_epochs"):
        if getattr(trainer, name) == 0:
            raise MisconfigurationException(f"{name} is 0, so nothing was trained or pruned: raise it")


def events_in(schedule: SparsitySchedule, trainer: Trainer) -> list[Event]:
    """The events of a schedule in a Trainer's training, which may be shorter than the schedule: warns where it is.

    Raises:
        MisconfigurationException: If nothing would be pruned, or fractions of the training can't be told.
    """
    events, total = scheduled_events(schedule, trainer), steps_of(trainer)
    if trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by a connector
        rank_zero_info(f"fast_dev_run: everything is pruned at once, at optimizer step {total}")
    if total is None:
        return events
    inside = [event for event in events if event.step <= total]
    if not inside:
        raise MisconfigurationException(
            f"the schedule's first event is at optimizer step {events[0].step}, but the training has {total} "
            "steps: nothing would be pruned. Start the schedule earlier (start_step) or raise max_steps"
        )
    if inside[-1].step >= total and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        which = "the schedule's last event" if len(inside) == len(events) else "the last event of the training"
        rank_zero_warn(
            f"{which} is at optimizer step {inside[-1].step}, the last of the training: no step is "
            "left in which the model could recover. End the schedule earlier (end_step) or raise max_steps"
        )
    if len(inside) < len(events):
        rank_zero_warn(
            f"the schedule's last event is at optimizer step {events[-1].step}, but the training has {total} "
            "steps: the final sparsity will not be reached"
        )
    return events


def steps_of(trainer: Trainer) -> int | None:
    """Optimizer steps of a Trainer's training; None where they can't be told."""
    total = trainer.estimated_stepping_batches
    return int(total) if math.isfinite(total) and total > 0 else None


def check_steps(trainer: Trainer, access: ParameterAccess) -> None:
    """Refuse ranks whose trainings differ in length, of which the longer would wait for the others. All must call it.

    Raises:
        MisconfigurationException: On all ranks, with the numbers.
    """
    steps = access.gather(steps_of(trainer))
    other = next((rank for rank, number in enumerate(steps) if number != steps[0]), None)
    if other is not None:
        raise MisconfigurationException(
            f"rank 0 has {steps[0]} optimizer steps to train and rank {other} has {steps[other]}: give all ranks as "
            "many training batches (a DistributedSampler, drop_last), or set the Trainer's max_steps and max_epochs=-1"
        )


def scheduled_events(schedule: SparsitySchedule, trainer: Trainer) -> list[Event]:
    """The events of a schedule, which may lie beyond a Trainer's training.

    Raises:
        MisconfigurationException: If fractions of the training can't be told.
    """
    total = steps_of(trainer)
    if trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by a connector
        assert total is not None, "it is short"
        schedule = SparsitySchedule(at=[total])
    if schedule.has_fractions:
        if total is None:
            raise MisconfigurationException(
                "the schedule has fractions of the training, but the number of optimizer steps is not known: set the "
                "Trainer's max_steps, or give the schedule in optimizer steps (whole numbers)"
            )
        if not trainer.lightning_module.automatic_optimization:
            raise MisconfigurationException(
                "the schedule has fractions of the training, but under manual optimization the number of optimizer "
                "steps is not known: give the schedule in optimizer steps (whole numbers)"
            )
        schedule = schedule.resolve(total)
    return schedule.events()
