"""From optimizer steps to sparsity: pure functions of numbers.

A schedule names the optimizer steps at which layers are pruned (its events) and the sparsity that each asks for.
With x = (t - start) / (end - start), a layer whose final sparsity is s_f is pruned at step t to

    s_t = s_f + (s_i - s_f) · (1 - p(x)),    p: 0 -> 0, 1 -> 1

where s_i is `initial` and p is the shape. "cubic", p = 1 - (1 - x)³, is Zhu and Gupta (arXiv 1710.01878, equation 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

Shape = Literal["constant", "linear", "cubic", "cosine"]


def _progress(shape: Shape, x: float) -> float:
    match shape:
        case "constant":
            return 1.0
        case "linear":
            return x
        case "cubic":
            return 1.0 - (1.0 - x) ** 3
        case "cosine":
            return 0.5 * (1.0 - math.cos(math.pi * x))


def _is_fraction(value: float) -> bool:
    return isinstance(value, float)


@dataclass(frozen=True)
class Event:
    """One pruning at one optimizer step.

    Attributes:
        step: Number of optimizer steps that have been taken when the event happens.
        progress: p(x), in [0, 1]: 0 asks for the initial sparsity, 1 for the final one.
        initial: The schedule's initial sparsity.
    """

    step: int
    progress: float
    initial: float = 0.0

    def sparsity(self, final: float) -> float:
        """The sparsity that the event asks for, of a layer whose final sparsity is `final`."""
        # exact at the end: a rounding error here would ask an N:M layer for a fraction of a row
        return final if self.progress >= 1.0 else self.initial + (final - self.initial) * self.progress


@dataclass(frozen=True)
class SparsitySchedule:
    """When to prune, and how much by then.

    Steps are optimizer steps, never batches. An int is a number of steps; a float in [0, 1] is a fraction of the
    training (`1` is the first step, `1.0` the last). Events lie at `start_step`, then every `every_n_steps`, and at
    `end_step`; the ones that would not raise the sparsity (the first one when `initial` is 0, all but the first one of
    the shape "constant") are left out.

    Args:
        start_step: Step of the first event.
        end_step: Step of the last event, at which the final sparsity is reached. Equal to `start_step` for one shot.
        every_n_steps: Distance between events, at least one step.
        initial: Sparsity at `start_step`, in [0, 1).
        shape: How the sparsity rises: "constant", "linear", "cubic" or "cosine".

    Raises:
        ValueError: For a negative or non-finite number, a fraction above 1, a schedule that ends before it starts, an
            unknown shape.

    Example:
        >>> schedule = SparsitySchedule(start_step=0, end_step=20, every_n_steps=10)
        >>> [(event.step, event.sparsity(final=0.5)) for event in schedule.events()]
        [(10, 0.4375), (20, 0.5)]
    """

    start_step: int | float
    end_step: int | float
    every_n_steps: int | float
    initial: float = 0.0
    shape: Shape = "cubic"

    def __post_init__(self) -> None:
        for name in ("start_step", "end_step", "every_n_steps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ValueError(f"{name} is {value!r}: give optimizer steps (int) or a fraction of training (float)")
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"{name} is {value}: give a number of optimizer steps ≥ 0, or a fraction in [0, 1]")
            if _is_fraction(value) and value > 1:
                raise ValueError(
                    f"{name} is {value}: a float is a fraction of the training, in [0, 1]; for steps write {int(value)}"
                )
        if self.every_n_steps == 0:
            raise ValueError("every_n_steps is 0: give at least one optimizer step between events")
        if _is_fraction(self.start_step) == _is_fraction(self.end_step):
            self._check_order()
        if not (isinstance(self.initial, (int, float)) and 0 <= self.initial < 1):
            raise ValueError(f"initial is {self.initial}: give the sparsity at start_step, in [0, 1)")
        if self.shape not in get_args(Shape):
            raise ValueError(f"shape is {self.shape!r}: choose one of {', '.join(get_args(Shape))}")

    def _check_order(self) -> None:
        if self.end_step < self.start_step:
            raise ValueError(
                f"the schedule ends at end_step {self.end_step}, before it starts at start_step {self.start_step}: "
                "give an end_step that is not smaller"
            )

    @property
    def has_fractions(self) -> bool:
        """Whether the length of the training must be known to place the events."""
        return any(map(_is_fraction, (self.start_step, self.end_step, self.every_n_steps)))

    def resolve(self, total_steps: int) -> SparsitySchedule:
        """The same schedule in whole optimizer steps, for a training of `total_steps` of them.

        Rounding never adds an event. Where events are two or three steps apart, it may take one: of a tenth each up to
        0.4 of 22 steps, those at 3, 6 and 9 are left.

        Raises:
            ValueError: If it ends before it starts.

        Example:
            >>> SparsitySchedule(0.1, 0.5, 0.2).resolve(total_steps=50)
            SparsitySchedule(start_step=5, end_step=25, every_n_steps=10, initial=0.0, shape='cubic')
        """

        def steps(value: float) -> float:
            return value * total_steps if _is_fraction(value) else value

        start, end, every = round(steps(self.start_step)), round(steps(self.end_step)), steps(self.every_n_steps)
        # each is rounded by itself, which must not leave a step or two for one more event before the end
        number = max(1, math.ceil((steps(self.end_step) - steps(self.start_step)) / every - 1e-9))
        distance = max(1, round(every))
        if len(range(start, end, distance)) > number:
            distance = -(-(end - start) // number)
        resolved = SparsitySchedule(start, end, distance, self.initial, self.shape)
        resolved._check_order()
        return resolved

    def events(self) -> list[Event]:
        """The events, in order of their steps, each raising the sparsity.

        Raises:
            ValueError: If a step is a fraction: `resolve` comes first.
        """
        if self.has_fractions:
            raise ValueError("the schedule has fractions of the training: call resolve(total_steps) first")
        start, end, every = int(self.start_step), int(self.end_step), int(self.every_n_steps)
        steps = [*range(start, end, every), end]
        events: list[Event] = []
        for step in steps:
            x = 1.0 if end == start else (step - start) / (end - start)
            event = Event(step, _progress(self.shape, x), self.initial)
            before = events[-1].progress if events else (0.0 if self.initial == 0 else -1.0)
            if event.progress > before:
                events.append(event)
        return events
