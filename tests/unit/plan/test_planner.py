from __future__ import annotations

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
BUDGET = 2.5 * 4 * 32 * 32 / 2**30  # GiB, in which the layers take eight windows
HALF, ONCE = Unstructured(0.5), SparsitySchedule(20, 20, 1)
BATCHES = [{"input_ids": None}]


def numbers(steps: float = 40, *, automatic: bool = True, fast: bool = False) -> Any:
    """What planning reads of a Trainer."""
    module = SimpleNamespace(automatic_optimization=automatic)
    return SimpleNamespace(estimated_stepping_batches=steps, fast_dev_run=fast, lightning_module=module)


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
    found = {}
    for number, name in enumerate(LAYERS, 1):
        losses = {level: number * level**2 for level in (0.25, 0.5, 0.75)}
        found[name] = LayerSensitivity(losses, losses if weighted else None)
    return found


def spans(windows: list[Window]) -> list[tuple[int, int, bool]]:
    return [(window.start_step, window.end_step, window.scans) for window in windows]


def test_a_scan_comes_before_the_first_event() -> None:
    assert spans(plan(planner())) == [(16, 20, True)]
    # which takes what the scan was told
    assert spans(plan(planner(), sensitivities())) == [(16, 20, True), (16, 20, False)]
    # where not all may be held at once, each has steps of its own
    assert spans(plan(planner(memory_gib=1.0))) == [(12, 16, True)]
    assert spans(plan(planner(memory_gib=1.0), sensitivities())) == [(12, 16, True), (16, 20, False)]
    # of six steps each gets a half
    short = planner(schedule=SparsitySchedule(6, 6, 1), memory_gib=1.0)
    assert spans(plan(short, sensitivities())) == [(0, 3, True), (3, 6, False)]
    # with a calibration set nothing is collected in the training
    at_once = planner(schedule=SparsitySchedule(0, 0, 1), batches=BATCHES)
    assert spans(plan(at_once, sensitivities())) == [(0, 0, True), (0, 0, False)]


def test_gradients_are_collected_where_rows_or_layers_compete() -> None:
    twice = SparsitySchedule(at=[10, 20])  # dense rows compete at the first event
    for pattern, wanted in ((Unstructured(0.5), [True, True]), (NM(2, 4), [True, False])):
        alike = pattern, twice, Allocation("uniform")
        assert [window.gradients for window in plan(planner(*alike))] == wanted
        assert not any(window.gradients for window in plan(planner(*alike, output_weights="uniform")))
        with pytest.warns(UserWarning, match="there are no gradients on calibration.batches"):
            without = plan(planner(*alike, can_differentiate=False, batches=BATCHES))
        assert not any(window.gradients for window in without)
    assert [window.gradients for window in plan(planner())] == [True]  # a scan


def test_layers_that_lose_more_stay_denser() -> None:
    _, pruning = plan(planner(), sensitivities())
    sparsities = [pruning.patterns[name].sparsity for name in LAYERS]
    assert max(sparsities[:3]) > 0.6
    assert min(sparsities[-3:]) < 0.4


@pytest.mark.parametrize(
    "pattern",
    [Unstructured(0.6), Unstructured(0.945), NM(2, 4, 0.02), Structured(0.56), Structured(0.85, 0.1)],
    ids=str,
)
def test_large_layers_have_the_budget_to_half_a_unit_also_near_their_limits(pattern: Pattern) -> None:
    shapes = [(11008, 4096), (4096, 11008), (8192, 8192), (28672, 8192), (1024, 4096)]
    layers: Any = {str(number): SimpleNamespace(rows=rows, cols=cols) for number, (rows, cols) in enumerate(shapes)}
    its = {
        name: LayerSensitivity({0.25: number + 1.0, 0.5: number + 2.0, 0.8: number + 4.0})
        for number, name in enumerate(layers)
    }
    found = allocate(its, layers, dict.fromkeys(layers, pattern), pattern)
    wanted = sum(pattern.num_pruned(*shape) for shape in shapes)
    total = sum(found[name].num_pruned(*shape) for name, shape in zip(layers, shapes, strict=True))
    assert total == pytest.approx(wanted, abs=0 if isinstance(pattern, Unstructured) else 28672 / 2)


