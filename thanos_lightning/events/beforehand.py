"""Checks the weights at the start of a training: some can't be pruned, and some are pruned already."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from thanos_lightning.models.targets import PrunableLayer
from thanos_lightning.sharding.access import ParameterAccess
from thanos_lightning.sharding.together import PruningError, failing_together, reserve
from thanos_lightning.solver import Unstructured
from thanos_lightning.training.enforcement import MaskEnforcer

# A pruned layer has a larger fraction of zeros. Fewer zeros have other causes, such as a padded vocabulary.
_PRUNED_BEFORE = 0.1


def check_weights(layers: Mapping[str, PrunableLayer], access: ParameterAccess) -> None:
    """Refuse weights that can't be pruned, before the training spends time on them. All ranks must call it.

    Raises:
        PruningError: On all ranks, if one rank's shard of a weight holds NaN or Inf. The message names a layer.
    """
    extremes = {}
    for name, layer in layers.items():
        piece = next(access.local_tensors(layer), None)
        if piece is not None and piece.tensor.numel():
            # A NaN entry makes both extremes NaN. They stay on the device, so that the host waits only once, below
            extremes[name] = torch.stack(torch.aminmax(piece.tensor)).float()
    finite = torch.stack(list(extremes.values())).isfinite().all(dim=1).tolist() if extremes else []
    broken = [name for name, is_finite in zip(extremes, finite, strict=True) if not is_finite]
    with failing_together(access):
        if broken:
            more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
            raise PruningError(
                f"the weight of layer {broken[0]}{more} holds NaN or Inf before the training: load a checkpoint that "
                "is whole, or add such layers to ignore"
            )


def hold_zeros(
    layers: Mapping[str, PrunableLayer], access: ParameterAccess, enforcer: MaskEnforcer
) -> dict[str, Unstructured]:
    """Hold the zeros of layers that were pruned before this training. All ranks must call it.

    More than a tenth of a pruned layer is 0. A layer that is all 0 does not count: its training starts from 0.
    Return name -> the sparsity that is held, for layers that were pruned. All ranks return the same.
    """
    counts = access.gather({name: _count_zeros(layer, access) for name, layer in layers.items()})
    held: dict[str, Unstructured] = {}
    for name, layer in layers.items():
        zeros, total = (sum(numbers) for numbers in zip(*(counted[name] for counted in counts), strict=True))
        if not _PRUNED_BEFORE * total < zeros < total:
            continue
        size = layer.rows * layer.cols
        reserve({name: 5 * size}, access)
        weight = access.collect_weight(layer, owner=0)
        keep = None if weight is None else weight != 0
        num_pruned = access.gather(0 if keep is None else size - int(keep.count_nonzero()))[0]
        drop = access.write(layer, None if weight is None or keep is None else weight.where(keep, 0), keep, owner=0)
        enforcer.hold(name, drop, num_pruned)
        held[name] = Unstructured(num_pruned / size)
    return held


def _count_zeros(layer: PrunableLayer, access: ParameterAccess) -> tuple[int, int]:
    """How many entries of this rank's shard are 0, and how many entries the shard has."""
    piece = next(access.local_tensors(layer), None)
    if piece is None or piece.what != "weight":  # the weight is offloaded to disk
        return 0, 0
    return piece.tensor.numel() - int(piece.tensor.count_nonzero()), piece.tensor.numel()
