"""Gives layers unequal sparsities that together meet one budget of zeros."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from thanos_lightning.models.targets import PrunableLayer
from thanos_lightning.plan.budget import by_loss, in_units
from thanos_lightning.solver import Channels, Experts, Pattern

By = Literal["loss", "uniform"]

SPARSEST_TRIED = 0.95  # a scan tries no higher sparsity
_DEVIATION = 0.15  # how far a layer's sparsity may be from the overall sparsity


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
    layers: Mapping[str, PrunableLayer],
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
