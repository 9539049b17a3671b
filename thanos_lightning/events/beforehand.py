"""The weights as a training begins with them: what can't be pruned, and what is pruned already."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch

from thanos_lightning.models.targets import PrunableLayer
from thanos_lightning.sharding.access import ParameterAccess
from thanos_lightning.sharding.owners import PruningError, raise_everywhere, reserved
from thanos_lightning.solver import Unstructured
from thanos_lightning.training.enforcement import MaskEnforcer

# Of a layer's weights: fewer zeros come from elsewhere, as the rows of tokens that a vocabulary is padded with do.
_PRUNED_BEFORE = 0.1


def check_weights(layers: Mapping[str, PrunableLayer], access: ParameterAccess) -> None:
    """Refuse weights that can't be pruned, before a training waits for that. All ranks call it.

    Args:
        layers: Name -> layer; this rank's pieces are looked at.
        access: Reads them, and tells the other ranks.

    Raises:
        PruningError: On all ranks, naming layers whose weights hold NaN or Inf.
    """
    extremes = {}
    for name, layer in layers.items():
        piece = next(access.local_tensors(layer), None)
        if piece is not None and piece.tensor.numel():
            # both are NaN where one entry is; in one tensor, so that a device is asked once
            extremes[name] = torch.stack(torch.aminmax(piece.tensor)).float()
    finite = torch.stack(list(extremes.values())).isfinite().all(dim=1).tolist() if extremes else []
    own = [name for name, is_finite in zip(extremes, finite, strict=True) if not is_finite]
    broken = list(dict.fromkeys(itertools.chain.from_iterable(access.gather(own))))
    if broken:
        more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        raise PruningError(
            f"the weight of layer {broken[0]}{more} holds NaN or Inf before the training: load a checkpoint that is "
            "whole, or add such layers to ignore"
        )


def hold_zeros(
    layers: Mapping[str, PrunableLayer], access: ParameterAccess, enforcer: MaskEnforcer
) -> dict[str, Unstructured]:
    """Hold the zeros of layers that were pruned before this training. All ranks must call it.

    More than a tenth of such a layer is 0, but not all of it: so are layers that begin at 0 to be trained.

    Args:
        layers: Name -> layer.
        access: How the strategy's parameters are reached.
        enforcer: Takes the masks.

    Returns:
        Name -> the share that is held, of layers that were pruned; the same on all ranks.
    """
    counts = access.gather({name: _count_zeros(layer, access) for name, layer in layers.items()})
    found: dict[str, Unstructured] = {}
    for name, layer in layers.items():
        zeros, total = (sum(numbers) for numbers in zip(*(counted[name] for counted in counts), strict=True))
        if not _PRUNED_BEFORE * total < zeros < total:
            continue
        size = layer.rows * layer.cols
        raise_everywhere(reserved({name: 5 * size}, access), access)
        weight = access.collect_weight(layer, owner=0)
        keep = None if weight is None else weight != 0
        num_pruned = access.gather(0 if keep is None else size - int(keep.count_nonzero()))[0]
        drop = access.write(layer, None if weight is None or keep is None else weight.where(keep, 0), keep, owner=0)
        enforcer.hold(name, drop, num_pruned)
        found[name] = Unstructured(num_pruned / size)
    return found


def _count_zeros(layer: PrunableLayer, access: ParameterAccess) -> tuple[int, int]:
    """Of the entries that this rank holds: how many are 0, and how many there are."""
    piece = next(access.local_tensors(layer), None)
    if piece is None or piece.what != "weight":  # offloaded to a disk
        return 0, 0
    return piece.tensor.numel() - int(piece.tensor.count_nonzero()), piece.tensor.numel()
