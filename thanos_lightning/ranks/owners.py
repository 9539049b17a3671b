"""Decides which rank owns a layer. The owner receives the sums of all ranks and solves the layer."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from thanos_lightning.ranks.access import ParameterAccess
from thanos_lightning.ranks.talk import PruningError, reserve
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
    layers: Mapping[str, View], accumulators: Mapping[str, HessianAccumulator], access: ParameterAccess
) -> dict[str, int]:
    """Return how many tokens have reached each layer on all ranks. All ranks must call it, and get the same.

    Raises:
        PruningError: If no token has reached any layer.
    """
    own = [accumulators[name].num_tokens if name in accumulators else 0 for name in layers]
    seen = dict(zip(layers, access.total(torch.tensor(own, dtype=torch.int64)).tolist(), strict=True))
    if not any(seen.values()):
        raise PruningError(
            "no token was counted at all: every batch was empty or all padding. Check the batches, and their attention "
            "mask. No layer of this window was pruned"
        )
    return seen


def sum_on_owners(
    layers: Mapping[str, View],
    accumulators: dict[str, HessianAccumulator],
    tokens: Mapping[str, int],
    owners: Mapping[str, int],
    access: ParameterAccess,
    *,
    stay: bool = False,
) -> dict[str, HessianAccumulator]:
    """Add up the statistics of all ranks, each on its layer's owner, and empty `accumulators`. All ranks must call it.

    `tokens` are those of `tokens_seen`. `stay` means that the caller holds the accumulators elsewhere, too, so that
    emptying the dict frees no memory.
    """
    if access.world_size == 1:
        complete = {name: accumulators[name] for name in layers if name in accumulators}
        accumulators.clear()
        return complete
    complete = {}
    groups = _sharing(layers, accumulators, access)
    needed = {
        names[0]: 4 * layers[names[0]].cols ** 2
        for names in groups
        if any(owners[name] == access.rank for name in names)
    }
    if not stay:  # a rank frees its own sum before the next total
        needed = dict(sorted(needed.items(), key=lambda item: item[1])[-1:])
    reserve(needed, access)
    for names in groups:
        own = accumulators.get(names[0])
        width = layers[names[0]].cols
        for owner in sorted({owners[name] for name in names}):
            summed = access.sum_on(owner, None if own is None else own.triangle, width)
            if summed is not None:
                whole = HessianAccumulator.of_sum(summed, tokens[names[0]])
                complete.update({name: whole for name in names if owners[name] == owner})
        for name in names:
            accumulators.pop(name, None)
    return complete


def _sharing(
    layers: Mapping[str, View], accumulators: Mapping[str, HessianAccumulator], access: ParameterAccess
) -> list[list[str]]:
    """Group the layers that share one sum on every rank, in an order that is the same on all ranks."""
    first: dict[int, int] = {}
    own = torch.zeros(len(layers), 3, dtype=torch.int64)
    for number, name in enumerate(layers):
        if (accumulator := accumulators.get(name)) is not None:
            leader = first.setdefault(id(accumulator), number)  # the first layer that has this sum
            own[number] = torch.tensor([1, leader, leader**2])
    told = access.total(own).tolist()
    groups: dict[int, list[str]] = {}
    for number, (name, (count, leaders, squares)) in enumerate(zip(layers, told, strict=True)):
        # Squares and sums agree if the layer has one leader on all `count` ranks that its tokens have reached. The
        # leader's tokens have reached these ranks, too, and no others if its count is the same.
        leader = leaders // count if count and count * squares == leaders**2 else number
        groups.setdefault(leader if told[leader][0] == count else number, []).append(name)
    return list(groups.values())
