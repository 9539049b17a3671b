from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from toy import tiny_llama

from thanos_lightning import CalibrationOptions, ThanosPruningCallback
from thanos_lightning.layers.targets import find_targets
from thanos_lightning.plan.allocation import Allocation, LayerSensitivity, allocate
from thanos_lightning.plan.planner import Planner
from thanos_lightning.plan.schedule import SparsitySchedule, checked_events
from thanos_lightning.plan.windows import Window
from thanos_lightning.solver import NM, Pattern, Structured, Unstructured

LAYERS = find_targets(tiny_llama())
SHAPES = {name: (layer.rows, layer.cols) for name, layer in LAYERS.items()}
HALF, ONCE = Unstructured(0.5), SparsitySchedule(20, 20, 1)
FRACTIONS, TWICE = SparsitySchedule(0.25, 0.75, 0.25), SparsitySchedule(10, 30, 10)
BATCHES = [{"input_ids": None}]


def numbers(steps: float = 40, *, automatic: bool = True) -> Any:
    """What planning reads of a Trainer."""
    module = SimpleNamespace(automatic_optimization=automatic)
    return SimpleNamespace(estimated_stepping_batches=steps, fast_dev_run=False, lightning_module=module)


def planner(
    pattern: Pattern = HALF,
    schedule: SparsitySchedule = ONCE,
    allocation: Allocation | None = None,
    can_differentiate: bool = True,
    **calibration: Any,
) -> Planner:
    given = CalibrationOptions(**({"steps": 4} if "batches" not in calibration else {}), **calibration)
    options = ThanosPruningCallback("unstructured", 0.5, schedule, calibration=given).options
    return Planner(replace(options, pattern=pattern, allocation=allocation), schedule, can_differentiate)


def plan(of: Planner, sensitivities: dict[str, LayerSensitivity] | None = None, **settings: Any) -> list[Window]:
    return of.plan(numbers(), LAYERS, dict.fromkeys(LAYERS, of.options.pattern), sensitivities or {}, **settings)


def sensitivities(weighted: bool = True) -> dict[str, LayerSensitivity]:
    """Layers that lose the more, the later they come."""
    each = [{level: number * level**2 for level in (0.25, 0.5, 0.75)} for number in range(1, len(LAYERS) + 1)]
    return {n: LayerSensitivity(one, one if weighted else None) for n, one in zip(LAYERS, each, strict=True)}


def spans(windows: list[Window]) -> list[tuple[int, int, bool]]:
    return [(window.start_step, window.end_step, window.scans) for window in windows]


@pytest.mark.parametrize(
    ("step", "calibration", "scan", "event"),
    [
        (20, {}, (16, 20), (16, 20)),  # which takes what the scan was told
        (20, {"memory_gib": 1.0}, (12, 16), (16, 20)),  # not all may be held at once: each has steps of its own
        (6, {"memory_gib": 1.0}, (0, 3), (3, 6)),  # of six steps each gets a half
        (0, {"batches": BATCHES}, (0, 0), (0, 0)),  # nothing is collected in the training
    ],
)
def test_a_scan_comes_before_the_first_event(step: int, calibration: Any, scan: Any, event: Any) -> None:
    planned = planner(schedule=SparsitySchedule(step, step, 1), **calibration)
    assert spans(plan(planned)) == [(*scan, True)]
    assert spans(plan(planned, sensitivities())) == [(*scan, True), (*event, False)]


def test_gradients_are_collected_where_rows_or_layers_compete() -> None:
    # dense rows compete at the first event
    for pattern, wanted in ((HALF, [True, True]), (NM(2, 4), [True, False])):
        alike = pattern, TWICE, Allocation("uniform")
        assert [window.gradients for window in plan(planner(*alike))] == wanted
        assert not any(window.gradients for window in plan(planner(*alike, output_weights="uniform")))
        with pytest.warns(UserWarning, match="there are no gradients on calibration.batches"):
            without = plan(planner(*alike, can_differentiate=False, batches=BATCHES))
        assert not any(window.gradients for window in without)
    assert [window.gradients for window in plan(planner())] == [True]  # a scan


