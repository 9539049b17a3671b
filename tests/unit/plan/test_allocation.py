from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thanos_lightning.plan.allocation import Allocation
from thanos_lightning.plan.budget import by_loss, by_outliers, in_units

property_based = settings(deadline=None, derandomize=True, max_examples=60)


def curve(scale: float, rate: float) -> dict[float, float]:
    """scale · (e^(rate·s) - 1) / rate at a few sparsities s: convex, and 0 where nothing is pruned."""
    return {level: scale * math.expm1(rate * level) / rate for level in (0.2, 0.4, 0.6, 0.8)}


@given(
    st.lists(st.tuples(st.floats(0.1, 10), st.floats(0.5, 8), st.integers(10, 5000)), min_size=1, max_size=6),
    st.floats(0.2, 0.79),
)
@property_based
def test_the_budget_is_met_to_the_weight(layers: list[tuple[float, float, int]], sparsity: float) -> None:
    sizes = {str(index): size for index, (_, _, size) in enumerate(layers)}
    losses = {str(index): curve(scale, rate) for index, (scale, rate, _) in enumerate(layers)}
    budget = min(int(sparsity * sum(sizes.values())), sum(int(0.8 * size) for size in sizes.values()))
    counts = by_loss(losses, sizes, budget)
    assert sum(counts.values()) == budget
    assert all(0 <= counts[name] <= 0.8 * sizes[name] + 1e-6 for name in sizes)
    ratios = {str(index): scale for index, (scale, _, _) in enumerate(layers)}
    counts = by_outliers(ratios, sizes, budget, deviation=0.05)
    assert sum(counts.values()) == budget
    for one, other in itertools.permutations(sizes, 2):
        if ratios[one] > ratios[other]:
            assert counts[one] / sizes[one] <= counts[other] / sizes[other] + 1 / sizes[one] + 1 / sizes[other]


def test_the_sum_of_losses_is_least() -> None:
    """Against all allocations of three layers in steps of 2 %, by the curves themselves."""
    shapes = {"a": (1.0, 3.0), "b": (0.2, 6.0), "c": (3.0, 1.0)}
    sizes = {"a": 1000, "b": 2000, "c": 500}
    budget = 1750

    def loss(counts: dict[str, float]) -> float:
        return sum(
            scale * math.expm1(rate * counts[name] / sizes[name]) / rate for name, (scale, rate) in shapes.items()
        )

    fine = {
        name: {level / 40: scale * math.expm1(rate * level / 40) / rate for level in range(1, 37)}
        for name, (scale, rate) in shapes.items()
    }
    best = min(
        loss({"a": a, "b": b, "c": budget - a - b})
        for a in range(0, 901, 20)
        for b in range(0, 1801, 40)
        if 0 <= budget - a - b <= 450
    )
    found = by_loss(fine, sizes, budget)
    assert loss(found) <= best * 1.002
    uniform = loss({name: size / 2 for name, size in sizes.items()})
    assert loss(found) < 0.9 * uniform
    # at a few levels it is nearly as good
    coarse = {name: curve(*shape) for name, shape in shapes.items()}
    assert loss(by_loss(coarse, sizes, budget)) <= best * 1.05


def test_limits_hold() -> None:
    losses = {"cheap": curve(0.01, 1.0), "dear": curve(10.0, 1.0)}
    sizes = {"cheap": 1000, "dear": 1000}
    assert by_loss(losses, sizes, 1000) == {"cheap": 800, "dear": 200}
    assert by_loss(losses, sizes, 1000, lowest=0.4, highest=0.7) == {"cheap": 600, "dear": 400}
    assert by_loss(losses, sizes, 800, lowest=0.4) == {"cheap": 400, "dear": 400}
    assert by_loss(losses, sizes, 800, {"cheap": 0.0, "dear": 0.3}, {"cheap": 0.5, "dear": 1.0}) == {
        "cheap": 500,
        "dear": 300,
    }


@pytest.mark.parametrize(("budget", "closest"), [(700, "0.4000"), (1300, "0.6000")])
def test_the_closest_budget_is_named(budget: int, closest: str) -> None:
    losses = {"a": curve(1.0, 1.0), "b": curve(2.0, 1.0)}
    with pytest.raises(ValueError, match=rf"between 0.4 and 0.6: the closest is {closest}"):
        by_loss(losses, {"a": 1000, "b": 1000}, budget, lowest=0.4, highest=0.6)


def test_outliers_move_kept_fractions_by_the_deviation() -> None:
    ratios, sizes = {"a": 0.0, "b": 0.02, "c": 0.04}, {"a": 1000, "b": 1000, "c": 1000}
    assert by_outliers(ratios, sizes, 1500, deviation=0.1) == {"a": 600, "b": 500, "c": 400}
    assert by_outliers(dict.fromkeys(sizes, 0.1), sizes, 1501, 0.1) == {"a": 501, "b": 500, "c": 500}


def test_what_outliers_take_beyond_a_limit_stays_at_it() -> None:
    ratios, sizes = {"a": 0.0, "b": 0.02, "c": 0.04}, {"a": 1000, "b": 1000, "c": 1000}
    assert by_outliers(ratios, sizes, 1500, 0.1, lowest=0.45) == {"a": 575, "b": 475, "c": 450}
    assert by_outliers(ratios, sizes, 1500, 0.1, highest=0.55) == {"a": 550, "b": 525, "c": 425}
    assert by_outliers(ratios, sizes, 2850, 0.1) == {"a": 1000, "b": 975, "c": 875}
    # of thirty layers one is nearly twice the deviation away from all
    one = {str(index): float(index == 0) for index in range(30)}
    assert by_outliers(one, dict.fromkeys(one, 1000), 18000, 0.15)["0"] == 310
    assert Allocation("owl").limits(0.6) == (0.44, 0.76)  # the paper's 0.08
    for budget, closest in ((1000, "0.4000"), (2000, "0.6000")):
        with pytest.raises(ValueError, match=rf"between 0.4 and 0.6: the closest is {closest}"):
            by_outliers(ratios, sizes, budget, 0.1, lowest=0.4, highest=0.6)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9)), min_size=1, max_size=8))
@property_based
def test_whole_units_have_the_sum_to_half_a_unit(layers: list[tuple[int, int]]) -> None:
    counts = {str(index): count for index, (count, _) in enumerate(layers)}
    units = {str(index): (size, 100) for index, (_, size) in enumerate(layers)}
    found = in_units(counts, units)
    left = sum(counts.values()) - sum(found[name] * units[name][0] for name in counts)
    assert abs(left) <= max(size for size, _ in units.values()) / 2
    for name, (size, _) in units.items():
        assert abs(found[name] - counts[name] / size) <= 0.5 + max(other for other, _ in units.values()) / (2 * size)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"by": "size"}, "by is 'size': choose one of 'loss', 'owl'"),
    ],
)
def test_an_allocation_that_can_not_be_right_is_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Allocation(**arguments)