def test_layers_of_which_it_is_not_known_what_they_lose_keep_out_of_an_allocation() -> None:
    with pytest.warns(UserWarning, match=r"what 14 layer\(s\), such as .* each is pruned to 50.00%"):
        _, pruning = plan(planner(), sensitivities(weighted=False))
    assert pruning.patterns == dict.fromkeys(LAYERS, Unstructured(0.5))
    frozen = list(LAYERS)[:3]
    some = {
        name: replace(scan, weighted_losses=None) if name in frozen else scan for name, scan in sensitivities().items()
    }
    with pytest.warns(UserWarning, match=r"what 3 layer\(s\)"):
        _, pruning = plan(planner(), some)
    assert {pruning.patterns[name] for name in frozen} == {Unstructured(0.5)}
    others = {name: layer for name, layer in LAYERS.items() if name not in frozen}
    counts = [pruning.patterns[name].num_pruned(layer.rows, layer.cols) for name, layer in others.items()]
    assert sum(counts) == sum(Unstructured(0.5).num_pruned(layer.rows, layer.cols) for layer in others.values())
    assert len(set(pruning.patterns.values())) > 2
    # who asks for an allocation gets one for all, by relative losses
    _, pruning = plan(planner(allocation=Allocation("loss")), some)
    assert Unstructured(0.5) not in {pruning.patterns[name] for name in frozen}


def test_a_layer_that_an_allocation_leaves_dense_is_not_pruned() -> None:
    dear = sensitivities()
    first = next(iter(dear))
    dear[first] = replace(dear[first], weighted_losses={0.25: 1e6, 0.5: 2e6, 0.75: 3e6})
    _, pruning = plan(planner(pattern=Unstructured(0.1)), dear)
    assert first not in pruning.patterns
    assert pruning.patterns


@pytest.mark.parametrize(
    "settings",
    [
        {"schedule": SparsitySchedule(1, 1, 1), "memory_gib": 1.0},  # no step to look at them
        {"schedule": SparsitySchedule(12, 12, 1), "memory_gib": BUDGET},  # eight windows to look, eight to prune
    ],
)
def test_a_default_gives_way_and_what_was_asked_for_does_not(settings: dict[str, Any]) -> None:
    assert not any(window.scans for window in plan(planner(**settings)))
    with pytest.raises(MisconfigurationException, match="leaves too few to look at the layers before"):
        plan(planner(**settings, allocation=Allocation("loss")))


def test_a_training_that_goes_on_late_has_no_scan_unless_it_is_asked_for() -> None:
    bounded, asked_for = planner(memory_gib=1.0), planner(allocation=Allocation("loss"), memory_gib=1.0)
    for late in ({"optimizer_steps": 13}, {"begun_with_scan": False}):
        assert spans(plan(bounded, **late)) == [(16, 20, False)]
        assert plan(asked_for, **late)[0].scans
    assert plan(bounded, optimizer_steps=13, begun_with_scan=True)[0].scans


def test_what_does_not_fit_behind_a_scan_is_refused_before_it() -> None:
    crowded = SparsitySchedule(at=[20, 21, 22])
    with pytest.raises(ValueError, match=r"the event at optimizer step 21 needs statistics from 8 window\(s\)"):
        plan(planner(schedule=crowded, memory_gib=BUDGET))


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


def test_events_of_a_training() -> None:
    assert [event.step for event in checked_events(SparsitySchedule(0.25, 0.75, 0.25), numbers(40))] == [20, 30]
    assert [event.step for event in checked_events(SparsitySchedule(10, 30, 10), numbers(float("inf")))] == [20, 30]
    assert [event.step for event in checked_events(SparsitySchedule(10, 30, 10), numbers(3, fast=True))] == [3]
    for trainer in (numbers(float("inf")), numbers(-1), numbers(40, automatic=False)):
        with pytest.raises(MisconfigurationException, match="fractions of the training"):
            checked_events(SparsitySchedule(0.25, 0.75, 0.25), trainer)
    with pytest.raises(MisconfigurationException, match="at optimizer step 20, but the training has 19 steps"):
        checked_events(SparsitySchedule(20, 20, 1), numbers(19))
    with pytest.warns(
        UserWarning, match="schedule's last event is at optimizer step 20, the last of .*: no step is left"
    ):
        checked_events(SparsitySchedule(20, 20, 1), numbers(20))
    with pytest.warns(
        UserWarning, match="step 30, but the training has 25 steps: the final sparsity will not be reached"
    ):
        checked_events(SparsitySchedule(10, 30, 10), numbers(25))
    with (
        pytest.warns(UserWarning, match="the last event of the training is at optimizer step 20, the last of the"),
        pytest.warns(UserWarning, match="the final sparsity will not be reached"),
    ):
        checked_events(SparsitySchedule(10, 30, 10), numbers(20))
