"""Formulas for what pruning takes: memory beside the model, its gradients and its optimizer, and messages."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from thanos_lightning.models.stack import Block
from thanos_lightning.models.targets import PrunableLayer, whole_shape
from thanos_lightning.sharding.owners import assign_owners
from thanos_lightning.solver import Pattern
from thanos_lightning.solver.layer import SolverOptions


def sharing(layers: Sequence[PrunableLayer]) -> list[list[PrunableLayer]]:
    """Group layers by the input that they read: a guess, since only a forward shows it.

    Layers of one parent with equally many inputs read the same input (q, k, v; gate, up). The last layer of such a
    group is the exception if it has as many outputs as inputs (o).
    """
    alike: dict[tuple[str, int], list[PrunableLayer]] = {}
    for layer in layers:
        alike.setdefault((layer.name.rpartition(".")[0], layer.cols), []).append(layer)
    groups = []
    for group in alike.values():
        leads_back = len(group) > 1 and group[-1].rows == group[-1].cols
        groups += [group[:-1], group[-1:]] if leads_back else [group]
    return groups


def moments_bytes(layers: Sequence[PrunableLayer]) -> int:
    """Bytes for the second moments of a window, on each rank."""
    return 4 * sum(group[0].cols ** 2 for group in sharing(layers))


def event_bytes(
    layers: Sequence[PrunableLayer],
    options: SolverOptions,
    *,
    ranks: int = 1,
    pattern: Pattern | None = None,
    gathers: bool = False,
    again: bool = False,
    device: torch.device | None = None,
) -> int:
    """Peak bytes at the end of a window, with its second moments, on the rank that needs most.

    The layers come in the order in which they are pruned, and `pattern` is that of most of them. `gathers` says whether
    a layer's owner gets a copy of the weight, as it does of a sharded weight. `again` says whether the layers have
    masks already. `device` is where they are solved; None for where they are.
    """
    counts = options.needs_statistics
    moments = moments_bytes(layers) if counts else 0
    owners = assign_owners({layer.name: layer for layer in layers}, ranks)
    peak = moments
    for rank in set(owners.values()):
        own = [layer for layer in layers if owners[layer.name] == rank]
        read = {layer.name: number for number, group in enumerate(sharing(own)) for layer in group}
        if ranks > 1 and counts:  # the total over ranks arrives beside this rank's own sums
            peak = max(peak, moments + 4 * max(layer.cols for layer in own) ** 2)
        to_come, weights, after = 0, 0, list[tuple[int, int]]()
        groups = set[int]()
        for layer in reversed(own):
            weights += layer.rows * layer.cols
            after.append((to_come, weights))
            to_come += 0 if read[layer.name] in groups else 4 * layer.cols**2
            groups.add(read[layer.name])
        solved = 0
        for layer, (to_come, weights) in zip(own, reversed(after), strict=True):
            hessians = to_come + 4 * layer.cols**2 if counts else 0
            waiting = weights * (4 * gathers + again)
            where = device or layer.parameter.device
            working = options.peak_bytes(layer.rows, layer.cols, pattern=pattern, device=where)
            peak = max(peak, hessians + waiting + solved + working)
            solved += layer.rows * layer.cols * (layer.parameter.element_size() + 1)
    return peak


def training_bytes(block: Block, solved: Sequence[PrunableLayer], ranks: int) -> int:
    """Peak bytes of a rank that trains a block of a window whose layers were solved, without activations.

    The rank has all parameters of the block in fp32; of those that are trained a copy, its gradient and Adam's two
    moments; and what it has solved of the window.
    """
    own = set(block.layers)
    trained = sum(layer.rows * layer.cols for layer in solved if layer.name in own)
    whole = sum(math.prod(whole_shape(parameter)) for parameter in block.module.parameters())
    waiting = sum(layer.rows * layer.cols * (layer.parameter.element_size() + 1) for layer in solved)
    return 4 * whole + 16 * trained + waiting // ranks


def sent_bytes(layers: Sequence[PrunableLayer], ranks: int, *, gathers: bool = False, again: bool = False) -> int:
    """Bytes that all ranks together send to solve a window and to write it. The arguments are as for `event_bytes`.

    Each rank but the owner sends half of each symmetric sum; the others get the new weight and the mask. Where weights
    are in pieces, the owner gets those of the fp32 weight, and of the mask before, and sends them back.
    """
    owners = assign_owners({layer.name: layer for layer in layers}, ranks)
    sums = 0
    for group in sharing(layers):
        sums += 2 * group[0].cols ** 2 * len({owners[layer.name] for layer in group})
    weights = sum(layer.rows * layer.cols for layer in layers)
    model = sum(layer.rows * layer.cols * layer.parameter.element_size() for layer in layers)
    pieces = (4 + again + 5) * weights // ranks if gathers else weights // 8
    return (ranks - 1) * (sums + model + pieces)
