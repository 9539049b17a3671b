from __future__ import annotations

import itertools

import pytest
from hypothesis import event, given
from hypothesis import strategies as st
from torch import nn
from toy import tiny_llama

from thanos_lightning.layers.targets import find_targets
from thanos_lightning.plan.schedule import Event, SparsitySchedule
from thanos_lightning.plan.windows import patterns_at, plan_windows, split_by_memory
from thanos_lightning.solver import NM, Pattern, Structured, Unstructured


def test_every_family_becomes_sparser_in_its_own_way() -> None:
    final = {"a": NM(2, 4, 0.1), "b": Unstructured(0.6), "c": Structured(0.3, 0.1)}
    half = patterns_at(Event(5, 0.5), final)
    assert (half["a"].name, half["a"].outlier_fraction) == ("2:4", pytest.approx(0.55))
    assert (half["b"].name, half["b"].sparsity) == ("unstructured", pytest.approx(0.3))
    assert (half["c"].name, half["c"].sparsity) == ("structured", pytest.approx(0.15))
    assert half["c"].outlier_fraction == 0.1
    assert patterns_at(Event(5, 1.0), final) == final


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4, 0.1), Unstructured(0.6), Structured(0.3, 0.1)], ids=str)
def test_a_layer_becomes_sparser_up_to_its_pattern(pattern: Pattern) -> None:
    steps = [patterns_at(event, {"a": pattern})["a"] for event in SparsitySchedule(0, 20, 4).events()]
    pruned = [step.num_pruned(40, 40) for step in steps]
    assert pruned == sorted(pruned)
    assert steps[-1] == pattern


def test_windows_fit_the_budget() -> None:
    layers = list(find_targets(tiny_llama()).values())
    one = 4 * 32 * 32
    groups = split_by_memory(layers, 2.5 * one / 2**30)
    assert len(groups) == 8
    assert split_by_memory(layers, None) == [layers]
    with pytest.raises(ValueError, match=r"layer .*down_proj \(and of 1 more\) takes .* GiB.*, more than memory_gib"):
        split_by_memory(layers, 1.5 * one / 2**30)


@given(st.integers(1, 40))
def test_a_window_has_whole_blocks_where_they_fit(units: int) -> None:
    layers = list(find_targets(tiny_llama()).values())
    one = 4 * 32 * 32
    largest = max(4 * layer.cols**2 for layer in layers)
    budget = largest + units * one
    of_block = sum(4 * layer.cols**2 for layer in layers if layer.name.startswith("model.layers.0."))
    groups = split_by_memory(layers, budget / 2**30)
    assert [layer for group in groups for layer in group] == layers
    assert all(sum(4 * layer.cols**2 for layer in group) <= budget for group in groups)
    homes = [
        {layer.name.split(".")[2] for layer in group if layer.name.startswith("model.layers.")} for group in groups
    ]
    is_whole = all(first.isdisjoint(second) for first, second in itertools.combinations(homes, 2))
    assert is_whole or of_block > budget
    event(f"whole: {is_whole}")


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