@pytest.mark.parametrize(
    "pattern",
    [Unstructured(0.6), Unstructured(0.945), NM(2, 4, 0.02), Structured(0.56), Structured(0.85, 0.1)],
    ids=str,
)
def test_large_layers_have_the_budget_to_half_a_unit_also_near_their_limits(pattern: Pattern) -> None:
    shapes = {"0": (11008, 4096), "1": (4096, 11008), "2": (8192, 8192), "3": (28672, 8192), "4": (1024, 4096)}
    layers: Any = {name: SimpleNamespace(rows=rows, cols=cols) for name, (rows, cols) in shapes.items()}
    its = {n: LayerSensitivity({0.25: int(n) + 1.0, 0.5: int(n) + 2.0, 0.8: int(n) + 4.0}) for n in shapes}
    found = allocate(its, layers, dict.fromkeys(layers, pattern), pattern)
    wanted = sum(pattern.num_pruned(*shape) for shape in shapes.values())
    total = sum(found[name].num_pruned(*shape) for name, shape in shapes.items())
    assert total == pytest.approx(wanted, abs=0 if isinstance(pattern, Unstructured) else 28672 / 2)


def test_layers_of_which_it_is_not_known_what_they_lose_keep_out_of_an_allocation() -> None:
    with pytest.warns(UserWarning, match=r"what 14 layer\(s\), such as .* each is pruned to 50.00%"):
        _, pruning = plan(planner(), sensitivities(weighted=False))
    assert pruning.patterns == dict.fromkeys(LAYERS, HALF)
    frozen = list(LAYERS)[:3]
    some = sensitivities() | {name: sensitivities(weighted=False)[name] for name in frozen}
    with pytest.warns(UserWarning, match=r"what 3 layer\(s\)"):
        _, pruning = plan(planner(), some)
    assert {pruning.patterns[name] for name in frozen} == {HALF}
    excess = [pruning.patterns[name].num_pruned(*shape) - HALF.num_pruned(*shape) for name, shape in SHAPES.items()]
    assert sum(excess) == 0
    assert len(set(pruning.patterns.values())) > 2
    # who asks for an allocation gets one for all, by relative losses
    _, pruning = plan(planner(allocation=Allocation("loss")), some)
    assert HALF not in {pruning.patterns[name] for name in frozen}


def test_a_layer_that_an_allocation_leaves_dense_is_not_pruned() -> None:
    dear = sensitivities()
    first = next(iter(LAYERS))
    dear[first] = replace(dear[first], weighted_losses={0.25: 1e6, 0.5: 2e6, 0.75: 3e6})
    _, pruning = plan(planner(pattern=Unstructured(0.1)), dear)
    assert first not in pruning.patterns
    assert pruning.patterns


def test_a_training_that_goes_on_late_has_no_scan_unless_it_is_asked_for() -> None:
    bounded, asked_for = planner(memory_gib=1.0), planner(allocation=Allocation("loss"), memory_gib=1.0)
    for late in ({"optimizer_steps": 13}, {"begun_with_scan": False}):
        assert spans(plan(bounded, **late)) == [(16, 20, False)]
        assert plan(asked_for, **late)[0].scans
    assert plan(bounded, optimizer_steps=13, begun_with_scan=True)[0].scans


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (Unstructured(0.6), [0.45, 0.75]),
        (Unstructured(0.1), [0.05, 0.25]),  # a layer may stay dense
        (Unstructured(0.9), [0.75, 0.95]),
        (NM(2, 4, outlier_fraction=0.2), [0.25, 0.5]),
        (Structured(0.8, outlier_fraction=0.1), [0.65, 0.855]),
    ],
    ids=str,
)
def test_layers_are_tried_at_the_limits(pattern: Pattern, expected: list[float]) -> None:
    tried = planner(pattern).to_try({"shared": pattern, "other": NM(1, 4)})
    assert [level.sparsity for level in tried["shared"]] == pytest.approx(expected)
    assert tried["other"] == [NM(1, 4)]


def test_fractions_are_of_a_training_whose_steps_are_known() -> None:
    assert [event.step for event in checked_events(TWICE, numbers(float("inf")))] == [20, 30]
    for trainer in (numbers(float("inf")), numbers(-1), numbers(40, automatic=False)):
        with pytest.raises(MisconfigurationException, match="fractions of the training"):
            checked_events(FRACTIONS, trainer)


@pytest.mark.parametrize(
    ("schedule", "steps", "words"),
    [
        (ONCE, 20, ["schedule's last event is at optimizer step 20, the last of .*: no step is left"]),
        (TWICE, 25, ["step 30, but the training has 25 steps: the final sparsity will not be reached"]),
        (TWICE, 20, ["the last event of the training is at optimizer step 20, the last", "will not be reached"]),
    ],
)
def test_a_training_that_ends_with_an_event_or_before_one_is_said(
    schedule: SparsitySchedule, steps: int, words: list[str], recwarn: pytest.WarningsRecorder
) -> None:
    checked_events(schedule, numbers(steps))
    for said, expected in zip(recwarn, words, strict=True):
        assert re.search(expected, str(said.message))
