from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from thanos_lightning.plan.allocation import by_loss, in_units

property_based = settings(derandomize=True, max_examples=60)


def loss_at(level: float, scale: float, rate: float) -> float:
    """scale · (e^(rate·s) - 1) / rate at a sparsity s: convex, and 0 where nothing is pruned."""
    return scale * math.expm1(rate * level) / rate


def curve(scale: float, rate: float, levels: Sequence[float] = (0.2, 0.4, 0.6, 0.8)) -> dict[float, float]:
    return {level: loss_at(level, scale, rate) for level in levels}


def share(
    losses: Mapping[str, Mapping[float, float]],
    sizes: Mapping[str, int],
    budget: int,
    lowest: float = 0.0,
    highest: float = 0.8,
) -> dict[str, int]:
    """Every layer has the same limits."""
    return by_loss(losses, sizes, budget, dict.fromkeys(sizes, lowest), dict.fromkeys(sizes, highest))


@given(
    st.lists(st.tuples(st.floats(0.1, 10), st.floats(0.5, 8), st.integers(10, 5000)), min_size=1, max_size=6),
    st.floats(0.2, 0.79),
)
@property_based
def test_the_budget_is_met_to_the_weight(layers: list[tuple[float, float, int]], sparsity: float) -> None:
    sizes = {str(index): size for index, (_, _, size) in enumerate(layers)}
    losses = {str(index): curve(scale, rate) for index, (scale, rate, _) in enumerate(layers)}
    budget = min(int(sparsity * sum(sizes.values())), sum(int(0.8 * size) for size in sizes.values()))
    counts = share(losses, sizes, budget)
    assert sum(counts.values()) == budget
    assert all(0 <= counts[name] <= 0.8 * sizes[name] + 1e-6 for name in sizes)


def test_the_sum_of_losses_is_least() -> None:
    """Against all allocations of three layers in steps of 2 %, by the curves themselves."""
    shapes = {"a": (1.0, 3.0), "b": (0.2, 6.0), "c": (3.0, 1.0)}
    sizes = {"a": 1000, "b": 2000, "c": 500}
    budget = 1750

    def loss(counts: dict[str, float]) -> float:
        return sum(loss_at(counts[name] / sizes[name], *shape) for name, shape in shapes.items())

    best = min(
        loss({"a": a, "b": b, "c": budget - a - b})
        for a in range(0, 901, 20)
        for b in range(0, 1801, 40)
        if 0 <= budget - a - b <= 450
    )
    fine = {name: curve(*shape, [level / 40 for level in range(1, 37)]) for name, shape in shapes.items()}
    assert loss(share(fine, sizes, budget, highest=0.9)) <= best * 1.002
    coarse = {name: curve(*shape) for name, shape in shapes.items()}
    assert loss(share(coarse, sizes, budget)) <= best * 1.05


def test_limits_hold() -> None:
    losses = {"cheap": curve(0.01, 1.0), "dear": curve(10.0, 1.0)}
    sizes = {"cheap": 1000, "dear": 1000}
    assert share(losses, sizes, 1000) == {"cheap": 800, "dear": 200}
    assert share(losses, sizes, 1000, lowest=0.4, highest=0.7) == {"cheap": 600, "dear": 400}
    assert share(losses, sizes, 800, lowest=0.4) == {"cheap": 400, "dear": 400}
    limits = {"cheap": 0.0, "dear": 0.3}, {"cheap": 0.5, "dear": 1.0}
    assert by_loss(losses, sizes, 800, *limits) == {"cheap": 500, "dear": 300}


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
