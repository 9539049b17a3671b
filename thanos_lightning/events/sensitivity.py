"""The sensitivity scan before the first event, which finds what each layer would lose, for an allocation.

The scan changes no weight. As in pruning, owners receive the sums of their layers and solve them.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from torch import Tensor

from thanos_lightning.calibration.moments import Moments
from thanos_lightning.models.targets import PrunableLayer
from thanos_lightning.plan.allocation import LayerSensitivity
from thanos_lightning.plan.windows import Window
from thanos_lightning.report.progress import open_phase
from thanos_lightning.sharding.access import ParameterAccess
from thanos_lightning.sharding.adapters import collect
from thanos_lightning.sharding.lending import lend, lenders
from thanos_lightning.sharding.owners import sum_on_owners, tokens_seen
from thanos_lightning.sharding.together import KeptError, reserve
from thanos_lightning.solver import Experts, Pattern
from thanos_lightning.solver.factors import Factors, FactorsInTurn
from thanos_lightning.solver.layer import SolverOptions, losses_at, relative


def scan_window(
    window: Window,
    layers: Mapping[str, PrunableLayer],
    moments: Moments,
    *,
    access: ParameterAccess,
    options: SolverOptions,
    tried: Mapping[str, Sequence[Pattern]],
) -> dict[str, LayerSensitivity]:
    """Scan the layers of a window, and return name -> sensitivity. All ranks must call it, and return the same.

    `tried` has the patterns whose losses the scan computes for each layer. The scan skips ADMM and refinement, which
    change little between layers. It passes by experts that may go as a whole.

    Raises:
        PruningError: On all ranks, if no layer saw a token, the solver fails or a rank lacks memory.
    """
    assert moments.accumulators is not None, "refused where a method has no statistics"
    tokens = tokens_seen(layers, moments.accumulators, access)
    solved = {name: layer for name, layer in layers.items() if not isinstance(window.patterns[name], Experts)}
    lent = lenders(solved, tokens)
    chosen = {name: layer for name, layer in solved.items() if tokens[name] or name in lent}
    owners = moments.owners
    counted = {name: layer for name, layer in chosen.items() if tokens[name]}
    sums = sum_on_owners(counted, moments.accumulators, tokens, owners, access, stay=moments.stay)
    lend(sums, lent, layers, tokens, owners, access)
    in_fp32 = {name: 4 * layer.rows * layer.cols for name, layer in chosen.items() if owners[name] == access.rank}
    reserve(in_fp32, access)
    weights = {name: collect(layer, owners[name], access) for name, layer in chosen.items()}
    scanned: dict[str, LayerSensitivity] = {}
    kept = KeptError(access)
    mine, in_turn = [name for name in chosen if weights[name] is not None], FactorsInTurn()
    with open_phase("Finding out what each layer would lose", len(mine), "layers") as phase:
        for name, following in itertools.zip_longest(mine, mine[1:]):
            weight = weights.pop(name)
            assert weight is not None
            with kept.keeping(layer=name):
                inputs = in_turn.take(sums.pop(name), None if following is None else sums[following])
                scanned[name] = _scan_layer(
                    weight.merged(), inputs, tried[name], options, moments.output_weights.get(name)
                )
                phase.advance(note=name)
            if kept.error is not None:
                break
    kept.fail_together()
    unknown = {name: LayerSensitivity({}) for name in layers if name not in chosen}
    return unknown | access.union(scanned)


def _scan_layer(
    weight: Tensor, inputs: Factors, tried: Sequence[Pattern], options: SolverOptions, output_weights: Tensor | None
) -> LayerSensitivity:
    if output_weights is not None:
        output_weights = output_weights.to(weight.device)
    of_rows, dense = losses_at(weight, inputs, tried, options, output_weights)
    losses: dict[float, float] = {}
    weighted: dict[float, float] = {}
    for level, lost in zip(tried, of_rows, strict=True):
        losses[level.sparsity] = relative(float(lost.sum()), float(dense.sum()))
        if output_weights is not None:
            weighted[level.sparsity] = float(output_weights.to(lost.dtype) @ lost)
    return LayerSensitivity(losses, weighted or None)
