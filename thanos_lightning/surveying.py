"""Before the first event: what each layer would lose, so that it can be decided how, and when, each is pruned.

Nothing is written. As for pruning, the sums go to the layers' owners, owners solve, all ranks learn all results.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from thanos_lightning.allocation import Allocation, by_loss, by_outliers, in_units
from thanos_lightning.progress import open_phase
from thanos_lightning.pruning import assign_owners, raise_everywhere, reserved, sum_on_owners, unseen_layers
from thanos_lightning.sharding import ParameterAccess
from thanos_lightning.solver import NM, HessianAccumulator, Pattern, Structured, Unstructured
from thanos_lightning.solver.factors import Factors, FactorsInTurn
from thanos_lightning.solver.layer import SolverOptions, losses_at, relative
from thanos_lightning.targets import PrunableLayer
from thanos_lightning.windows import Window

# OWL's M: a score is an outlier where it is so many times the mean (arXiv 2310.05175, section 3.1)
_OUTLIER = 5.0
MOST_SURVEYED = 0.95  # no layer is looked at beyond this sparsity
# Between limits that are nearer, the logarithm of a loss is linear enough: allocated by what they lose at 45 and 75 %,
# SmolLM2-135M's layers lose 0.2 % more at 60 % than the best that five levels find; with 60 % for a third, 0.1 %.
_WIDE = 0.35


@dataclass(frozen=True)
class LayerSurvey:
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


def survey_window(
    window: Window,
    layers: Mapping[str, PrunableLayer],
    accumulators: dict[str, HessianAccumulator],
    *,
    access: ParameterAccess,
    options: SolverOptions,
    tried: Mapping[str, Sequence[Pattern]],
    output_weights: Mapping[str, Tensor],
    joins_rows: bool = False,
    sums_stay: bool = False,
) -> dict[str, LayerSurvey]:
    """Look at the layers of a window. All ranks must call it.

    Args:
        window: The layers.
        layers: Name -> layer.
        accumulators: Name -> this rank's statistics. Emptied.
        access: How the strategy's parameters are reached.
        options: For the solver. Its steps after the method are left out: they change little between layers.
        tried: Name -> the patterns whose losses are found out.
        output_weights: See `prune_window`.
        joins_rows: See `prune_window`.
        sums_stay: Whether the statistics wait elsewhere for an event.

    Returns:
        Name -> what was found out, the same on all ranks.

    Raises:
        PruningError: On all ranks alike, if no layer saw a token or the solver fails.
    """
    chosen = {name: layers[name] for name in window.patterns}
    unseen = unseen_layers(chosen, accumulators, access)
    chosen = {name: layer for name, layer in chosen.items() if name not in unseen}
    owners = assign_owners(chosen, access.world_size, joined=joins_rows)
    sums = sum_on_owners(chosen, accumulators, owners, access, stay=sums_stay)
    in_fp32 = {name: 4 * layer.rows * layer.cols for name, layer in chosen.items() if owners[name] == access.rank}
    raise_everywhere(reserved(in_fp32, access), access)
    weights = {name: access.collect_weight(layer, owners[name]) for name, layer in chosen.items()}
    own: dict[str, LayerSurvey] = {}
    error: tuple[str, Exception] | None = None
    mine, in_turn = [name for name in chosen if weights[name] is not None], FactorsInTurn()
    with open_phase("Finding out what each layer would lose", len(mine), "layers") as phase:
        for name, following in itertools.zip_longest(mine, mine[1:]):
            weight = weights.pop(name)
            assert weight is not None
            try:
                inputs = in_turn.take(sums.pop(name), None if following is None else sums[following])
                own[name] = _survey(weight, inputs, tried[name], options, output_weights.get(name))
                phase.advance(note=name)
            except Exception as failure:  # out of memory too: the other ranks would wait for this one
                error = (name, failure)
                break
    raise_everywhere(error, access)
    unknown = {name: LayerSurvey({}, 0.0) for name in unseen}
    return unknown | {name: survey for found in access.gather(own) for name, survey in found.items()}


def _survey(
    weight: Tensor, inputs: Factors, tried: Sequence[Pattern], options: SolverOptions, output_weights: Tensor | None
) -> LayerSurvey:
    if output_weights is not None:
        output_weights = output_weights.to(weight.device)
    of_rows, dense = losses_at(weight, inputs, tried, options, output_weights)
    losses: dict[float, float] = {}
    weighted: dict[float, float] = {}
    for level, lost in zip(tried, of_rows, strict=True):
        losses[level.sparsity] = relative(float(lost.sum()), float(dense.sum()))
        if output_weights is not None:
            alone = output_weights if output_weights.ndim == 1 else output_weights.diagonal()
            weighted[level.sparsity] = float(alone.to(lost.dtype) @ lost)
    scores = weight.float().abs() * inputs.hessian.diagonal().to(torch.float32).sqrt()
    return LayerSurvey(losses, float((scores > _OUTLIER * scores.mean()).float().mean()), weighted or None)


def allocate(
    allocation: Allocation,
    surveys: Mapping[str, LayerSurvey],
    layers: Mapping[str, PrunableLayer],
    final: Mapping[str, Pattern],
    pattern: Pattern,
) -> dict[str, Pattern]:
    """The final pattern of each layer, those of the main pattern sharing their budget.

    Args:
        allocation: How.
        surveys: Name -> what was found out.
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
        losses = {name: surveys[name].weighted_losses or {} for name in shared}
        if not all(losses.values()):
            losses = {name: surveys[name].losses for name in shared}
        counts = by_loss(losses, sizes, budget, lows, tops)
    else:
        ratios = _of_decoder_layers(surveys, sizes)
        counts = by_outliers(ratios, sizes, budget, lowest=lows, highest=tops)
    wanted = in_units(counts, {name: _units(pattern, layer) for name, layer in shared.items()})
    allocated = {}
    for name, its in final.items():
        one = its if name not in shared else _with_units(its, wanted[name], layers[name])
        if one is not None:
            allocated[name] = one
    return allocated


def _of_decoder_layers(surveys: Mapping[str, LayerSurvey], sizes: Mapping[str, int]) -> dict[str, float]:
    """The outlier ratio of the decoder layer that each layer is in: names up to their first number are its own."""
    groups: dict[str, list[str]] = {}
    for name in sizes:
        found = re.match(r".*?\.?\d+(?=\.)", name)
        groups.setdefault(found[0] if found else name, []).append(name)
    ratios = {}
    for names in groups.values():
        total = sum(sizes[name] for name in names)
        ratios.update(dict.fromkeys(names, sum(surveys[name].outliers * sizes[name] for name in names) / total))
    return {name: ratios[name] for name in sizes}


def sparsest(pattern: Pattern) -> Pattern:
    """The pattern of the same kind with the most zeros that a layer is given."""
    match pattern:
        case NM():
            return replace(pattern, outlier_fraction=0.0)
        case Unstructured():
            return Unstructured(MOST_SURVEYED)
        case Structured():
            return replace(pattern, sparsity=MOST_SURVEYED * (1 - pattern.outlier_fraction))


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
