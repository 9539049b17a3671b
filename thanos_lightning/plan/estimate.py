"""Estimates what pruning takes: memory beside the model, its gradients and its optimizer, and messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thanos_lightning.layers.blocks import Block
from thanos_lightning.layers.census import Census
from thanos_lightning.layers.lora import shows_its_mask
from thanos_lightning.layers.targets import Layer
from thanos_lightning.plan.options import TOKENS_PER_STEP, PruningOptions
from thanos_lightning.plan.windows import Window
from thanos_lightning.ranks.owners import assign_owners
from thanos_lightning.ranks.view import numel_of
from thanos_lightning.solver import Experts, Pattern
from thanos_lightning.solver.layer import SolverOptions


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
                of_sample, length = _tokens(batches.dataset[0])
                tokens = None if of_sample is None else of_sample * batches.batch_size
        return cls(number, tokens, length)


@dataclass(frozen=True)
class Solving:
    """Where layers are solved, and what of them is there."""

    ranks: int = 1  # how many solve them
    in_pieces: bool = False  # whether each rank has a piece of each weight and mask, so that an owner gets copies
    again: bool = False  # whether layers have masks already
    device: str = "cpu"  # its type. Wherever layers are solved, new weights and masks wait on the CPU to be written


@dataclass(frozen=True)
class Needs:
    """About what one window takes."""

    moments: int  # bytes for second moments, on each rank
    event: int  # peak bytes at its end, with the second moments, on the rank that needs most
    waiting: int  # bytes on a rank's CPU for weights and masks that were solved elsewhere and wait to be written
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
    layers: Mapping[str, Layer],
    census: Census,
    windows: Sequence[Window],
    blocks: Mapping[str, Block],
    batches: Batches,
    solving: Solving,
    *,
    accumulated: int,
) -> Estimate:
    """Estimate a training by formulas, from the shapes of its layers.

    `batches` is the calibration set, or the training's batches, of which an optimizer step takes `accumulated`.
    """
    each = [_needs_of(window, options, layers, blocks, solving) for window in windows]
    last = [needs for window, needs in zip(windows, each, strict=True) if window.event == windows[-1].event]
    number = batches.number if options.solver.needs_statistics else 0
    if options.collects_in_training:
        number = max(window.end_step - window.start_step for window in windows) * accumulated
    states = 0
    if blocks:  # of one window: what its first block gets, and what each block gives
        wanted = options.block_steps * max(TOKENS_PER_STEP, batches.length or 0)
        tokens = min(wanted, (number or 0) * (batches.tokens or 0))
        states = 2 * next(iter(layers.values())).cols * tokens * (len(blocks) // len(last) + 1)
    shown = sum(layer.rows * layer.cols for layer in layers.values() if shows_its_mask(layer))
    return Estimate(
        each,
        number,
        moments=max(needs.moments for needs in last),
        event=max(needs.event for needs in last),
        masks=(census.target_weights - shown) // (solving.ranks if solving.in_pieces else 1),
        states=states // solving.ranks,
    )


def _needs_of(
    window: Window, options: PruningOptions, layers: Mapping[str, Layer], blocks: Mapping[str, Block], solving: Solving
) -> Needs:
    chosen = [layers[name] for name in window.patterns]
    dropped = [layers[name] for name, pattern in window.patterns.items() if isinstance(pattern, Experts)]
    solved = [layers[name] for name, pattern in window.patterns.items() if not isinstance(pattern, Experts)]
    trained = [block for block in blocks.values() if not window.patterns.keys().isdisjoint(block.layers)]
    at_end = event_bytes(solved, options.solver, solving, options.pattern) + moments_bytes(dropped)
    return Needs(
        moments=moments_bytes(chosen) if options.solver.needs_statistics else 0,
        event=max([at_end, *(training_bytes(block, solved, solving) for block in trained)]),
        waiting=_results_bytes(solved) // solving.ranks if solving.device != "cpu" else 0,
        sent=sent_bytes(chosen, solving),
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


# The formulas of that


def sharing(layers: Sequence[Layer]) -> list[list[Layer]]:
    """Group layers by the input that they read: a guess, since only a forward shows it.

    Layers of one parent with equally many inputs read the same input (q, k, v; gate, up). The last layer of such a
    group is the exception if it has as many outputs as inputs (o).
    """
    alike: dict[tuple[str, int], list[Layer]] = {}
    for layer in layers:
        alike.setdefault((layer.name.rpartition(".")[0], layer.cols), []).append(layer)
    groups = []
    for group in alike.values():
        leads_back = len(group) > 1 and group[-1].rows == group[-1].cols
        groups += [group[:-1], group[-1:]] if leads_back else [group]
    return groups


def moments_bytes(layers: Sequence[Layer]) -> int:
    """Bytes for the second moments of a window, on each rank."""
    return 4 * sum(group[0].cols ** 2 for group in sharing(layers))


def event_bytes(
    layers: Sequence[Layer], options: SolverOptions, solving: Solving = Solving(), pattern: Pattern | None = None
) -> int:
    """Peak bytes at the end of a window, with its second moments, on the rank that needs most.

    The layers come in the order in which they are pruned, and `pattern` is that of most of them.
    """
    counts = options.needs_statistics
    moments = moments_bytes(layers) if counts else 0
    owners = assign_owners({layer.name: layer for layer in layers}, solving.ranks)
    peak = moments
    for rank in set(owners.values()):
        of_rank = [layer for layer in layers if owners[layer.name] == rank]
        read = {layer.name: number for number, group in enumerate(sharing(of_rank)) for layer in group}
        if solving.ranks > 1 and counts:  # the total over ranks arrives beside this rank's own sums
            peak = max(peak, moments + 4 * max(layer.cols for layer in of_rank) ** 2)
        hessians = weights = 0  # bytes of the Hessians of later layers; the number of weights from here on
        results = _results_bytes(of_rank)
        groups = set[int]()
        for layer in reversed(of_rank):
            weights += layer.rows * layer.cols
            results -= _results_bytes([layer])
            sums = hessians + 4 * layer.cols**2 if counts else 0
            collected = weights * (4 * solving.in_pieces + solving.again)
            working = options.peak_bytes(layer.rows, layer.cols, pattern=pattern, device=solving.device)
            peak = max(peak, sums + collected + working + (results if solving.device == "cpu" else 0))
            if read[layer.name] not in groups:
                groups.add(read[layer.name])
                hessians += 4 * layer.cols**2
    return peak


def _results_bytes(solved: Sequence[Layer]) -> int:
    """Bytes of weights and masks that wait to be written."""
    return sum(layer.rows * layer.cols * (layer.parameter.element_size() + 1) for layer in solved)


def training_bytes(block: Block, solved: Sequence[Layer], solving: Solving) -> int:
    """Peak bytes of a rank that trains a block of a window whose layers were solved, without activations.

    The rank has all parameters of the block in fp32; of those that are trained a copy, its gradient and Adam's two
    moments; and what it has solved of the window.
    """
    names = set(block.layers)
    trained = sum(layer.rows * layer.cols for layer in solved if layer.name in names)
    results = _results_bytes(solved) // solving.ranks if solving.device == "cpu" else 0
    return 4 * numel_of(block.module.parameters()) + 16 * trained + results


def sent_bytes(layers: Sequence[Layer], solving: Solving) -> int:
    """Bytes that all ranks together send to solve a window and to write it.

    Each rank but the owner sends half of each symmetric sum; the others get the new weight and the mask. Where weights
    are in pieces, the owner gets those of the fp32 weight, and of the mask before, and sends them back.
    """
    owners = assign_owners({layer.name: layer for layer in layers}, solving.ranks)
    sums = 0
    for group in sharing(layers):
        sums += 2 * group[0].cols ** 2 * len({owners[layer.name] for layer in group})
    weights = sum(layer.rows * layer.cols for layer in layers)
    model = sum(layer.rows * layer.cols * layer.parameter.element_size() for layer in layers)
    pieces = (4 + solving.again + 5) * weights // solving.ranks if solving.in_pieces else weights // 8
    return (solving.ranks - 1) * (sums + model + pieces)
