from __future__ import annotations

import itertools

import pytest
from hypothesis import event, given
from hypothesis import strategies as st
from torch import nn
from toy import tiny_llama

from thanos_lightning.layers.targets import find_targets
from thanos_lightning.plan.schedule import Event
from thanos_lightning.plan.windows import patterns_at, plan_windows, split_by_memory
from thanos_lightning.solver import NM, Structured, Unstructured

LAYERS = list(find_targets(tiny_llama()).values())
ONE = 4 * 32 * 32  # bytes of what is counted for most of them
THREE = find_targets(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)))


def test_every_family_becomes_sparser_in_its_own_way() -> None:
    final = {"a": NM(2, 4, 0.1), "b": Unstructured(0.6), "c": Structured(0.3, 0.1)}
    half = patterns_at(Event(5, 0.5), final)
    assert (half["a"].name, half["a"].outlier_fraction) == ("2:4", pytest.approx(0.55))
    assert (half["b"].name, half["b"].sparsity) == ("unstructured", pytest.approx(0.3))
    assert (half["c"].name, half["c"].sparsity) == ("structured", pytest.approx(0.15))
    assert half["c"].outlier_fraction == 0.1
    assert patterns_at(Event(5, 1.0), final) == final


def test_windows_fit_the_budget() -> None:
    assert len(split_by_memory(LAYERS, 2.5 * ONE / 2**30)) == 8
    assert split_by_memory(LAYERS, None) == [LAYERS]
    with pytest.raises(ValueError, match=r"layer .*down_proj \(and of 1 more\) takes .* GiB.*, more than memory_gib"):
        split_by_memory(LAYERS, 1.5 * ONE / 2**30)


@given(st.integers(1, 40))
def test_a_window_has_whole_blocks_where_they_fit(units: int) -> None:
    budget = max(4 * layer.cols**2 for layer in LAYERS) + units * ONE
    of_block = sum(4 * layer.cols**2 for layer in LAYERS if layer.name.startswith("model.layers.0."))
    groups = split_by_memory(LAYERS, budget / 2**30)
    assert [layer for group in groups for layer in group] == LAYERS
    assert all(sum(4 * layer.cols**2 for layer in group) <= budget for group in groups)
    homes = [{layer.name.split(".")[2] for layer in group} for group in groups]
    is_whole = all(first.isdisjoint(second) for first, second in itertools.combinations(homes, 2))
    assert is_whole or of_block > budget
    event(f"whole: {is_whole}")


def test_windows_end_at_their_event() -> None:
    work = [(Event(10, 0.5), dict.fromkeys(THREE, NM(2, 4, 0.5))), (Event(14, 1.0), dict.fromkeys(THREE, NM(2, 4)))]
    windows = plan_windows(work, THREE, calibration_steps=3, budget_gib=4 * 64 / 2**30)
    spans = [(window.start_step, window.end_step) for window in windows]
    assert spans == [(1, 4), (4, 7), (7, 10), (11, 12), (12, 13), (13, 14)]
    assert [window.is_last for window in windows] == [False, False, True] * 2
    assert [list(w.patterns) for w in windows] == [["0"], ["1"], ["2"]] * 2


def test_too_little_time_for_the_windows_is_an_error() -> None:
    work = [(Event(2, 1.0), dict.fromkeys(THREE, NM(2, 4)))]
    with pytest.raises(ValueError, match=r"step 2 needs statistics from 3 window.*2 since the start"):
        plan_windows(work, THREE, calibration_steps=3, budget_gib=4 * 64 / 2**30)
