"""Layers of unequal sparsity, which share one budget of zeros."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from thanos_lightning.models.targets import PrunableLayer
from thanos_lightning.plan.budget import by_loss, by_outliers, in_units
from thanos_lightning.solver import NM, Pattern, Structured, Unstructured

By = Literal["loss", "outliers"]

# How far a layer's sparsity may be from that of all. For "outliers" it is λ of the paper, half the distance between the
# sparsest layer and the densest, of which one may be nearly all of it away from that of all.
_DEVIATIONS: Mapping[By, float] = {"loss": 0.15, "outliers": 0.08}

SPARSEST_TRIED = 0.95  # no layer is looked at beyond this sparsity

# Between limits that are nearer, the logarithm of a loss is linear enough: allocated by what they lose at 45 and 75 %,
# SmolLM2-135M's layers lose 0.2 % more at 60 % than the best that five levels find; with 60 % for a third, 0.1 %.
_WIDE = 0.35


@dataclass(frozen=True)
class Allocation:
    """Layers of unequal sparsity, together as sparse as the pattern asks for, to the weight (N:M: to the row).

    Args:
        by: "loss" minimises the sum of the layers' losses, as the solver predicts them at a few sparsities right before
            the first event: with the callback's output weights, else relative losses. "outliers" is OWL, and keeps
            more of the decoder layers in which more weights score five times the mean. The sparsity of a layer is at
            most 0.15 from that of all by loss, and 0.16 by outliers, but for a row or a column of N:M and structured
            layers.

    Raises:
        ValueError: If it is by neither.

    Examples:
        >>> Allocation("loss").limits(0.95)
        (0.8, 1.0)
    """

    by: By = "loss"

    def __post_init__(self) -> None:
        if self.by not in get_args(By):
            raise ValueError(f"by is {self.by!r}: choose one of {', '.join(map(repr, get_args(By)))}")

    def limits(self, sparsity: float) -> tuple[float, float]:
        """The smallest and the largest sparsity of a layer, where all together have this one."""
        away = _DEVIATIONS["loss"] if self.by == "loss" else 2 * _DEVIATIONS["outliers"]
        return max(0.0, round(sparsity - away, 12)), min(1.0, round(sparsity + away, 12))


def check_allocation(pattern: Pattern) -> None:
    """Refuse an allocation that can't be met.

    Raises:
        ValueError: Naming what leaves nothing to allocate.
    """
    if isinstance(pattern, NM) and not pattern.outlier_fraction:
        raise ValueError(
            f"{pattern.name} in all rows of all layers leaves nothing to allocate: give the outlier_fraction of the "
            "rows of all layers together that are to stay dense"
        )
    if pattern.sparsity >= (most := sparsest(pattern).sparsity):
        raise ValueError(
            f"a sparsity of {pattern.sparsity} leaves nothing to allocate, since no layer is looked at beyond "
            f"{most:g}: leave the allocation out, or ask for less"
        )


def default_allocation(pattern: Pattern) -> Allocation | None:
    """By loss; None where there is nothing to allocate.

    Examples:
        >>> from thanos_lightning.solver import Unstructured
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
    """What was found out about a layer.

    Attributes:
        losses: Sparsity -> relative loss of the layer if it were pruned to that; empty where no token has reached it.
        outliers: Fraction of its scores |W|·‖X‖ that are five times their mean.
        weighted_losses: Sparsity -> its loss with the output weights, which of several layers can be added up. None
            where it has no output weights.
    """

    losses: dict[float, float]
    outliers: float
    weighted_losses: dict[float, float] | None = None

    def state(self) -> dict[str, Any]:
        """Plain values, by the names of the attributes."""
        return asdict(self)


def levels(pattern: Pattern, lowest: float, highest: float) -> list[Pattern]:
    """Where a layer is tried: the limits of its sparsity, and between them the pattern itself if they are far apart.

    Args:
        pattern: Of all layers together.
        lowest: Smallest sparsity of a layer; where it is 0, half the pattern's is looked at.
        highest: Largest sparsity of a layer.

    Examples:
        >>> [level.sparsity for level in levels(Unstructured(0.5), 0.375, 0.625)]
        [0.375, 0.625]
        >>> [level.sparsity for level in levels(NM(2, 4, outlier_fraction=0.25), 0.0, 1.0)]
        [0.1875, 0.5]
    """
    most = sparsest(pattern)
    first = pattern.with_sparsity(lowest or pattern.sparsity / 2)
    last = most.with_sparsity(min(highest, most.sparsity))
    between = [pattern] if last.sparsity - first.sparsity > _WIDE else []
    return list({level.sparsity: level for level in (first, *between, last)}.values())


