from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from thanos_lightning.ranks.access import ParameterAccess
from thanos_lightning.ranks.owners import _sharing


class Summing(ParameterAccess):
    """A rank that hands in what is summed over all ranks, or gets the sum."""

    def __init__(self, total: Tensor | None = None) -> None:
        super().__init__()
        self.given, self.sum = torch.empty(0), total

    def total(self, tensor: Tensor) -> Tensor:
        self.given = tensor
        return tensor if self.sum is None else self.sum


def shared(ranks: list[list[int | None]]) -> list[list[str]]:
    """The groups of layers whose sums on each rank have these numbers; None where a layer has no sum."""
    layers: Any = {f"{number}": None for number in range(len(ranks[0]))}
    sums = [{sum_of: object() for sum_of in rank} for rank in ranks]
    every: Any = [
        {name: own[one] for name, one in zip(layers, rank, strict=True) if one is not None}
        for own, rank in zip(sums, ranks, strict=True)
    ]
    handed_in = []
    for of_rank in every:
        access = Summing()
        _sharing(layers, of_rank, access)
        handed_in.append(access.given)
    found = [_sharing(layers, of_rank, Summing(sum(handed_in))) for of_rank in every]
    assert all(groups == found[0] for groups in found)
    return found[0]


def as_seen(ranks: list[list[int | None]]) -> list[list[str]]:
    groups: dict[Any, list[str]] = {}
    for number, seen in enumerate(zip(*ranks, strict=True)):
        groups.setdefault(seen, []).append(f"{number}")
    return list(groups.values())


@given(st.integers(1, 7).flatmap(lambda n: st.lists(st.lists(st.none() | st.integers(0, 3), min_size=n, max_size=n))))
def test_layers_of_one_group_have_one_sum_on_every_rank(ranks: list[list[int | None]]) -> None:
    if not ranks:
        return
    groups = shared(ranks)
    assert sorted(name for group in groups for name in group) == sorted(map(str, range(len(ranks[0]))))
    exact = as_seen(ranks)
    assert all(any(set(group) <= set(whole) for whole in exact) for group in groups)


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=7), st.lists(st.sets(st.integers(0, 3)), min_size=1, max_size=4)
)
def test_what_is_shared_where_it_is_seen_is_summed_once(inputs: list[int], missing: list[set[int]]) -> None:
    """As in a model whose layers read these inputs, of which some reach no token on some ranks."""
    ranks = [[None if one in gone else one for one in inputs] for gone in missing]
    seen = [one for one in range(4) if any(one in rank for rank in ranks)]
    groups = shared(ranks)
    for one in seen:
        assert [f"{number}" for number, read in enumerate(inputs) if read == one] in groups
