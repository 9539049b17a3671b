from __future__ import annotations

import pytest
from torch import nn
from toy import tiny_llama

from thanos_lightning.planning import changes, patterns_at, plan_windows, split_by_memory
from thanos_lightning.schedule import Event, SparsitySchedule
from thanos_lightning.solver import NM, Structured, Unstructured
from thanos_lightning.targets import find_targets


def test_every_family_becomes_sparser_in_its_own_way() -> None:
    final = {"a": NM(2, 4, 0.1), "b": Unstructured(0.6), "c": Structured(0.3, 0.1)}
    half = patterns_at(Event(5, 0.5), final, "rows")
    assert (half["a"].name, half["a"].outlier_fraction) == ("2:4", pytest.approx(0.55))
    assert (half["b"].name, half["b"].sparsity) == ("unstructured", pytest.approx(0.3))
    assert (half["c"].name, half["c"].sparsity) == ("structured", pytest.approx(0.15))
    assert half["c"].outlier_fraction == 0.1
    assert patterns_at(Event(5, 1.0), final, "rows") == final


def test_layers_take_their_turn_front_to_back() -> None:
    final = {**{str(index): NM(2, 4) for index in range(8)}, "other": Unstructured(0.5)}
    quarter = patterns_at(Event(5, 0.25), final, "layers")
    assert quarter == {"0": NM(2, 4), "1": NM(2, 4), "other": Unstructured(0.125)}
    events = SparsitySchedule(0, 20, 5, shape="linear").events()
    nm_only = {name: pattern for name, pattern in final.items() if name != "other"}
    assert [list(changed) for _, changed in changes(events, nm_only, "layers")] == [
        ["0", "1"],
        ["2", "3"],
        ["4", "5"],
        ["6", "7"],
    ]


def test_events_that_change_nothing_are_left_out() -> None:
    events = SparsitySchedule(0, 20, 1, shape="linear").events()
    assert len(changes(events, {"a": NM(2, 4), "b": NM(2, 4)}, "layers")) == 2


def test_windows_fit_the_budget() -> None:
    layers = list(find_targets(tiny_llama()).values())
    one = 4 * 32 * 32
    groups = split_by_memory(layers, 2.5 * one / 2**30)
    assert [layer for group in groups for layer in group] == layers
    assert all(sum(4 * layer.cols**2 for layer in group) <= 2.5 * one for group in groups)
    assert len(groups) == 8
    assert split_by_memory(layers, None) == [layers]
    with pytest.raises(ValueError, match=r"down_proj takes .* GiB, more than hessian_memory_gib"):
        split_by_memory(layers, 1.5 * one / 2**30)


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