def sparsest(pattern: Pattern) -> Pattern:
    """The pattern of the same kind with the most zeros that a layer is given."""
    match pattern:
        case NM():
            return replace(pattern, outlier_fraction=0.0)
        case Unstructured():
            return Unstructured(SPARSEST_TRIED)
        case Structured():
            return replace(pattern, sparsity=SPARSEST_TRIED * (1 - pattern.outlier_fraction))


def allocate(
    allocation: Allocation,
    sensitivities: Mapping[str, LayerSensitivity],
    layers: Mapping[str, PrunableLayer],
    final: Mapping[str, Pattern],
    pattern: Pattern,
) -> dict[str, Pattern]:
    """The final pattern of each layer, those of the main pattern sharing their budget.

    Args:
        allocation: How.
        sensitivities: Name -> what was found out.
        layers: Name -> layer.
        final: Name -> the final pattern where all are alike. Overridden ones stay as they are.
        pattern: The main pattern.

    Returns:
        As `final`; layers that stay dense are missing.
    """
    shared = {name: layers[name] for name, its in final.items() if its == pattern}
    sizes = {name: layer.rows * layer.cols for name, layer in shared.items()}
    alike = {name: pattern.num_pruned(layer.rows, layer.cols) for name, layer in shared.items()}
    budget = sum(alike.values())
    lowest, highest = allocation.limits(pattern.sparsity)
    if allocation.by == "outliers":
        lowest, highest = 0.0, 1.0
    highest = min(highest, sparsest(pattern).sparsity)
    # whole weights, rows and columns go beyond a limit that is the pattern's own sparsity by a fraction of one
    lows = {name: min(lowest, alike[name] / size) for name, size in sizes.items()}
    tops = {name: max(highest, alike[name] / size) for name, size in sizes.items()}
    if allocation.by == "loss":
        losses = {name: sensitivities[name].weighted_losses or {} for name in shared}
        if not all(losses.values()):
            losses = {name: sensitivities[name].losses for name in shared}
        counts = by_loss(losses, sizes, budget, lows, tops)
    else:
        ratios = _of_decoder_layers(sensitivities, sizes)
        counts = by_outliers(ratios, sizes, budget, _DEVIATIONS["outliers"], lowest=lows, highest=tops)
    wanted = in_units(counts, {name: _units(pattern, layer) for name, layer in shared.items()})
    allocated = {}
    for name, its in final.items():
        one = its if name not in shared else _with_units(its, wanted[name], layers[name])
        if one is not None:
            allocated[name] = one
    return allocated


def _of_decoder_layers(sensitivities: Mapping[str, LayerSensitivity], sizes: Mapping[str, int]) -> dict[str, float]:
    """The outlier ratio of the decoder layer that each layer is in: names up to their first number are its own."""
    groups: dict[str, list[str]] = {}
    for name in sizes:
        found = re.match(r".*?\.?\d+(?=\.)", name)
        groups.setdefault(found[0] if found else name, []).append(name)
    ratios = {}
    for names in groups.values():
        total = sum(sizes[name] for name in names)
        ratios.update(dict.fromkeys(names, sum(sensitivities[name].outliers * sizes[name] for name in names) / total))
    return {name: ratios[name] for name in sizes}


def _units(pattern: Pattern, layer: PrunableLayer) -> tuple[int, int]:
    """How many zeros of a layer come and go together, and how often: one, those of a row, or those of a column."""
    match pattern:
        case Unstructured():
            return 1, layer.rows * layer.cols
        case NM():
            return layer.cols // pattern.m * (pattern.m - pattern.n), layer.rows
        case Structured():
            return layer.rows - pattern.num_dense_rows(layer.rows), layer.cols - 1


def _with_units(pattern: Pattern, count: int, layer: PrunableLayer) -> Pattern | None:
    """A pattern of the same kind with so many zeros, rows that are not dense, or columns; None for none."""
    if not count:
        return None
    match pattern:
        case Unstructured():
            # a hair more, since what is left of a weight is dropped
            return Unstructured((count + 0.25) / (layer.rows * layer.cols))
        case NM():
            dense = layer.rows - count
            return replace(pattern, outlier_fraction=(dense + 0.25) / layer.rows if dense else 0.0)
        case Structured():
            return replace(pattern, sparsity=count * (1 - pattern.outlier_fraction) / layer.cols)
