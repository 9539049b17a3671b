"""Estimates what pruning takes: memory beside the model, its gradients and its optimizer, and messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thanos_lightning.calibration.hidden_states import TOKENS_PER_STEP
from thanos_lightning.events.footprint import event_bytes, moments_bytes, sent_bytes, training_bytes
from thanos_lightning.models.census import Census
from thanos_lightning.models.stack import Block
from thanos_lightning.models.targets import PrunableLayer
from thanos_lightning.plan.options import PruningOptions
from thanos_lightning.plan.windows import Window
from thanos_lightning.solver import Experts


@dataclass(frozen=True)
class Batches:
    """What is known of batches without running them; None for what is not."""

    number: int | None = None  # of batches
    tokens: int | None = None  # in a batch
    length: int | None = None  # of a sequence, in tokens

    @classmethod
    def of(cls, batches: Any) -> Batches:
        """Look at one sample of a list or a dataloader, and leave the training's random numbers as they are."""
        number = tokens = length = None
        with suppress(Exception), torch.random.fork_rng(devices=[]):  # an estimate must not end a training
            number = len(batches)
        with suppress(Exception), torch.random.fork_rng(devices=[]):
            if isinstance(batches, Sequence):
                tokens, length = _tokens(batches[0])
            else:
                found, length = _tokens(batches.dataset[0])
                tokens = None if found is None else found * batches.batch_size
        return cls(number, tokens, length)


@dataclass(frozen=True)
class Needs:
    """About what one window takes."""

    moments: int  # bytes for second moments, on each rank
    event: int  # peak bytes at its end, with the second moments, on the rank that needs most
    sent: int  # bytes that all ranks together send to solve and to write it


@dataclass(frozen=True)
class Estimate:
    """About what a training takes to be pruned."""

    windows: Sequence[Needs]  # what each window takes
    batches: int | None  # number of batches that an event is pruned on; None if it is not known
    moments: int  # bytes for second moments, on each rank, at the last event
    event: int  # peak bytes of that event, with the second moments, on the rank that needs most
    masks: int  # bytes for all masks, on each rank
    states: int = 0  # bytes on the CPU for what blocks get and give, on each rank, beside what an event takes


def estimate(
    options: PruningOptions,
    layers: Mapping[str, PrunableLayer],
    census: Census,
    windows: Sequence[Window],
    blocks: Mapping[str, Block],
    batches: Batches,
    *,
    accumulated: int,
    again: bool,
    ranks: int,
    in_pieces: bool,
    device: torch.device | None = None,
) -> Estimate:
    """Estimate a training by formulas, from the shapes of its layers.

    `batches` is the calibration set, or the training's batches, of which an optimizer step takes `accumulated`. `again`
    says whether layers are pruned more than once, `in_pieces` whether each rank has a piece of each weight and mask.
    `device` is where layers are solved; None for where they are.
    """
    solver = options.solver

    def needs(window: Window) -> Needs:
        chosen = [layers[name] for name in window.patterns]
        solved = [layers[name] for name, pattern in window.patterns.items() if not isinstance(pattern, Experts)]
        dropped = [layers[name] for name, pattern in window.patterns.items() if isinstance(pattern, Experts)]
        peak = event_bytes(
            solved, solver, ranks=ranks, pattern=options.pattern, gathers=in_pieces, again=again, device=device
        )
        trained = [block for block in blocks.values() if not window.patterns.keys().isdisjoint(block.layers)]
        peaks = [peak + moments_bytes(dropped)]
        peaks += [training_bytes(block, solved, ranks) for block in trained]
        return Needs(
            moments=moments_bytes(chosen) if solver.needs_statistics else 0,
            event=max(peaks),
            sent=sent_bytes(chosen, ranks, gathers=in_pieces, again=again),
        )

    each = [needs(window) for window in windows]
    last = [one for window, one in zip(windows, each, strict=True) if window.event == windows[-1].event]
    number = batches.number if solver.needs_statistics else 0
    if options.collects_in_training:
        number = max(window.end_step - window.start_step for window in windows) * accumulated
    states = 0
    if blocks:  # of one window: what its first block gets, and what each block gives
        wanted = options.block_steps * max(TOKENS_PER_STEP, batches.length or 0)
        tokens = min(wanted, (number or 0) * (batches.tokens or 0))
        states = 2 * next(iter(layers.values())).cols * tokens * (len(blocks) // len(last) + 1)
    shown = sum(layer.rows * layer.cols for layer in layers.values() if layer.shows_its_mask)
    return Estimate(
        each,
        number,
        moments=max(one.moments for one in last),
        event=max(one.event for one in last),
        masks=(census.target_weights - shown) // (ranks if in_pieces else 1),
        states=states // ranks,
    )


def _tokens(batch: Any) -> tuple[int, int] | tuple[None, None]:
    """The tokens of `input_ids`, or else of the first tensor, and of a sequence; None if that is floating-point."""
    if isinstance(batch, Mapping):
        batch = batch.get("input_ids", next(iter(batch.values())))
    while isinstance(batch, (list, tuple)):
        batch = batch[0]
    if isinstance(batch, Tensor) and batch.ndim and not batch.is_floating_point():
        return batch.numel(), batch.shape[-1]
    return None, None
