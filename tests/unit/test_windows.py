from __future__ import annotations

from typing import Any

import pytest
from torch import nn
from toy import tiny_llama

from thanos_lightning.schedule import Event, SparsitySchedule
from thanos_lightning.solver import NM, Pattern, Structured, Unstructured
from thanos_lightning.targets import find_targets
from thanos_lightning.windows import (
    Progression,
    changes,
    check_progression,
    patterns_at,
    plan_windows,
    split_by_memory,
    turns,
)


def test_every_family_becomes_sparser_in_its_own_way() -> None:
    final = {"a": NM(2, 4, 0.1), "b": Unstructured(0.6), "c": Structured(0.3, 0.1)}
    half = patterns_at(Event(5, 0.5), final)
    assert (half["a"].name, half["a"].outlier_fraction) == ("2:4", pytest.approx(0.55))
    assert (half["b"].name, half["b"].sparsity) == ("unstructured", pytest.approx(0.3))
    assert (half["c"].name, half["c"].sparsity) == ("structured", pytest.approx(0.15))
    assert half["c"].outlier_fraction == 0.1
    assert patterns_at(Event(5, 1.0), final) == final


def test_layers_take_their_turn_front_to_back() -> None:
    final = {"0": Unstructured(0.6), **{str(index): NM(2, 4) for index in range(1, 8)}}
    assert patterns_at(Event(5, 0.25), final, "front-to-back") == {"0": Unstructured(0.6), "1": NM(2, 4)}
    events = SparsitySchedule(0, 20, 5, shape="linear").events()
    assert [list(changed) for _, changed in changes(events, final, "front-to-back")] == [
        ["0", "1"],
        ["2", "3"],
        ["4", "5"],
        ["6", "7"],
    ]


def test_events_that_change_nothing_are_left_out() -> None:
    events = SparsitySchedule(0, 20, 1, shape="linear").events()
    assert len(changes(events, {"a": NM(2, 4), "b": NM(2, 4)}, "front-to-back")) == 2


def test_windows_fit_the_budget() -> None:
    layers = list(find_targets(tiny_llama()).values())
    one = 4 * 32 * 32
    groups = split_by_memory(layers, 2.5 * one / 2**30)
    assert [layer for group in groups for layer in group] == layers
    assert all(sum(4 * layer.cols**2 for layer in group) <= 2.5 * one for group in groups)
    assert len(groups) == 8
    assert split_by_memory(layers, None) == [layers]
    with pytest.raises(
        ValueError, match=r"layer .*down_proj \(and of 1 more\): .* GiB.*, more than hessian_memory_gib"
    ):
        split_by_memory(layers, 1.5 * one / 2**30)


def test_the_second_moments_of_joined_outputs_need_room_too() -> None:
    layers = list(find_targets(tiny_llama()).values())
    one = 4 * 32 * 32
    groups = split_by_memory(layers, 4.5 * one / 2**30, joined=True)
    assert [layer for group in groups for layer in group] == layers
    assert all(sum(4 * (layer.cols**2 + layer.rows**2) for layer in group) <= 4.5 * one for group in groups)
    assert len(groups) > len(split_by_memory(layers, 4.5 * one / 2**30))
    with pytest.raises(
        ValueError, match=r"the second moments of inputs and outputs of layer .*_proj .*: .* GiB.*, more"
    ):
        split_by_memory(layers, 1.5 * one / 2**30, joined=True)


def test_windows_end_at_their_event() -> None:
    layers = find_targets(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)))
    work = [(Event(10, 0.5), dict.fromkeys(layers, NM(2, 4, 0.5))), (Event(14, 1.0), dict.fromkeys(layers, NM(2, 4)))]
    windows = plan_windows(work, layers, calibration_steps=3, budget_gib=4 * 64 / 2**30)
    assert [(w.start_step, w.end_step, w.is_last) for w in windows] == [
        (1, 4, False),
        (4, 7, False),
        (7, 10, True),
        (11, 12, False),
        (12, 13, False),
        (13, 14, True),
    ]
    assert [list(w.patterns) for w in windows] == [["0"], ["1"], ["2"]] * 2


