"""Maps optimizer steps to sparsities, by pure functions of numbers.

A schedule names the optimizer steps at which layers are pruned (its events), and the sparsity at each event. When the
fraction x of the schedule is over, an event prunes a layer of final sparsity s_f to the sparsity

    s = s_f · (1 - (1 - x)³)

which is equation 1 of Zhu and Gupta (arXiv 1710.01878) for a dense start. windows.py may divide an event into several
windows; on training batches all but the last are pruned before the event's step. `PruningRun` in fit/run.py counts the
steps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

# Means int | float. But typing caches one Union for both orders of its members: if another package used float | int
# first, jsonargparse would read 8 as 8.0, which is no number of steps. With Any, a number keeps its YAML type.
Time = Any


@dataclass(frozen=True)
class Event:
    """One pruning at one optimizer step."""

    step: int  # number of optimizer steps taken when the event happens
    progress: float  # the fraction of the final sparsity, in (0, 1]

    def sparsity(self, final: float) -> float:
        """The sparsity of a layer after the event, if its final sparsity is `final`."""
        return final * self.progress


@dataclass(frozen=True)
class SparsitySchedule:
    """When to prune, and to which sparsity.

    Times are optimizer steps, never batches: an int is a number of steps, a float below 1 a fraction of the training.
    `at` lists the times of all events. Alternatively, events follow `start_step` every `every_n_steps` steps, until
    `end_step`. If `start_step` and `end_step` are equal, there is one event.

    Args:
        start_step: Time at which the sparsity begins to rise.
        end_step: Time of the last event, at which the final sparsity is reached.
        every_n_steps: Distance between events, at least one step.
        at: The time of each event, in place of the three times above. At event k of n, the fraction k/n of the schedule
            is over.

    Raises:
        ValueError: If a number is negative or not finite, a fraction is 1 or more, times do not rise, or both kinds of
            times or neither are given.

    Examples:
        >>> schedule = SparsitySchedule(start_step=0, end_step=20, every_n_steps=10)
        >>> [(event.step, event.sparsity(final=0.5)) for event in schedule.events()]
        [(10, 0.4375), (20, 0.5)]
        >>> SparsitySchedule(at=[10, 20]).events() == schedule.events()
        True
    """

    start_step: Time = None
    end_step: Time = None
    every_n_steps: Time = None
    at: Sequence[Time] | None = None

    def __post_init__(self) -> None:
        three, mend = ("start_step", "end_step", "every_n_steps"), "give start_step, end_step and every_n_steps, or at"
        given = [name for name in three if getattr(self, name) is not None]
        if self.at is None:
            if missing := [name for name in three if name not in given]:
                raise ValueError(f"{missing[0]} is missing: {mend}")
            for name in three:
                _check_time(name, getattr(self, name))
            if self.every_n_steps == 0:
                raise ValueError("every_n_steps is 0: give at least one optimizer step between events")
        else:
            if given:
                raise ValueError(f"at and {given[0]} are given, but either places all events: {mend} alone")
            if isinstance(self.at, str) or not isinstance(self.at, Sequence) or not self.at:
                raise ValueError(f"at is {self.at!r}: give a list of times, such as [0.1, 0.2]")
            for time in self.at:
                _check_time("a time of at", time)
            object.__setattr__(self, "at", tuple(self.at))  # unlike a list, a tuple is immutable and hashable
        times = self._times
        if len({isinstance(time, float) for time in times}) == 1:  # else resolve() checks the order
            self._check_order(times)

    @property
    def _times(self) -> tuple[int | float, ...]:
        """The times that must rise."""
        return (self.start_step, self.end_step) if self.at is None else tuple(self.at)

    def _check_order(self, times: Sequence[int | float]) -> None:
        if self.at is not None and any(later <= before for before, later in itertools.pairwise(times)):
            raise ValueError(f"at is {list(self.at)}: give times that rise, such as [0.1, 0.2]")
        if self.at is None and times[1] < times[0]:
            raise ValueError(
                f"the schedule ends at end_step {times[1]}, before it starts at start_step {times[0]}: "
                "give an end_step that is not smaller"
            )

    @property
    def has_fractions(self) -> bool:
        """Whether the length of the training must be known to place the events."""
        return any(isinstance(time, float) for time in (*self._times, self.every_n_steps))

    @property
    def begins_at_once(self) -> bool:
        """Whether the first event is before the first step, however long the training is."""
        first, last = self._times[0], self._times[-1]
        return first == 0 and (self.at is not None or last == 0)

    def resolve(self, total_steps: int) -> SparsitySchedule:
        """The same schedule in whole optimizer steps, for a training of `total_steps` optimizer steps.

        Rounding never adds an event, and never moves a time of `at` before the first step. It may remove an event if
        events are only a few steps apart: SparsitySchedule(0.0, 0.4, 0.1) has only the events 3, 6 and 9 in 22 steps.

        Raises:
            ValueError: If the times do not rise.

        Examples:
            >>> SparsitySchedule(0.1, 0.5, 0.2).resolve(total_steps=50)
            SparsitySchedule(start_step=5, end_step=25, every_n_steps=10, at=None)
            >>> SparsitySchedule(at=[0, 0.25, 0.5]).resolve(total_steps=50).at
            (0, 12, 25)
        """

        def steps(time: float) -> float:
            return time * total_steps if isinstance(time, float) else time

        if self.at is not None:
            self._check_order([steps(time) for time in self.at])
            whole = [max(1, round(steps(time))) if time else 0 for time in self.at]
            return SparsitySchedule(at=sorted(set(whole)))
        (first, last), every = map(steps, self._times), steps(self.every_n_steps)
        start, end = (max(1, round(step)) if step else 0 for step in (first, last))
        # Start, end and distance are rounded separately, which must not make room for one more event before the end
        number = max(1, math.ceil((last - first) / every - 1e-9))
        distance = max(1, round(every))
        if len(range(start, end, distance)) > number:
            distance = -(-(end - start) // number)
        self._check_order((start, end))
        return SparsitySchedule(start, end, distance)

    def events(self) -> list[Event]:
        """The events, in order of their steps. Each event raises the sparsity.

        Raises:
            ValueError: If a time is a fraction. Call `resolve` first.
        """
        if self.has_fractions:
            raise ValueError("the schedule has fractions of the training: call resolve(total_steps) first")
        if self.at is not None:
            placed = [(int(step), number / len(self.at)) for number, step in enumerate(self.at, 1)]
        else:
            start, end = map(int, self._times)
            every = int(self.every_n_steps)
            steps = [*range(start + every, end, every), end]
            placed = [(step, 1.0 if end == start else (step - start) / (end - start)) for step in steps]
        return [Event(step, 1.0 - (1.0 - x) ** 3) for step, x in placed]


def _check_time(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} is {value!r}: give optimizer steps (int) or a fraction of training (float)")
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} is {value}: give a number of optimizer steps ≥ 0, or a fraction below 1")
    if isinstance(value, float) and value >= 1:
        raise ValueError(
            f"{name} is {value}: a float is a fraction of the training, below 1, so that steps are left to recover; "
            f"for steps write {int(value)}"
        )


def check_trained(trainer: Trainer) -> None:
    """Say why a fit ended before its first step, which Lightning does silently.

    Raises:
        MisconfigurationException: If no training has taken a step.
    """
    if trainer.global_step > 0:
        limit = "max_epochs" if trainer.max_steps == -1 else "max_steps"
        rank_zero_info(
            f"nothing was left to train: the training has taken all its {trainer.global_step} optimizer steps already; "
            f"to train for longer, raise {limit} (now {getattr(trainer, limit)})"
        )
        return
    if trainer.fit_loop.max_batches == 0:
        raise MisconfigurationException(
            "the training dataloader has no batch, so nothing was trained or pruned: give one that isn't empty"
        )
    for name in ("limit_train_batches", "max_steps", "max_epochs"):
        if getattr(trainer, name) == 0:
            raise MisconfigurationException(f"{name} is 0, so nothing was trained or pruned: raise it")


def checked_events(schedule: SparsitySchedule, trainer: Trainer) -> list[Event]:
    """The events of a schedule. Warns if the Trainer's training is too short for them.

    Raises:
        MisconfigurationException: If nothing would be pruned, or if the length of the training is needed but unknown.
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
    """Optimizer steps of a Trainer's training; None if the number is not known."""
    total = trainer.estimated_stepping_batches
    return int(total) if math.isfinite(total) and total > 0 else None


def check_alike(steps: Sequence[int | None]) -> None:
    """Refuse ranks whose trainings differ in length: longer trainings would wait for ranks that have ended.

    `steps` has `steps_of` for each rank, in the order of ranks.
    """
    other = next((rank for rank, number in enumerate(steps) if number != steps[0]), None)
    if other is not None:
        raise MisconfigurationException(
            f"rank 0 has {steps[0]} optimizer steps to train and rank {other} has {steps[other]}: give all ranks as "
            "many training batches (a DistributedSampler, drop_last), or set the Trainer's max_steps and max_epochs=-1"
        )


def scheduled_events(schedule: SparsitySchedule, trainer: Trainer) -> list[Event]:
    """The events of a schedule, even those beyond the end of the Trainer's training.

    Raises:
        MisconfigurationException: If the schedule has fractions, but the length of the training is not known.
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
