"""Announces before the first batch what is pruned, when, and about how much memory that takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import rich
import torch
from lightning.pytorch.utilities import rank_zero_warn

from thanos_lightning.events.forecast import Calibration, describe, dropped_in, forecast, needs, tokens_per_batch
from thanos_lightning.models.census import take_census
from thanos_lightning.plan.training_steps import scheduled_events, steps_of
from thanos_lightning.sharding.replicated import ReplicatedAccess

if TYPE_CHECKING:
    from thanos_lightning.events.run import PruningRun


def announce(run: PruningRun) -> None:
    """Print the announcement on rank 0, and warn if most of the model stays dense. All ranks must call it.

    The run's report takes the counts of weights.
    """
    options, trainer, module, past = run.options, run.trainer, run.module, run.past
    census = take_census(module, run.masked)
    summary = past.report.summary
    summary.target_weights, summary.model_weights = census.target_weights, census.model_weights
    if census.share < 0.5:
        rank_zero_warn(
            f"only {census.share:.1%} of the model's weights are in the layers to prune, which can be Linear, "
            f"Conv1D and fused experts; left out are {census.shares()}"
        )
    counts = options.solver.needs_statistics
    with torch.random.fork_rng(devices=[]):  # must not change the training's random numbers
        batches = run.collector.batches(trainer, module) if options.calibration.batches is not None else None
    if not trainer.is_global_zero:
        return
    looked_at = trainer.train_dataloader if batches is None else batches
    number, tokens, length = tokens_per_batch(looked_at) if counts else (0, 0, 0)
    if counts and batches is None:
        steps = max((window.end_step - window.start_step for window in run.windows), default=0)
        number = steps * trainer.accumulate_grad_batches
    calibration = Calibration(
        number,
        tokens,
        of_training=batches is None,
        length=length,
        blocks=len(run.blocks),
        block_steps=options.block_steps,
    )
    events = scheduled_events(run.planner.schedule, trainer)
    is_sharded = not isinstance(run.access, ReplicatedAccess)
    of_event = [
        needs(
            [run.layers[name] for name in window.patterns],
            options.solver,
            ranks=trainer.world_size,
            coupled=options.calibration.couples_rows,
            pattern=options.pattern,
            gathers=is_sharded,
            again=len(events) > 1,
            blocks=[block for block in run.blocks.values() if not window.patterns.keys().isdisjoint(block.layers)],
            dropped=dropped_in(window),
        )
        for window in run.windows
        if window.event == run.windows[-1].event
    ]
    outlook = forecast(run.layers, census, calibration, of_event, ranks=trainer.world_size, is_sharded=is_sharded)
    pruned = {window.event.step for window in run.windows[: past.windows_done] if window.is_last and not window.scans}
    text = describe(
        census,
        run.final.values(),
        [event for event in events if event.step not in pruned],
        options.pattern,
        calibration,
        outlook,
        steps=steps_of(trainer),
        steps_taken=past.optimizer_steps,
        channels=run.taken.in_words,
        order=run.taken.order_in_words,
    )
    rich.get_console().print(f"\n{text}\n", markup=False, highlight=False)
