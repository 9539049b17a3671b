"""The masks in a checkpoint: written from the enforcer, and given back to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from thanos_lightning.models.targets import PrunableLayer
from thanos_lightning.plan.windows import reasons
from thanos_lightning.sharding.access import ParameterAccess
from thanos_lightning.sharding.masks import LayerMask, checked
from thanos_lightning.solver import Pattern
from thanos_lightning.training.enforcement import MaskEnforcer


def masks_state(
    enforcer: MaskEnforcer,
    layers: Mapping[str, PrunableLayer],
    patterns: Mapping[str, Pattern],
    access: ParameterAccess,
) -> dict[str, dict[str, Any]]:
    """The masks that this rank saves: parameter name -> `LayerMask.state`. All ranks must call it.

    If each rank writes a file of its own (ZeRO-3), each mask is in one of the files.
    """
    masks = {}
    for number, name in enumerate(enforcer.masked):
        layer = layers[name]
        keep = enforcer.keep_mask(name, owner=number % access.world_size if access.saves_every_rank else None)
        if keep is not None:
            masks[layer.parameter_name] = LayerMask.of(keep, patterns[name], layer.transposed).state()
    return masks


def restore_masks(
    states: Mapping[str, Mapping[str, Any]],
    pruned: Mapping[str, int],
    enforcer: MaskEnforcer,
    layers: Mapping[str, PrunableLayer],
    access: ParameterAccess,
    changed: Mapping[str, str],
) -> dict[str, Pattern]:
    """Let the enforcer hold what `masks_state` has saved. All ranks must call it.

    Return layer name -> the pattern that it was pruned to. `states` has what this rank has loaded, and `pruned` the
    number of pruned entries of all masks. `changed` has the arguments of the callback that differ
    from the checkpoint's, each as a sentence.

    Raises:
        MisconfigurationException: If a mask fits no target, or what it prunes is not 0.
        ValueError: If a mask is not the one that was saved, or is missing.
    """
    by_parameter = {layer.parameter_name: name for name, layer in layers.items()}
    patterns: dict[str, Pattern] = {}
    shared = _share({name: LayerMask.from_state(state) for name, state in states.items()}, access)
    for parameter_name, mask, keep in checked(shared, pruned):
        name = by_parameter.get(parameter_name)
        if name is None:
            raise MisconfigurationException(
                f"the checkpoint has a mask for {parameter_name}, which is no target now{reasons(changed)}: resume "
                "with the model, targets and ignore that it was trained with"
            )
        layer = layers[name]
        if mask.shape != (layer.rows, layer.cols):
            raise MisconfigurationException(
                f"the checkpoint's mask for {parameter_name} has shape {mask.shape}, the layer has "
                f"{(layer.rows, layer.cols)}: resume with the model that it was trained with"
            )
        patterns[name] = mask.pattern
        enforcer.set_mask(name, keep)
    if violations := enforcer.violations():
        raise MisconfigurationException(
            f"the masks are not those of the weights ({violations[0]} are not 0): something has changed the checkpoint "
            "after it was saved, or the model since the last fit. Resume from another checkpoint"
        )
    return patterns


def _share(masks: Mapping[str, LayerMask], access: ParameterAccess) -> Iterator[tuple[str, LayerMask]]:
    """Share masks between ranks whose checkpoints may hold different ones. Talks to all ranks.

    Yield (name, mask) in one order on all ranks, one at a time: all masks on every rank may exceed a node's memory.
    """
    if not access.saves_every_rank:
        yield from masks.items()
        return
    outlines = access.gather({name: {**mask.state(), "bits": len(mask.bits)} for name, mask in masks.items()})
    holders = {name: rank for rank, names in reversed(list(enumerate(outlines))) for name in names}
    for name, holder in sorted(holders.items()):
        bits = torch.empty(outlines[holder][name]["bits"], dtype=torch.uint8)
        if access.rank == holder:
            bits.copy_(masks[name].bits)
        access.broadcast(bits, owner=holder)
        yield name, LayerMask.from_state({**outlines[holder][name], "bits": bits})
