from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thanos_lightning.plan.schedule import SparsitySchedule

THREE = {"start_step": 0, "end_step": 10, "every_n_steps": 5}


def test_cubic_is_zhu_and_gupta() -> None:
    start, end, final = 10, 40, 0.8
    events = SparsitySchedule(start, end, 5).events()
    assert [event.step for event in events] == [15, 20, 25, 30, 35, 40]
    for event in events:
        expected = final + (0 - final) * (1 - (event.step - start) / (end - start)) ** 3
        assert event.sparsity(final) == pytest.approx(expected, abs=1e-12)


def test_fractions_resolve_to_optimizer_steps() -> None:
    schedule = SparsitySchedule(0.1, 0.5, 0.1)
    assert schedule.has_fractions
    assert [event.step for event in schedule.resolve(200).events()] == [40, 60, 80, 100]
    with pytest.raises(ValueError, match="resolve"):
        schedule.events()
    with pytest.raises(ValueError, match="before it starts"):
        SparsitySchedule(30, 0.5, 5).resolve(50)
    assert SparsitySchedule(0.01, 0.02, 0.01).resolve(20).events()[0].step == 1  # never before the first step


@given(total=st.integers(10, 5000))
def test_rounding_adds_no_event(total: int) -> None:
    steps = [event.step for event in SparsitySchedule(0.0, 0.4, 0.1).resolve(total).events()]
    assert steps[-1] == round(0.4 * total)
    if len(steps) != 3 or total >= 27:  # of a short training rounding may take an event
        assert steps == pytest.approx([0.1 * total, 0.2 * total, 0.3 * total, 0.4 * total], abs=3)
    if total >= 27:
        uneven = [event.step for event in SparsitySchedule(0.0, 0.25, 0.1).resolve(total).events()]
        assert uneven == pytest.approx([0.1 * total, 0.2 * total, 0.25 * total], abs=2)


def test_a_list_of_times_is_a_schedule() -> None:
    assert SparsitySchedule(at=[10, 20, 30]).events() == SparsitySchedule(0, 30, 10).events()
    assert [event.step for event in SparsitySchedule(at=[0, 3, 50]).events()] == [0, 3, 50]
    assert SparsitySchedule(at=[0, 8]).events()[0].sparsity(0.5) == 0.4375
    halves = SparsitySchedule(at=[0, 0.25, 40])
    assert halves.has_fractions
    assert halves.resolve(100).at == (0, 25, 40)
    with pytest.raises(ValueError, match=r"at is \[0, 0.25, 40\]: give times that rise"):
        halves.resolve(160)


@given(total=st.integers(1, 5000))
def test_fractions_of_a_list_are_never_before_the_first_step(total: int) -> None:
    steps = [event.step for event in SparsitySchedule(at=[0.1, 0.2, 0.3, 0.4]).resolve(total).events()]
    assert steps == sorted(set(steps))
    assert steps[0] >= 1
    assert steps[-1] == max(1, round(0.4 * total))
    if total >= 10:
        assert len(steps) == 4


@given(start=st.integers(0, 50), length=st.integers(0, 100), every=st.integers(1, 40), final=st.floats(0.01, 0.99))
def test_sparsity_rises_to_the_final_one(start: int, length: int, every: int, final: float) -> None:
    events = SparsitySchedule(start, start + length, every).events()
    sparsities = [event.sparsity(final) for event in events]
    assert sparsities[-1] == final
    assert sparsities[0] > 0
    assert sparsities == sorted(sparsities)
    steps = [event.step for event in events]
    assert steps == sorted(set(steps))
    assert start <= steps[0] <= steps[-1] == start + length


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"start_step": 10, "end_step": 5}, "end_step 5, before it starts at start_step 10"),
        ({"start_step": -1}, "start_step is -1"),
        ({"start_step": math.nan}, "start_step is nan"),
        ({"end_step": "20"}, "end_step is '20'"),
        ({"every_n_steps": 0}, "every_n_steps is 0"),
        ({"start_step": 1.0}, "start_step is 1.0: a float is a fraction .* for steps write 1"),
        ({"every_n_steps": None}, "every_n_steps is missing: give start_step, end_step and every_n_steps, or at"),
        ({"at": [1, 2], "start_step": 1}, "at and start_step are given, but either places all events"),
        ({"at": []}, r"at is \[\]: give a list of times, such as"),
        ({"at": "0.1"}, "at is '0.1': give a list of times"),
        ({"at": [2, 2]}, r"at is \[2, 2\]: give times that rise"),
        ({"at": [5, -1]}, "a time of at is -1"),
        ({"at": [0.5, 1.0]}, "a time of at is 1.0: a float is a fraction"),
        ({"at": [True]}, "a time of at is True"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SparsitySchedule(**(arguments if "at" in arguments else {**THREE, **arguments}))


@pytest.mark.parametrize("total", [20, 39])
@pytest.mark.parametrize(
    "schedule",
    [
        *(SparsitySchedule(at=at) for at in ([0], [0, 0.5], [0.0, 3], [0.2, 8], [0.001], [5])),
        *(SparsitySchedule(0, 0, 1), SparsitySchedule(0, 0.5, 1), SparsitySchedule(0.0, 0.5, 0.1)),
        *(SparsitySchedule(0.1, 0.5, 3), SparsitySchedule(2, 2, 1), SparsitySchedule(0.1, 15, 2)),
    ],
)
def test_whether_it_begins_at_once(schedule: SparsitySchedule, total: int) -> None:
    assert schedule.begins_at_once == (schedule.resolve(total).events()[0].step == 0)
