from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thanos_lightning.sharding.fragments import Range, cover


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
