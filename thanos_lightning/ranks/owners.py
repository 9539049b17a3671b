"""Decides which rank owns a layer. The owner receives the sums of all ranks and solves the layer."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from thanos_lightning.ranks.talk import PruningError, Ranks, reserve
from thanos_lightning.ranks.view import View
from thanos_lightning.solver import HessianAccumulator

# For a square layer, factoring the Hessian takes about a quarter of the time that solving all rows takes.
_ROWS_PER_FACTOR = 4


def _cost(layer: View) -> int:
    """Estimate how long a rank solves a layer of c rows and b columns: b³ + 4·c·b²."""
    return layer.cols**3 + _ROWS_PER_FACTOR * layer.rows * layer.cols**2


def assign_owners(layers: Mapping[str, View], world_size: int) -> dict[str, int]:
    """Assign the rank that solves each layer, from shapes alone, so that the work is spread evenly."""
    loads = [0] * world_size
    owners = {}
    for name in sorted(layers, key=lambda name: (-_cost(layers[name]), name)):
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += _cost(layers[name])
    return owners


def tokens_seen(
    layers: Mapping[str, View], accumulators: Mapping[str, HessianAccumulator], ranks: Ranks
) -> dict[str, int]:
    """Return how many tokens have reached each layer on all ranks. All ranks must call it, and get the same.

    Raises:
        PruningError: If no token has reached any layer.
    """
    here = [accumulators[name].num_tokens if name in accumulators else 0 for name in layers]
    tokens = ranks.total(torch.tensor(here, dtype=torch.int64)).tolist()
    if not any(tokens):
        raise PruningError(
            "no token was counted at all: every batch was empty or all padding. Check the batches, and their attention "
            "mask. No layer of this window was pruned"
        )
    return dict(zip(layers, tokens, strict=True))


def sum_on_owners(
    layers: Mapping[str, View],
    accumulators: dict[str, HessianAccumulator],
    tokens: Mapping[str, int],
    owners: Mapping[str, int],
    ranks: Ranks,
    *,
    stay: bool = False,
) -> dict[str, HessianAccumulator]:
    """Add up the statistics of all ranks, each on its layer's owner, and empty `accumulators`. All ranks must call it.

    `tokens` are those of `tokens_seen`. `stay` means that the caller holds the accumulators elsewhere, too, so that
    emptying the dict frees no memory.
    """
    if ranks.world_size == 1:
        complete = {name: accumulators[name] for name in layers if name in accumulators}
        accumulators.clear()
        return complete
    complete = {}
    groups = _sharing(layers, accumulators, ranks)
    solved_here = [names[0] for names in groups if any(owners[name] == ranks.rank for name in names)]
    needed = {name: 4 * layers[name].cols ** 2 for name in solved_here}
    if not stay:  # a rank frees its own sum before the next total
        needed = dict(sorted(needed.items(), key=lambda item: item[1])[-1:])
    reserve(needed, ranks)
    for names in groups:
        accumulator = accumulators.get(names[0])
        width = layers[names[0]].cols
        for owner in sorted({owners[name] for name in names}):
            total = ranks.sum_on(owner, None if accumulator is None else accumulator.triangle, width)
            if total is not None:
                summed = HessianAccumulator.of_sum(total, tokens[names[0]])
                complete.update({name: summed for name in names if owners[name] == owner})
        for name in names:
            accumulators.pop(name, None)
    return complete


def _sharing(
    layers: Mapping[str, View], accumulators: Mapping[str, HessianAccumulator], ranks: Ranks
) -> list[list[str]]:
    """Group the layers that share one sum on every rank, in an order that is the same on all ranks."""
    first: dict[int, int] = {}
    marks = torch.zeros(len(layers), 3, dtype=torch.int64)
    for number, name in enumerate(layers):
        if (accumulator := accumulators.get(name)) is not None:
            leader = first.setdefault(id(accumulator), number)  # the first layer that has this sum
            marks[number] = torch.tensor([1, leader, leader**2])
    of_all = ranks.total(marks).tolist()
    groups: dict[int, list[str]] = {}
    for number, (name, (count, leaders, squares)) in enumerate(zip(layers, of_all, strict=True)):
        # Squares and sums agree if the layer has one leader on all `count` ranks that its tokens have reached. The
        # leader's tokens have reached these ranks, too, and no others if its count is the same.
        leader = leaders // count if count and count * squares == leaders**2 else number
        groups.setdefault(leader if of_all[leader][0] == count else number, []).append(name)
    return list(groups.values())
