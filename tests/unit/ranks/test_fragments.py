from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from thanos_lightning.ranks.fragments import FragmentAccess, Range, cover
from thanos_lightning.ranks.masks import pack_bits


@st.composite
def held(draw: st.DrawFn) -> tuple[list[Range], int, int]:
    """Ranges that hold all entries between them, some of them twice, in any order; and the rank that asks."""
    numel = draw(st.integers(1, 40))
    cuts = sorted(draw(st.lists(st.integers(0, numel), max_size=4)))
    ranges = [Range(start, stop - start) for start, stop in zip([0, *cuts], [*cuts, numel], strict=True)]
    for start, length in draw(st.lists(st.tuples(st.integers(0, numel), st.integers(0, numel)), max_size=3)):
        ranges.append(Range(start, min(length, numel - start)))
    ranges = draw(st.permutations(ranges))
    return ranges, numel, draw(st.integers(0, len(ranges) - 1))


@given(held())
def test_each_entry_is_taken_once_and_elsewhere_only_if_not_here(case: tuple[list[Range], int, int]) -> None:
    ranges, numel, first = case
    parts = cover(ranges, numel, first)
    assert [entry for _, part in parts for entry in range(part.start, part.stop)] == list(range(numel))
    for rank, part in parts:
        assert part.numel > 0
        assert ranges[rank].start <= part.start
        assert part.stop <= ranges[rank].stop
    own = [part for rank, part in parts if rank == first]
    assert own == ([ranges[first]] if ranges[first].numel else [])


@given(held(), st.data())
def test_what_nobody_holds_is_an_error(case: tuple[list[Range], int, int], data: st.DataObject) -> None:
    ranges, numel, first = case
    hole = data.draw(st.integers(0, numel - 1))
    # the part before the hole of what reaches over it, and the rest as it is
    without = [Range(r.start, hole - r.start) if r.start <= hole < r.stop else r for r in ranges]
    with pytest.raises(ValueError, match=rf"entry {hole} of {numel} is held by no rank"):
        cover(without, numel, first)


class OneOf(FragmentAccess):
    """One of several ranks, whose messages go through boxes: rank -> what it has sent."""

    def __init__(self, ranges: list[Range], rank: int, boxes: dict[int, list[Tensor]]) -> None:
        self.rank, self.world_size, self._device = rank, len(ranges), torch.device("cpu")
        self.ranges, self.boxes = ranges, boxes

    def _range(self, layer: Any, rank: int) -> Range:
        return self.ranges[rank]

    def _exchange(self, messages: Any) -> None:  # type: ignore[override]
        for way, tensor, other in messages:
            if way is dist.isend:
                self.boxes.setdefault(self.rank, []).append(tensor)
            else:
                tensor.copy_(self.boxes[other].pop(0))


OneOf.__abstractmethods__ = frozenset()  # what a strategy implements is not called


@given(held(), st.integers(1, 3), st.booleans(), st.data())
def test_masks_travel_as_bits_to_the_rank_that_asks(
    case: tuple[list[Range], int, int], unit: int, transposed: bool, data: st.DataObject
) -> None:
    ranges, numel, owner = case
    by = 8 if unit == 3 else unit  # pieces that begin at whole bytes, and others
    ranges, numel = [Range(by * one.start, by * one.numel) for one in ranges], by * numel
    drop = torch.tensor(data.draw(st.lists(st.booleans(), min_size=numel, max_size=numel)))
    rows, cols = (by, numel // by) if transposed else (numel // by, by)
    layer: Any = SimpleNamespace(name="layer", rows=rows, cols=cols, transposed=transposed)
    whole = drop.view(cols, rows).t() if transposed else drop.view(rows, cols)
    boxes: dict[int, list[Tensor]] = {}
    others = [rank for rank in range(len(ranges)) if rank != owner]
    for rank in (*others, owner):
        own = drop[ranges[rank].start : ranges[rank].stop]
        bits = OneOf(ranges, rank, boxes).collect_bits(layer, own, owner)
        assert (bits is None) == (rank != owner)
    assert bits is not None
    assert bits.equal(pack_bits(~whole))
    assert not any(boxes.values())
