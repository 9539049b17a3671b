"""What pruning takes in memory beside the model, its gradients and its optimizer, by formulas."""

from __future__ import annotations

from collections.abc import Sequence

from thanos_lightning.models.targets import PrunableLayer
from thanos_lightning.sharding.owners import assign_owners
from thanos_lightning.solver import Pattern
from thanos_lightning.solver.layer import SolverOptions


def sharing(layers: Sequence[PrunableLayer]) -> list[list[PrunableLayer]]:
    """Layers by what they read, as a rule, which only a forward knows.

    Layers of one parent that are equally wide read the same (q, k, v; gate, up), but for the last one where it leads
    back to that width (o).

    Examples:
        >>> from torch import nn
        >>> from thanos_lightning.models.targets import find_targets
        >>> attention = nn.ModuleDict({name: nn.Linear(8, rows) for name, rows in (("q", 8), ("k", 4), ("o", 8))})
        >>> [[layer.name for layer in group] for group in sharing(list(find_targets(attention).values()))]
        [['q', 'k'], ['o']]
    """
    alike: dict[tuple[str, int], list[PrunableLayer]] = {}
    for layer in layers:
        alike.setdefault((layer.name.rpartition(".")[0], layer.cols), []).append(layer)
    groups = []
    for group in alike.values():
        leads_back = len(group) > 1 and group[-1].rows == group[-1].cols
        groups += [group[:-1], group[-1:]] if leads_back else [group]
    return groups


def moments_bytes(layers: Sequence[PrunableLayer], *, coupled: bool = False) -> int:
    """Of the second moments of a window, on each rank.

    Args:
        layers: Of the window.
        coupled: Whether there are those of each two outputs, too.
    """
    inputs = sum(group[0].cols ** 2 for group in sharing(layers))
    return 4 * (inputs + coupled * sum(layer.rows**2 for layer in layers))


def event_bytes(
    layers: Sequence[PrunableLayer],
    options: SolverOptions,
    *,
    ranks: int = 1,
    coupled: bool = False,
    pattern: Pattern | None = None,
    gathers: bool = False,
    again: bool = False,
) -> int:
    """At the peak of a window's end, on the rank that needs most, its second moments included.

    Args:
        layers: Of the window, in the order in which they are pruned.
        options: Of the solver.
        ranks: Their number.
        coupled: Whether rows are coupled.
        pattern: What most are pruned to.
        gathers: Whether a layer's owner gets a copy of its weight, as of one that is sharded.
        again: Whether the layers have masks already.
    """
    counts = options.needs_statistics
    moments = moments_bytes(layers, coupled=coupled) if counts else 0
    owners = assign_owners({layer.name: layer for layer in layers}, ranks, coupled=coupled)
    peak = moments
    for rank in set(owners.values()):
        own = [layer for layer in layers if owners[layer.name] == rank]
        read = {layer.name: number for number, group in enumerate(sharing(own)) for layer in group}
        if ranks > 1 and counts:  # while the sums of all ranks come in
            peak = max(peak, moments + 4 * max(layer.cols for layer in own) ** 2)
        solved = 0
        for position, layer in enumerate(own):
            to_come = {read[other.name]: 4 * other.cols**2 for other in own[position + 1 :]}
            hessians = sum(to_come.values()) + 4 * layer.cols**2 if counts else 0
            outputs = 4 * sum(other.rows**2 for other in own) if coupled else 0  # which stay to the end
            waiting = sum(other.rows * other.cols for other in own[position:]) * (4 * gathers + again)
            working = options.peak_bytes(
                layer.rows, layer.cols, coupled=coupled, pattern=pattern, device=layer.parameter.device
            )
            peak = max(peak, hessians + outputs + waiting + solved + working)
            solved += layer.rows * layer.cols * (layer.parameter.element_size() + 1)
    return peak
