"""Shares one budget of zeros among layers, by pure functions of numbers.

Each layer has a number of weights, and losses that a solver predicts at a few sparsities.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

_RESOLUTION = 200  # grid steps from sparsity 0 to 1 at which the loss between the levels is interpolated


def by_loss(
    losses: Mapping[str, Mapping[float, float]],
    sizes: Mapping[str, int],
    budget: int,
    lowest: Mapping[str, float],
    highest: Mapping[str, float],
) -> dict[str, int]:
    """Choose how many weights of each layer to prune, so that the sum of the predicted losses is minimal.

    The logarithm of a loss is interpolated linearly between the levels. The lower convex hull of this interpolated loss
    makes the greedy choice optimal: it always prunes where the next weight costs least. At the optimum, one more weight
    costs equally much in all layers within their limits. Slopes of a hull rise, so that its segments come in order.

    `losses` has the predicted loss of each layer at two levels or more, sparsities in (0, 1]; a dense layer loses 0.
    `sizes` has the number of a layer's weights, `lowest` and `highest` its least and its largest sparsity. `budget` is
    the number of weights to prune in all layers together, within the sums of these limits.
    """
    least, most = _limits(budget, sizes, lowest, highest)
    counts = dict(least)
    left = budget - sum(counts.values())
    hulls = {name: _hull(losses[name], lowest[name], most[name] / size) for name, size in sizes.items()}
    segments = sorted(
        (slope / sizes[name], name, number, end)
        for name, hull in hulls.items()
        for number, (end, slope) in enumerate(hull, 1)
    )
    for _, name, number, end in segments:
        until = most[name] if number == len(hulls[name]) else round(end * sizes[name])
        taken = min(left, max(0, until - counts[name]))
        counts[name] += taken
        left -= taken
    return counts


def loss_at(levels: Mapping[float, float], sparsity: float) -> float:
    """The loss at a sparsity: log-linear between the levels and beyond the last, linear from 0 to the first.

    `levels` maps sparsities in (0, 1] to losses. A single level makes the loss linear everywhere.

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
    """Turn each layer's count of weights into a count of whole units, such as rows.

    The next layer makes up for the rounding error. The sums of weights before and after differ by half a unit at most,
    unless a layer lacks units.
    `units` maps each layer to (weights in a unit, units in the layer).
    """
    rounded, carried = {}, 0
    for name, count in counts.items():
        size, most = units[name]
        rounded[name] = min(most, max(0, round((count + carried) / size)))
        carried += count - rounded[name] * size
    return rounded


def _limits(
    budget: int, sizes: Mapping[str, int], lowest: Mapping[str, float], highest: Mapping[str, float]
) -> tuple[dict[str, int], dict[str, int]]:
    """The fewest and the most pruned weights of each layer. Their sums enclose the budget."""
    # A limit may be a count over the layer's size: the slack makes it the same count again
    slack = {name: 1e-9 + 1e-12 * size for name, size in sizes.items()}
    least = {name: math.ceil(lowest[name] * size - slack[name]) for name, size in sizes.items()}
    most = {name: max(least[name], math.floor(highest[name] * size + slack[name])) for name, size in sizes.items()}
    assert sum(least.values()) <= budget <= sum(most.values()), "equal sparsities are within the limits"
    return least, most
