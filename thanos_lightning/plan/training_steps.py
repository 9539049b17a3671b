"""The length of a training in optimizer steps, and the events of a schedule in it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from thanos_lightning.plan.schedule import Event, SparsitySchedule


def check_trained(trainer: Trainer) -> None:
    """Raise a MisconfigurationException if a fit ended before its first step. Lightning ends such a fit silently."""
    if trainer.global_step > 0:  # a finished training was resumed
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