def test_too_little_time_for_the_windows_is_an_error() -> None:
    layers = find_targets(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)))
    work = [(Event(2, 1.0), dict.fromkeys(layers, NM(2, 4)))]
    with pytest.raises(ValueError, match=r"step 2 needs statistics from 3 window.*2 since the start"):
        plan_windows(work, layers, calibration_steps=3, budget_gib=4 * 64 / 2**30)
    assert len(plan_windows(work, layers, calibration_steps=0)) == 1


def test_n_m_goes_through_the_levels_before_it() -> None:
    final = {"a": NM(2, 4), "b": NM(4, 8, 0.25)}
    check_progression("levels", final)
    steps = [dict(patterns) for _, patterns in changes(SparsitySchedule(0, 40, 10).events(), final, "levels")]
    assert [{name: pattern.name for name, pattern in patterns.items()} for patterns in steps] == [
        {"a": "3:4", "b": "7:8"},
        {"a": "2:4", "b": "6:8"},  # a is at its end
        {"b": "5:8"},
        {"b": "4:8"},
    ]
    assert all(patterns["b"].outlier_fraction == 0.25 for patterns in steps)


@pytest.mark.parametrize(
    ("schedule", "names"),
    [
        (SparsitySchedule(0, 20, 10), ["3:4", "2:4"]),  # at 10 the budget is 7/8 of the end's
        (SparsitySchedule(0, 40, 10, shape="linear"), ["3:4", "2:4"]),
        (SparsitySchedule(0, 10, 10, initial=0.1), ["3:4", "2:4"]),
        (SparsitySchedule(10, 10, 1), ["2:4"]),
    ],
)
def test_no_level_is_left_out_where_events_are_enough(schedule: SparsitySchedule, names: list[str]) -> None:
    found = changes(schedule.events(), {"a": NM(2, 4)}, "levels")
    assert [patterns["a"].name for _, patterns in found] == names
    few = changes(SparsitySchedule(0, 20, 10).events(), {"a": NM(4, 8)}, "levels")
    assert [patterns["a"].name for _, patterns in few] == ["5:8", "4:8"]


@pytest.mark.parametrize("pattern", [NM(3, 4), Unstructured(0.5), Structured(0.5)])
def test_levels_need_a_pattern_that_has_some(pattern: Pattern) -> None:
    with pytest.raises(ValueError, match=f"progression is 'levels', but the pattern {pattern.name} of layer b has no"):
        check_progression("levels", {"a": NM(2, 4), "b": pattern})
    check_progression("within-layers", {"b": pattern})


def test_turns_are_counted_in_weights() -> None:
    final = {"a": NM(2, 4), "b": NM(2, 4), "c": NM(2, 4)}
    sizes = {"a": 10, "b": 80, "c": 10}
    assert turns("front-to-back", final, {}) == ["a", "b", "c"]
    assert turns("back-to-front", final, {}) == ["c", "b", "a"]
    assert turns("least-loss-first", final, {"a": 0.3, "b": 0.1, "c": 0.2}) == ["b", "c", "a"]
    for progress, expected in ((0.05, {"a"}), (0.1, {"a"}), (0.11, {"a", "b"}), (0.9, {"a", "b"}), (0.91, set("abc"))):
        assert patterns_at(Event(5, progress), final, "front-to-back", sizes, ["a", "b", "c"]).keys() == expected
    assert list(patterns_at(Event(5, 0.05), final, "back-to-front", sizes, ["c", "b", "a"])) == ["c"]


@pytest.mark.parametrize("progression", ["within-layers", "levels", "front-to-back", "back-to-front"])
@pytest.mark.parametrize("shape", ["linear", "cubic"])
def test_every_progression_rises_and_ends_at_the_final_patterns(progression: Progression, shape: Any) -> None:
    final = {str(index): NM(2, 4) for index in range(5)}
    events = SparsitySchedule(0, 20, 4, shape=shape).events()
    reached: dict[str, Pattern] = {}
    for _, patterns in changes(events, final, progression, None, turns(progression, final, {})):
        for name, pattern in patterns.items():
            before = reached[name].num_pruned(10, 40) if name in reached else 0
            assert pattern.num_pruned(10, 40) >= before
        reached |= patterns
    assert reached == final
