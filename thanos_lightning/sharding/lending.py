"""Experts that few tokens have reached, and what they borrow from the other experts of their layer."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from thanos_lightning.models.targets import PrunableLayer
from thanos_lightning.sharding.access import ParameterAccess
from thanos_lightning.sharding.together import reserve
from thanos_lightning.solver import HessianAccumulator

# With fewer tokens for each input, an expert loses less with the mean of the others: benchmarks/experts.py
TOKENS_PER_INPUT = 4


def lenders(layers: Mapping[str, PrunableLayer], tokens: Mapping[str, int]) -> dict[str, tuple[str, ...]]:
    """Experts' matrices that too few tokens have reached -> all of their kind in the layer that any has reached.

    A matrix that lacks tokens is in its own list if one has reached it. Where none reached any, it has no list.
    """
    kinds: dict[tuple[str, str], list[str]] = {}
    for name, layer in layers.items():
        if layer.expert is not None:
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
    layers: Mapping[str, PrunableLayer],
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
    reserve({name: 4 * layers[name].cols ** 2 for name in own}, access)
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
