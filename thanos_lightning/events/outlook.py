"""What a training that has not begun would take: memory and messages, window by window, from shapes alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import Strategy

from thanos_lightning.events.blocks import Taken, take
from thanos_lightning.events.experts import take_experts
from thanos_lightning.events.forecast import Calibration, Forecast, Needs, dropped_in, forecast, needs
from thanos_lightning.models.census import Census, take_census
from thanos_lightning.models.feedforward import FeedForward
from thanos_lightning.models.stack import find_blocks
from thanos_lightning.models.targets import PrunableLayer, find_targets
from thanos_lightning.plan.options import PruningOptions
from thanos_lightning.plan.overrides import assign_patterns
from thanos_lightning.plan.planner import Planner
from thanos_lightning.plan.windows import Window
from thanos_lightning.sharding.held import Share, share_of
from thanos_lightning.solver import Channels, Experts


@dataclass(frozen=True)
class Machines:
    """What a training is to run on.

    Attributes:
        ranks: Processes, each with one device.
        strategy: A supported one; None for one device.
        autocasts: As for `share_of`.
        device: The kind of device.
    """

    ranks: int
    strategy: Strategy | None
    autocasts: bool
    device: torch.device


@dataclass(frozen=True)
class Batches:
    """What is known of the data without reading it; None for what is not.

    Attributes:
        calibration: Batches of the calibration set, at most.
        tokens: Tokens in a batch.
        length: Tokens in a sequence.
    """

    calibration: int | None = None
    tokens: int | None = None
    length: int | None = None


@dataclass(frozen=True)
class Outlook:
    """What a training would take.

    Attributes:
        taken: The layers to prune, and their patterns at the end.
        census: Counts of weights.
        share: What a rank holds.
        windows: As the run would plan them, if a scan found all layers alike.
        needs: What each window takes.
        at_events: Bytes on a rank's device at the end of each window, at most.
        in_training: Bytes on a rank's device while batches are trained, at most, without activations.
        calibration: What an event is pruned on.
        event: What one event takes in all.
        beside: Bytes of models that are only read, such as a teacher.
    """

    taken: Taken
    census: Census
    share: Share
    windows: Sequence[Window]
    needs: Sequence[Needs]
    at_events: Sequence[int]
    in_training: int
    calibration: Calibration
    event: Forecast
    beside: int

    @property
    def most(self) -> int:
        """Bytes that a rank's device needs, at most, without activations."""
        return max(self.in_training, *self.at_events)


def look_ahead(
    module: LightningModule,
    options: PruningOptions,
    trainer: Trainer,
    machines: Machines,
    batches: Batches,
    *,
    feed_forwards: Sequence[FeedForward] = (),
    beside: int = 0,
    lacks_gradients: bool = False,
) -> Outlook:
    """Plan a training as the callback will, and estimate what it takes.

    Args:
        module: On the meta device.
        options: The callback's.
        trainer: Knows the length of the training. It may be on fewer devices.
        machines: What the training is to run on.
        batches: What is known of the data.
        feed_forwards: The module's feed-forward blocks, where a pattern is "channels".
        beside: Bytes of models on each rank that are only read.
        lacks_gradients: As for `Planner.of`.

    Raises:
        MisconfigurationException: As the callback, if nothing would be pruned or the length is needed but unknown.
        ValueError: As the callback, if windows do not fit before their events or a layer exceeds the memory.
    """
    layers = find_targets(module, options.targets, options.ignore)
    taken = Taken(layers, assign_patterns(layers, options.pattern, options.overrides))
    if any(isinstance(pattern, Experts) for pattern in taken.final.values()):
        taken = take_experts(module, layers, taken.final)
    elif any(isinstance(pattern, Channels) for pattern in taken.final.values()):
        taken = take(module, feed_forwards, layers, taken.final, options.multiple_of)
    options = options.with_pattern(taken.final)
    layers = dict(taken.layers)
    masked = {**layers, **{part.name: part for parts in taken.owned.values() for part in parts}}
    planner = Planner.of(options, options.schedule, lacks_gradients=lacks_gradients)
    windows = planner.plan(trainer, layers, taken.final, None)
    blocks = taken.trainable(find_blocks(module, layers)) if options.block_steps else {}
    census = take_census(module, masked)
    share = share_of(module, masked.values(), machines.strategy, machines.ranks, autocasts=machines.autocasts)
    steps = {window.event.step for window in windows if not window.scans}
    each = [
        needs(
            [layers[name] for name in window.patterns],
            options.solver,
            ranks=machines.ranks,
            coupled=options.calibration.couples_rows,
            pattern=options.pattern,
            gathers=share.in_pieces,
            again=len(steps) > 1,
            device=machines.device,
            blocks=[block for block in blocks.values() if not window.patterns.keys().isdisjoint(block.layers)],
            dropped=dropped_in(window),
        )
        for window in windows
    ]
    in_training_batches = options.collects_in_training
    calibration = Calibration(
        max(window.end_step - window.start_step for window in windows) * trainer.accumulate_grad_batches
        if in_training_batches
        else batches.calibration
        if options.solver.needs_statistics
        else 0,
        batches.tokens,
        of_training=in_training_batches,
        length=batches.length,
        blocks=len(blocks),
        block_steps=options.block_steps,
    )
    event = forecast(
        layers,
        census,
        calibration,
        [one for window, one in zip(windows, each, strict=True) if window.event == windows[-1].event],
        ranks=machines.ranks,
        is_sharded=share.in_pieces,
    )
    return Outlook(
        taken,
        census,
        share,
        windows,
        each,
        at_events=[size + beside for size in _at_events(windows, each, share, layers)],
        in_training=share.in_training().total + beside + (event.moments if in_training_batches else 0),
        calibration=calibration,
        event=event,
        beside=beside,
    )


def _at_events(
    windows: Sequence[Window], each: Sequence[Needs], share: Share, layers: Mapping[str, PrunableLayer]
) -> list[int]:
    """Bytes on the device at the end of each window. Masks are there of what was pruned before."""
    found, masked = [], set[str]()
    weights = {name: layer.rows * layer.cols for name, layer in layers.items()}
    for window, one in zip(windows, each, strict=True):
        held = share.at_event(window.event.step)
        masks = held.masks * sum(weights[name] for name in masked) // sum(weights.values())
        counting = one.moments + (share.in_training().copies if window.start_step == window.end_step else 0)
        found.append(held.without("masks").total + masks + max(one.event, counting))
        if not window.scans:
            masked |= window.patterns.keys()
    return found
