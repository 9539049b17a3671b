"""Gives layers unequal sparsities that together meet one budget of zeros."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from thanos_lightning.layers.targets import Layer
from thanos_lightning.solver import Channels, Experts, Pattern

By = Literal["loss", "uniform"]

SPARSEST_TRIED = 0.95  # a scan tries no higher sparsity
_DEVIATION = 0.15  # how far a layer's sparsity may be from the overall sparsity
_RESOLUTION = 200  # grid steps from sparsity 0 to 1 at which the loss between the levels is interpolated


@dataclass(frozen=True)
class Allocation:
    """How layers share the zeros of the pattern's sparsity.

    Args:
        by: "loss" gives layers unequal sparsities that together meet the pattern's sparsity, to the weight (N:M: to the
            row). It minimises the sum of the layers' losses, which the solver predicts at two sparsities right before
            the first event. The losses have the callback's output weights, or are relative without these. The sparsity
            of a layer is at most 0.15 from the overall sparsity; N:M and structured layers may exceed this by a row or
            a column. "uniform" gives all layers the same sparsity.

    Raises:
        ValueError: If `by` is neither.

    Examples:
        >>> Allocation("size")
        Traceback (most recent call last):
            ...
        ValueError: allocation.by is 'size': choose one of 'loss', 'uniform'
    """

    by: By = "loss"

    def __post_init__(self) -> None:
        if self.by not in get_args(By):
            raise ValueError(f"allocation.by is {self.by!r}: choose one of {', '.join(map(repr, get_args(By)))}")


def nothing_to_allocate(pattern: Pattern) -> str | None:
    """Why a pattern leaves nothing to allocate, and the mend; None if it leaves something."""
    if isinstance(pattern, Channels):
        return "channels go in equal number from each block, since a model has one width: leave the allocation out"
    if isinstance(pattern, Experts):
        return "experts go in equal number from each layer, since a model has one number: leave the allocation out"
    if not pattern.rows_compete:
        return (
            f"{pattern.name} in all rows of all layers leaves nothing to allocate: give the outlier_fraction of the "
            "rows of all layers together that are to stay dense"
        )
    if pattern.sparsity >= (most := pattern.sparsest(SPARSEST_TRIED).sparsity):
        return (
            f"a sparsity of {pattern.sparsity} leaves nothing to allocate, since no layer is looked at beyond "
            f"{most:g}: leave the allocation out, or ask for less"
        )
    return None


@dataclass(frozen=True)
class LayerSensitivity:
    """The scan's result for a layer."""

    losses: dict[float, float]  # sparsity -> relative loss of the layer; empty if no token has reached the layer
    # sparsity -> loss with the output weights, which can be added up over layers; None without such weights
    weighted_losses: dict[float, float] | None = None


def levels(pattern: Pattern) -> list[Pattern]:
    """The levels that a scan tries: the smallest and the largest sparsity that a layer may get.

    If a layer may stay dense, the first level has half the pattern's sparsity.
    """
    lowest, highest = _limits(pattern)
    first = pattern.with_sparsity(lowest or pattern.sparsity / 2)
    return [first, pattern.sparsest(SPARSEST_TRIED).with_sparsity(highest)]


def allocate(
    sensitivities: Mapping[str, LayerSensitivity],
    layers: Mapping[str, Layer],
    final: Mapping[str, Pattern],
    pattern: Pattern,
    unknown: Collection[str] = (),
) -> dict[str, Pattern]:
    """The final pattern of each layer. Layers of the main pattern share one budget of zeros.

    `final` holds the patterns before the allocation. Overridden patterns stay as they are, and so do those of the
    layers of which it is unknown what they lose. Layers that stay dense are missing from the result.
    """
    shared = {name: layers[name] for name, planned in final.items() if planned == pattern and name not in unknown}
    sizes = {name: layer.rows * layer.cols for name, layer in shared.items()}
    alike = {name: pattern.num_pruned(layer.rows, layer.cols) for name, layer in shared.items()}
    lowest, highest = _limits(pattern)
    # Include the pattern's own count, which rounding to whole weights, rows or columns can take beyond a limit
    lows = {name: min(lowest, alike[name] / size) for name, size in sizes.items()}
    tops = {name: max(highest, alike[name] / size) for name, size in sizes.items()}
    losses = {name: sensitivities[name].weighted_losses or {} for name in shared}
    if not all(losses.values()):
        losses = {name: sensitivities[name].losses for name in shared}
    counts = by_loss(losses, sizes, sum(alike.values()), lows, tops)
    units = in_units(counts, {name: pattern.units(layer.rows, layer.cols) for name, layer in shared.items()})
    allocated = {}
    for name, planned in final.items():
        if name not in shared:
            allocated[name] = planned
        elif units[name]:
            allocated[name] = planned.with_units(units[name], layers[name].rows, layers[name].cols)
    return allocated


def _limits(pattern: Pattern) -> tuple[float, float]:
    """The smallest and the largest sparsity of a layer."""
    lowest = max(0.0, round(pattern.sparsity - _DEVIATION, 12))
    highest = min(round(pattern.sparsity + _DEVIATION, 12), pattern.sparsest(SPARSEST_TRIED).sparsity)
    return lowest, highest


# One budget of zeros among layers: pure functions of numbers


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
    least, most = _counts_within(budget, sizes, lowest, highest)
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
        more = min(left, max(0, until - counts[name]))
        counts[name] += more
        left -= more
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


def _counts_within(
    budget: int, sizes: Mapping[str, int], lowest: Mapping[str, float], highest: Mapping[str, float]
) -> tuple[dict[str, int], dict[str, int]]:
    """The fewest and the most pruned weights of each layer. Their sums enclose the budget."""
    # A limit may be a count over the layer's size: the slack makes it the same count again
    slack = {name: 1e-9 + 1e-12 * size for name, size in sizes.items()}
    least = {name: math.ceil(lowest[name] * size - slack[name]) for name, size in sizes.items()}
    most = {name: max(least[name], math.floor(highest[name] * size + slack[name])) for name, size in sizes.items()}
    assert sum(least.values()) <= budget <= sum(most.values()), "equal sparsities are within the limits"
    return least, most
