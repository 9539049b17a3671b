"""Shares one budget of zeros among layers, by pure functions of numbers.

Each layer has a number of weights and a cost of pruning them. `by_outliers` is OWL (Yin et al., arXiv 2310.05175,
section 3.2). `by_loss` minimises the sum of the losses that a solver predicts at a few sparsities. Both meet the budget
exactly, in weights.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Mapping, Sequence

_RESOLUTION = 200  # grid steps from sparsity 0 to 1 at which the loss between the levels is interpolated


def by_outliers(
    outlier_ratios: Mapping[str, float],
    sizes: Mapping[str, int],
    budget: int,
    deviation: float,
    lowest: float | Mapping[str, float] = 0.0,
    highest: float | Mapping[str, float] = 1.0,
) -> dict[str, int]:
    """Choose how many weights of each layer to prune: the more outliers, the fewer.

    The kept fraction of a layer is linear in the layer's outlier ratio. All kept fractions span an interval of width
    2·deviation, which is shifted until the budget is met. A layer that a shift takes beyond a limit stays at the limit.

    Args:
        outlier_ratios: Layer -> fraction of its scores |W|·‖X‖ that exceed a multiple of their mean.
        sizes: Layer -> number of its weights.
        budget: Number of weights to prune, in all layers together.
        deviation: λ of the paper.
        lowest: Smallest sparsity of a layer: one number for all layers, or layer -> sparsity.
        highest: Largest sparsity of a layer: one number for all layers, or layer -> sparsity.

    Returns:
        Layer -> number of pruned weights. Their sum is the budget.

    Raises:
        ValueError: If the limits exclude the budget. The message names the closest sparsity within the limits.

    Examples:
        >>> by_outliers({"a": 0.0, "b": 0.1}, {"a": 100, "b": 100}, 100, deviation=0.1)
        {'a': 60, 'b': 40}
    """
    fewest = min(outlier_ratios.values())
    spread = max(outlier_ratios.values()) - fewest
    kept = {
        name: 2 * deviation * (ratio - fewest) / spread if spread else 0.0 for name, ratio in outlier_ratios.items()
    }
    lows, tops = _of_each(lowest, sizes), _of_each(highest, sizes)
    _limits(budget, sizes, lows, tops)

    def moved(shift: float) -> dict[str, float]:
        return {name: min(max(1 - shift - kept[name], lows[name]), tops[name]) * size for name, size in sizes.items()}

    # Bisection: the larger the shift of the kept fractions, the fewer weights are pruned
    less, more = -2.0, 1.0
    for _ in range(60):
        middle = (less + more) / 2
        less, more = (middle, more) if sum(moved(middle).values()) > budget else (less, middle)
    return _whole(moved(more), sizes, budget)


def by_loss(
    losses: Mapping[str, Mapping[float, float]],
    sizes: Mapping[str, int],
    budget: int,
    lowest: float | Mapping[str, float] = 0.0,
    highest: float | Mapping[str, float] | None = None,
) -> dict[str, int]:
    """Choose how many weights of each layer to prune, so that the sum of the predicted losses is minimal.

    The logarithm of a loss is interpolated linearly between the levels. The lower convex hull of this interpolated loss
    makes the greedy choice optimal: it always prunes where the next weight costs least. At the optimum, one more weight
    costs equally much in all layers within their limits.

    Args:
        losses: Layer -> sparsity of each level in (0, 1] -> predicted loss, at least two levels. A dense layer loses 0.
        sizes: Layer -> number of its weights.
        budget: Number of weights to prune, in all layers together.
        lowest: Smallest sparsity of a layer: one number for all layers, or layer -> sparsity.
        highest: Largest sparsity of a layer, in the same form. None stands for the layer's last level.

    Returns:
        Layer -> number of pruned weights. Their sum is the budget.

    Raises:
        ValueError: If the limits exclude the budget. The message names the closest sparsity within the limits.

    Examples:
        >>> losses = {"cheap": {0.25: 1.0, 0.5: 2.0, 0.75: 4.0}, "dear": {0.25: 10.0, 0.5: 20.0, 0.75: 40.0}}
        >>> by_loss(losses, {"cheap": 100, "dear": 100}, 100)
        {'cheap': 75, 'dear': 25}
    """
    lows = _of_each(lowest, sizes)
    tops = {name: max(losses[name]) for name in sizes} if highest is None else _of_each(highest, sizes)
    least, most = _limits(budget, sizes, lows, tops)
    counts = dict(least)
    left = budget - sum(counts.values())
    hulls = {name: _hull(losses[name], lows[name], most[name] / size) for name, size in sizes.items()}
    # (loss per weight, layer, number of the segment)
    queue = [(hull[0][1] / sizes[name], name, 0) for name, hull in hulls.items() if hull]
    heapq.heapify(queue)
    while left:
        _, name, index = heapq.heappop(queue)
        is_last = index + 1 == len(hulls[name])
        until = most[name] if is_last else round(hulls[name][index][0] * sizes[name])
        taken = min(left, max(0, until - counts[name]))
        counts[name] += taken
        left -= taken
        if not is_last:
            heapq.heappush(queue, (hulls[name][index + 1][1] / sizes[name], name, index + 1))
    return counts


def loss_at(levels: Mapping[float, float], sparsity: float) -> float:
    """The loss at a sparsity: log-linear between the levels and beyond the last, linear from 0 to the first.

    Args:
        levels: Sparsity of each level in (0, 1] -> loss. A single level makes the loss linear everywhere.
        sparsity: The sparsity at which the loss is interpolated.

    Examples:
        >>> round(loss_at({0.25: 1.0, 0.75: 4.0}, 0.5), 6)
        2.0
    """
    known: Sequence[tuple[float, float]] = sorted(levels.items())
    if sparsity <= known[0][0] or len(known) == 1:
        return known[0][1] * sparsity / known[0][0]
    right = next((index for index, (level, _) in enumerate(known) if level >= sparsity), len(known) - 1)
    (a, loss_a), (b, loss_b) = known[right - 1], known[right]
    tiny = 1e-30
    x = (sparsity - a) / (b - a)
    return math.exp((1 - x) * math.log(max(loss_a, tiny)) + x * math.log(max(loss_b, tiny)))


def _hull(levels: Mapping[float, float], lowest: float, highest: float) -> list[tuple[float, float]]:
    """Segments of the lower convex hull of a loss, as (sparsity at the segment's end, slope). Slopes rise."""
    grid = [step / _RESOLUTION for step in range(_RESOLUTION + 1)]
    points = [lowest, *(x for x in grid if lowest < x < highest), highest]
    corners: list[tuple[float, float]] = []
    for x in points:
        corner = (x, loss_at(levels, x))
        while len(corners) >= 2 and _slope(corners[-2], corners[-1]) >= _slope(corners[-1], corner):
            corners.pop()
        corners.append(corner)
    return [(end[0], _slope(start, end)) for start, end in itertools.pairwise(corners) if end[0] > start[0]]


def _slope(start: tuple[float, float], end: tuple[float, float]) -> float:
    return math.inf if end[0] == start[0] else (end[1] - start[1]) / (end[0] - start[0])


def in_units(counts: Mapping[str, int], units: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """Round counts to whole units of each layer, such as rows. The next layer makes up for the rounding error.

    The sums of weights before and after differ by half a unit at most, unless a layer lacks units.

    Args:
        counts: Layer -> number of weights.
        units: Layer -> (weights in a unit, units in the layer).

    Returns:
        Layer -> number of units.

    Examples:
        >>> in_units({"a": 14, "b": 14, "c": 14}, dict.fromkeys("abc", (10, 5)))
        {'a': 1, 'b': 2, 'c': 1}
    """
    rounded, carried = {}, 0
    for name, count in counts.items():
        size, most = units[name]
        rounded[name] = min(most, max(0, round((count + carried) / size)))
        carried += count - rounded[name] * size
    return rounded


def _of_each(limit: float | Mapping[str, float], sizes: Mapping[str, int]) -> Mapping[str, float]:
    return limit if isinstance(limit, Mapping) else dict.fromkeys(sizes, limit)


def _limits(
    budget: int, sizes: Mapping[str, int], lowest: Mapping[str, float], highest: Mapping[str, float]
) -> tuple[dict[str, int], dict[str, int]]:
    """The fewest and the most pruned weights of each layer. Their sums must enclose the budget."""
    # A limit may be a count over the layer's size: the slack makes it the same count again
    slack = {name: 1e-9 + 1e-12 * size for name, size in sizes.items()}
    least = {name: math.ceil(lowest[name] * size - slack[name]) for name, size in sizes.items()}
    most = {name: max(least[name], math.floor(highest[name] * size + slack[name])) for name, size in sizes.items()}
    if not sum(least.values()) <= budget <= sum(most.values()):
        total = sum(sizes.values())
        closest = sum((least if budget < sum(least.values()) else most).values()) / total
        raise ValueError(
            f"a sparsity of {budget / total:.4f} can't be met where each layer's is between {min(lowest.values())} and "
            f"{max(highest.values())}: the closest is {closest:.4f}. Widen the limits, or ask for that"
        )
    return least, most


def _whole(wanted: Mapping[str, float], sizes: Mapping[str, int], budget: int) -> dict[str, int]:
    """Round to whole numbers with a given sum: the largest remainders are rounded up."""
    counts = {name: min(sizes[name], math.floor(count + 1e-9)) for name, count in wanted.items()}
    missing = budget - sum(counts.values())
    by_remainder = sorted(wanted, key=lambda name: counts[name] - wanted[name])
    for name in [name for name in by_remainder if counts[name] < sizes[name]][:missing]:
        counts[name] += 1
    return counts
