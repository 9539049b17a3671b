"""Layers with LoRA adapters, read and written as one: the solver sees what the layer multiplies by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from thanos_lightning.models.adapters import MaskedAdapter, tuner_layers
from thanos_lightning.models.targets import PrunableLayer
from thanos_lightning.sharding.access import ParameterAccess
from thanos_lightning.solver.zeros import effective


def gather_whole(model: nn.Module) -> None:
    """Let ZeRO-3 gather the weight and the masked adapters of a layer at the same time, not each for its own module."""
    for module in model.modules():
        if isinstance(module, MaskedAdapter) and _register not in module._forward_pre_hooks.values():
            # DeepSpeed numbers parameters when it is set up, and its own hook, which gathers, comes after this one
            module.register_forward_pre_hook(_register, prepend=True)


def _register(module: nn.Module, args: Any) -> None:
    if not getattr(module, "_external_params", None):  # DeepSpeed's, empty at first
        from thanos_lightning.sharding.zero import gather_together

        gather_together(module)


def initialise_partitioned(model: nn.Module, how: bool | str) -> None:
    """Initialise adapters that ZeRO-3 had taken apart before peft could. All ranks must call it.

    In `configure_model` each Linear is partitioned as soon as it is made, so that peft writes to empty tensors: lora_B
    is random, not 0. `how` is LoraConfig's init_lora_weights. Adapters that are whole stay as peft has made them.

    Raises:
        ValueError: If `how` takes more than the adapter itself.
    """
    for module in tuner_layers(model).values():
        for name in getattr(module, "lora_A", {}):
            own = [module.lora_A[name].weight, module.lora_B[name].weight]  # type: ignore[index, union-attr]
            if not hasattr(own[0], "ds_id"):
                continue
            if how not in (True, False, "gaussian"):
                raise ValueError(f"init_lora_weights is {how!r}, which can't be under ZeRO-3: take True or 'gaussian'")
            from thanos_lightning.sharding.zero import gathered

            with gathered(own):
                module.reset_lora_parameters(name, how)  # type: ignore[operator]


@dataclass(frozen=True)
class Adapted:
    """A layer's weight, and the matrices whose product its adapters add: whole only where it is asked for."""

    weight: Tensor  # (out_features, in_features), read-only
    # of each adapter lora_A, (rank, in_features), and lora_B, (out_features, rank), scaled
    added: Sequence[tuple[Tensor, Tensor]] = ()

    def merged(self) -> Tensor:
        """What the layer multiplies by: (out_features, in_features), in the weight's dtype. Read-only."""
        weight = self.weight
        for down, up in self.added:
            weight = effective(weight, down, up)
        return weight.to(self.weight.dtype)


def collect(layer: PrunableLayer, owner: int, access: ParameterAccess) -> Adapted | None:
    """Return a layer's weight, and what its adapters add, on its owner. All ranks must call it."""
    weight = access.collect_weight(layer, owner)
    added = []
    for adapter in layer.adapters:
        down, up = access.collect_weight(adapter.down, owner), access.collect_weight(adapter.up, owner)
        if down is not None and up is not None:
            added.append((down, up * adapter.scale))
    return None if weight is None else Adapted(weight, added)


def collect_merged(layer: PrunableLayer, owner: int, access: ParameterAccess) -> Tensor | None:
    """As `collect`, merged."""
    found = collect(layer, owner, access)
    return None if found is None else found.merged()


def write_merged(
    layer: PrunableLayer, weight: Tensor | None, keep: Tensor | None, owner: int, access: ParameterAccess
) -> Tensor:
    """As `ParameterAccess.write`, but what adapters add begins anew at 0: the new weight has what they had learnt.

    Their lora_B is set to 0. lora_A and the moments stay, so that the optimizer goes on where it was.
    """
    drop = access.write(layer, weight, keep, owner)
    for adapter in layer.adapters:
        up = access.collect_weight(adapter.up, owner)
        nothing = None if up is None else torch.zeros_like(up)
        access.write(adapter.up, nothing, None if up is None else torch.ones_like(up, dtype=torch.bool), owner)
    return drop


def with_adapters(layers: Mapping[str, PrunableLayer]) -> dict[str, PrunableLayer]:
    """The layers and the matrices of their adapters, by name: all that has to be read and written."""
    matrices = [matrix for layer in layers.values() for one in layer.adapters for matrix in (one.down, one.up)]
    return {**layers, **{matrix.name: matrix for matrix in matrices}}
