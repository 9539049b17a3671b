"""Decides which rank owns a layer. The owner receives the sums of all ranks and solves the layer."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from thanos_lightning.sharding.access import ParameterAccess
from thanos_lightning.sharding.together import PruningError, reserve
from thanos_lightning.sharding.view import View
from thanos_lightning.solver import HessianAccumulator

# For a square layer, factoring the Hessian takes about a quarter of the time that solving all rows takes.
_ROWS_PER_FACTOR = 4
# With fewer tokens for each input, an expert loses less with the mean of the others: benchmarks/experts.py
TOKENS_PER_INPUT = 4


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


# Experts that few tokens have reached, and what they borrow from the other experts of their layer


def lenders(layers: Mapping[str, View], tokens: Mapping[str, int]) -> dict[str, tuple[str, ...]]:
    """Experts' matrices that too few tokens have reached -> all of their kind in the layer that any has reached.

    A matrix that lacks tokens is in its own list if one has reached it. Where none reached any, it has no list.
    """
    kinds: dict[tuple[str, str], list[str]] = {}
    for name, layer in layers.items():
        if layer.part is not None:
            kinds.setdefault(_kind(name), []).append(name)
    reached = {kind: tuple(name for name in names if tokens[name]) for kind, names in kinds.items()}
    return {
        name: reached[kind]
        for kind, names in kinds.items()
        for name in names
        if reached[kind] and tokens[name] < TOKENS_PER_INPUT * layers[name].cols
    }


def _kind(name: str) -> tuple[str, str]:
    experts, _, matrix = name.rsplit(".", 2)
    return experts, matrix


def lend(
    sums: dict[str, HessianAccumulator],
    lent: Mapping[str, tuple[str, ...]],
    layers: Mapping[str, View],
    tokens: Mapping[str, int],
    owners: Mapping[str, int],
    access: ParameterAccess,
) -> None:
    """Fill up the sums of experts that lack tokens, on their owners. All ranks must call it.

    What an expert lacks to have `TOKENS_PER_INPUT`, it gets as the mean of those of `lenders`. `sums` are of
    `sum_on_owners`, `tokens` are those that all ranks have counted.
    """
    if not lent:
        return
    own = {name for name in lent if owners[name] == access.rank}
    needed = {name: 4 * layers[name].cols ** 2 for name in own}
    widest = max((group[0] for group in lent.values()), key=lambda name: layers[name].cols)
    needed[widest] = needed.get(widest, 0) + 4 * layers[widest].cols ** 2  # the total, on every rank
    reserve(needed, access)
    before: dict[str, HessianAccumulator] = {}
    filled: dict[tuple[object, ...], HessianAccumulator] = {}  # gate and up of an expert share theirs
    of_experts = None
    for group in dict.fromkeys(lent.values()):
        if of_experts != _kind(group[0])[0]:
            of_experts = _kind(group[0])[0]
            before, filled = dict(sums), {}
        counted = [before[name].triangle for name in group if owners[name] == access.rank]
        first = layers[group[0]]
        total = torch.zeros(first.cols, first.cols, device=counted[0].device if counted else first.parameter.device)
        for one in counted:
            total += one
        total = access.total(total)
        total /= sum(tokens[name] for name in group)
        for name in (name for name, others in lent.items() if others == group and name in own):
            counted_here = before.get(name)
            experts = tuple(other.rsplit(".", 2)[1] for other in group)
            key = (experts, name if counted_here is None else id(counted_here))
            if key not in filled:
                enough = TOKENS_PER_INPUT * first.cols
                filled[key] = HessianAccumulator.of_sum(total * (enough - tokens[name]), enough)
                if counted_here is not None:
                    filled[key].triangle.add_(counted_here.triangle)
            sums[name] = filled[key]
