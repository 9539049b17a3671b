"""Gives layers unequal sparsities that together meet one budget of zeros."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from thanos_lightning.models.targets import PrunableLayer
from thanos_lightning.plan.budget import by_loss, by_outliers, in_units
from thanos_lightning.solver import Pattern

By = Literal["loss", "owl"]

# How far a layer's sparsity may be from the overall sparsity. For "owl" this is λ of the paper: the sparsest and
# the densest layer are 2λ apart, so one of them may be nearly 2λ from the overall sparsity.
_DEVIATIONS: Mapping[By, float] = {"loss": 0.15, "owl": 0.08}

SPARSEST_TRIED = 0.95  # a scan tries no higher sparsity

# Nearer limits need no third level, since the logarithm of a loss is linear enough there. At 60 %, SmolLM2-135M's
# layers lose 0.2 % more with levels at 45 and 75 % than the best that five levels find, and 0.1 % more with 60 % added.
_WIDE = 0.35


@dataclass(frozen=True)
class Allocation:
    """Gives layers unequal sparsities that together meet the pattern's sparsity, to the weight (N:M: to the row).

    Args:
        by: "loss" minimises the sum of the layers' losses, which the solver predicts at a few sparsities right before
            the first event. The losses have the callback's output weights, or are relative without these. "owl"
            is OWL: decoder layers with more scores above five times the mean keep more weights. The sparsity of a
            layer is at most 0.15 from the overall sparsity by "loss", and 0.16 by "owl". N:M and structured
            layers may exceed this by a row or a column.

    Raises:
        ValueError: If `by` is neither.

    Examples:
        >>> Allocation("loss").limits(0.95)
        (0.8, 1.0)
    """

    by: By = "loss"

    def __post_init__(self) -> None:
        if self.by not in get_args(By):
            raise ValueError(f"by is {self.by!r}: choose one of {', '.join(map(repr, get_args(By)))}")

    def limits(self, sparsity: float) -> tuple[float, float]:
        """The smallest and the largest sparsity of a layer, for this overall sparsity."""
        away = _DEVIATIONS["loss"] if self.by == "loss" else 2 * _DEVIATIONS["owl"]
        return max(0.0, round(sparsity - away, 12)), min(1.0, round(sparsity + away, 12))


def check_allocation(pattern: Pattern) -> None:
    """Refuse a pattern that leaves nothing to allocate.

    Raises:
        ValueError: If the pattern is N:M in all rows, or not below the highest sparsity of a scan.
    """
    if not pattern.rows_compete:
        raise ValueError(
            f"{pattern.name} in all rows of all layers leaves nothing to allocate: give the outlier_fraction of the "
            "rows of all layers together that are to stay dense"
        )
    if pattern.sparsity >= (most := pattern.sparsest(SPARSEST_TRIED).sparsity):
        raise ValueError(
            f"a sparsity of {pattern.sparsity} leaves nothing to allocate, since no layer is looked at beyond "
            f"{most:g}: leave the allocation out, or ask for less"
        )


def default_allocation(pattern: Pattern) -> Allocation | None:
    """The default allocation, by loss; None if the pattern leaves nothing to allocate.

    Examples:
        >>> from thanos_lightning.solver import NM, Unstructured
        >>> default_allocation(Unstructured(0.6)), default_allocation(NM(2, 4))
        (Allocation(by='loss'), None)
    """
    try:
        check_allocation(pattern)
    except ValueError:
        return None
    return Allocation("loss")


@dataclass(frozen=True)
class LayerSensitivity:
    """The scan's result for a layer.

    Attributes:
        losses: Sparsity -> relative loss of the layer at that sparsity; empty if no token has reached the layer.
        outliers: Fraction of the layer's scores |W|·‖X‖ that exceed five times their mean.
        weighted_losses: Sparsity -> loss with the output weights. These losses of several layers can be added up. None
            if the layer has no output weights.
    """

    losses: dict[float, float]
    outliers: float
    weighted_losses: dict[float, float] | None = None

    def state(self) -> dict[str, Any]:
        """The attributes as plain values, by name."""
        return asdict(self)


def levels(pattern: Pattern, lowest: float, highest: float) -> list[Pattern]:
    """The levels that a scan tries: the limits of a layer's sparsity, and the pattern itself if they are far apart.

    Args:
        pattern: The pattern of all layers together.
        lowest: Smallest sparsity of a layer. If it is 0, the scan tries half the pattern's sparsity instead.
        highest: Largest sparsity of a layer.

    Examples:
        >>> from thanos_lightning.solver import NM, Unstructured
        >>> [level.sparsity for level in levels(Unstructured(0.5), 0.375, 0.625)]
        [0.375, 0.625]
        >>> [level.sparsity for level in levels(NM(2, 4, outlier_fraction=0.25), 0.0, 1.0)]
        [0.1875, 0.5]
    """
    most = pattern.sparsest(SPARSEST_TRIED)
    first = pattern.with_sparsity(lowest or pattern.sparsity / 2)
    last = most.with_sparsity(min(highest, most.sparsity))
    between = [pattern] if last.sparsity - first.sparsity > _WIDE else []
    return list({level.sparsity: level for level in (first, *between, last)}.values())


def allocate(
    allocation: Allocation,
    sensitivities: Mapping[str, LayerSensitivity],
    layers: Mapping[str, PrunableLayer],
    final: Mapping[str, Pattern],
    pattern: Pattern,
) -> dict[str, Pattern]:
    """The final pattern of each layer. Layers of the main pattern share one budget of zeros.

    Args:
        allocation: The rule to allocate by.
        sensitivities: Name -> the scan's result.
        layers: Name -> layer.
        final: Name -> the final pattern before the allocation. Overridden patterns stay as they are.
        pattern: The main pattern.

    Returns:
        Name -> the final pattern. Layers that stay dense are missing.
    """
    shared = {name: layers[name] for name, planned in final.items() if planned == pattern}
    sizes = {name: layer.rows * layer.cols for name, layer in shared.items()}
    alike = {name: pattern.num_pruned(layer.rows, layer.cols) for name, layer in shared.items()}
    budget = sum(alike.values())
    lowest, highest = allocation.limits(pattern.sparsity)
    if allocation.by == "owl":
        lowest, highest = 0.0, 1.0
    highest = min(highest, pattern.sparsest(SPARSEST_TRIED).sparsity)
    # Include the pattern's own count, which rounding to whole weights, rows or columns can take beyond a limit
    lows = {name: min(lowest, alike[name] / size) for name, size in sizes.items()}
    tops = {name: max(highest, alike[name] / size) for name, size in sizes.items()}
    if allocation.by == "loss":
        losses = {name: sensitivities[name].weighted_losses or {} for name in shared}
        if not all(losses.values()):
            losses = {name: sensitivities[name].losses for name in shared}
        counts = by_loss(losses, sizes, budget, lows, tops)
    else:
        ratios = _of_decoder_layers(sensitivities, sizes)
        counts = by_outliers(ratios, sizes, budget, _DEVIATIONS["owl"], lowest=lows, highest=tops)
    units = in_units(counts, {name: pattern.units(layer.rows, layer.cols) for name, layer in shared.items()})
    allocated = {}
    for name, planned in final.items():
        if name not in shared:
            allocated[name] = planned
        elif units[name]:
            allocated[name] = planned.with_units(units[name], layers[name].rows, layers[name].cols)
    return allocated


def _of_decoder_layers(sensitivities: Mapping[str, LayerSensitivity], sizes: Mapping[str, int]) -> dict[str, float]:
    """The outlier ratio of each layer's decoder layer. Names of one decoder layer agree up to their first number."""
    groups: dict[str, list[str]] = {}
    for name in sizes:
        found = re.match(r".*?\.?\d+(?=\.)", name)
        groups.setdefault(found[0] if found else name, []).append(name)
    ratios = {}
    for names in groups.values():
        total = sum(sizes[name] for name in names)
        ratios.update(dict.fromkeys(names, sum(sensitivities[name].outliers * sizes[name] for name in names) / total))
    return {name: ratios[name] for name in sizes}
