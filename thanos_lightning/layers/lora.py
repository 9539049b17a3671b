"""LoRA: layers with peft's adapters keep their zeros, and are read and written with them as one weight."""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from thanos_lightning.ranks.access import ParameterAccess
from thanos_lightning.ranks.view import View, whole_shape
from thanos_lightning.solver.zeros import effective

if TYPE_CHECKING:  # to import lightning takes seconds, and verification needs none of it
    from lightning.pytorch.strategies import Strategy


class LowRank(NamedTuple):
    """A low-rank matrix that is added to a layer's weight where the weight is not 0: scale · up · down."""

    name: str  # of the adapter in peft, such as "default"
    down: nn.Linear  # holds lora_A: (rank, in_features)
    up: nn.Linear  # holds lora_B: (out_features, rank)
    scale: float


class MaskedAdapter:
    """The part of a layer with masked adapters that can be read without peft."""

    @abstractmethod
    def low_ranks(self) -> list[LowRank]:
        """Return the active adapters: an empty list if adapters are merged or disabled."""

    @property
    @abstractmethod
    def is_plain(self) -> bool:
        """Whether adapters are plain products of two matrices, on a layer that is a plain product."""


def tuner_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that peft has put in the place of others, by name."""
    if "peft" not in sys.modules:  # otherwise no layer can be of it
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}  # type: ignore[misc]


def saved_modules(model: nn.Module) -> dict[str, list[str]]:
    """Modules of which peft trains whole copies (modules_to_save): name with a dot -> its active copies."""
    return {
        f"{name}.": list(module.active_adapters)
        for name, module in model.named_modules()
        if "peft" in sys.modules and hasattr(module, "modules_to_save") and hasattr(module, "original_module")
    }


def base_of(module: nn.Module) -> nn.Module:
    """The layer that an adapter is on, or the module itself if it has none."""
    base = getattr(module, "get_base_layer", None)
    return module if base is None else base()


class Adapter(NamedTuple):
    """scale · up · down is added to a layer's weight where the weight is not 0."""

    down: View
    up: View
    scale: float


def adapters_of(layer: View) -> list[Adapter]:
    """The low-rank matrices that are added to a layer's weight where the weight is not 0."""
    if not isinstance(layer.holder, MaskedAdapter) or layer.attribute == "bias":
        return []

    def view(part: str, module: nn.Linear) -> View:
        rows, cols = whole_shape(module.weight)
        return View(part, f"{part}.weight", module, "weight", rows, cols)

    return [
        Adapter(
            view(f"{layer.name}.lora_A.{rank.name}", rank.down),
            view(f"{layer.name}.lora_B.{rank.name}", rank.up),
            rank.scale,
        )
        for rank in layer.holder.low_ranks()
    ]


def shows_its_mask(layer: View) -> bool:
    """Whether a mask can be read off the weight: adapters are trained, and no optimizer steps the weight."""
    return bool(adapters_of(layer)) and not layer.parameter.requires_grad


def mask_adapters(model: nn.Module) -> None:
    """Let the LoRA adapters of a model add nothing where their layer's weight is 0, in place.

    Such a layer multiplies by W + M ∘ (scale · B A), where M is 1 where W is not 0 (MaskLoRA of arXiv 2312.15230; M is
    not stored). Zeros of W stay zeros while the adapters are trained, and when they are merged: `merge_and_unload()`
    of peft keeps them, too. `ThanosPruningCallback` calls this. Call it where a sparse model is used with an adapter
    that was exported beside it. Adapters of other kinds stay as they are.

    Args:
        model: A model on which peft has put adapters. It may be called again.

    Examples:
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> model = nn.Sequential(nn.Linear(2, 2, bias=False))
        >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        >>> adapted = get_peft_model(model, LoraConfig(r=1, target_modules=["0"], init_lora_weights=False))
        >>> mask_adapters(adapted)
        >>> (adapted.merge_and_unload()[0].weight == 0).tolist()
        [[False, True], [True, False]]
    """
    for module in tuner_layers(model).values():
        from thanos_lightning.layers.masked_lora import mask

        mask(module)


def prepare_adapters(model: nn.Module, strategy: Strategy) -> None:
    """Mask the adapters of a model that is about to be trained under a strategy."""
    from lightning.pytorch.strategies import DeepSpeedStrategy

    mask_adapters(model)
    if isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3:
        gather_whole(model)


def warn_of_adapters(model: nn.Module, pruned: Container[str]) -> None:
    """Warn of adapters on layers that are not pruned, and of adapters that an export can't merge."""
    from lightning.pytorch.utilities import rank_zero_warn

    adapted = tuner_layers(model)
    if dense := [name for name in adapted if name not in pruned]:
        rank_zero_warn(
            f"{len(dense)} adapter(s) of peft are on layers that are not pruned, such as {dense[0]}: merging them "
            "leaves these layers dense. Name them in targets, or leave them out of target_modules"
        )
    if others := [name for name, layer in adapted.items() if not isinstance(layer, MaskedAdapter)]:
        rank_zero_warn(
            f"{len(others)} adapter(s) of peft are no plain LoRA on a Linear or Conv1D, such as {others[0]}: an "
            "export can't merge them"
        )


def gather_whole(model: nn.Module) -> None:
    """Let ZeRO-3 gather the weight and the masked adapters of a layer at the same time, not each for its own module."""
    for module in model.modules():
        if isinstance(module, MaskedAdapter) and _register not in module._forward_pre_hooks.values():
            # DeepSpeed numbers parameters when it is set up, and its own hook, which gathers, comes after this one
            module.register_forward_pre_hook(_register, prepend=True)


def _register(module: nn.Module, args: Any) -> None:
    if not getattr(module, "_external_params", None):  # DeepSpeed's, empty at first
        from thanos_lightning.ranks.zero import gather_together

        gather_together(module)


def initialise_partitioned(model: nn.Module, how: bool | str) -> None:
    """Initialise adapters that ZeRO-3 had taken apart before peft could. All ranks must call it.

    In `configure_model` each Linear is partitioned as soon as it is made. So peft initialises empty tensors, and lora_B
    stays random, not 0. `how` is LoraConfig's init_lora_weights. Adapters that are whole stay as peft has made them.

    Raises:
        ValueError: If `how` needs more than the adapter, such as the weight beneath.
    """
    for module in tuner_layers(model).values():
        for name in getattr(module, "lora_A", {}):
            own = [module.lora_A[name].weight, module.lora_B[name].weight]  # type: ignore[index, union-attr]
            if not hasattr(own[0], "ds_id"):
                continue
            if how not in (True, False, "gaussian"):
                raise ValueError(f"init_lora_weights is {how!r}, which can't be under ZeRO-3: take True or 'gaussian'")
            from thanos_lightning.ranks.zero import gathered

            with gathered(own):
                module.reset_lora_parameters(name, how)  # type: ignore[operator]


@dataclass(frozen=True)
class Adapted:
    """A layer's weight, and the matrices whose product its adapters add. `merged` makes the whole."""

    weight: Tensor  # (out_features, in_features), read-only
    # of each adapter lora_A, (rank, in_features), and lora_B, (out_features, rank), scaled
    added: Sequence[tuple[Tensor, Tensor]] = ()

    def merged(self) -> Tensor:
        """What the layer multiplies by: (out_features, in_features), in the weight's dtype. Read-only."""
        weight = self.weight
        for down, up in self.added:
            weight = effective(weight, down, up)
        return weight.to(self.weight.dtype)


def collect(layer: View, owner: int, access: ParameterAccess) -> Adapted | None:
    """Return a layer's weight, and what its adapters add, on its owner. All ranks must call it."""
    weight = access.collect_weight(layer, owner)
    added = []
    for adapter in adapters_of(layer):
        down, up = access.collect_weight(adapter.down, owner), access.collect_weight(adapter.up, owner)
        if down is not None and up is not None:
            added.append((down, up * adapter.scale))
    return None if weight is None else Adapted(weight, added)


def collect_merged(layer: View, owner: int, access: ParameterAccess) -> Tensor | None:
    """As `collect`, merged."""
    found = collect(layer, owner, access)
    return None if found is None else found.merged()


def write_merged(
    layer: View, weight: Tensor | None, keep: Tensor | None, owner: int, access: ParameterAccess
) -> Tensor:
    """As `ParameterAccess.write`, but what adapters add begins anew at 0: the new weight contains what they had learnt.

    Their lora_B is set to 0. lora_A and the moments stay, so that the optimizer goes on where it was.
    """
    drop = access.write(layer, weight, keep, owner)
    for adapter in adapters_of(layer):
        up = access.collect_weight(adapter.up, owner)
        nothing = None if up is None else torch.zeros_like(up)
        access.write(adapter.up, nothing, None if up is None else torch.ones_like(up, dtype=torch.bool), owner)
    return drop


def with_adapters(layers: Mapping[str, View]) -> dict[str, View]:
    """The layers and the matrices of their adapters, by name: all that has to be read and written."""
    matrices = [matrix for layer in layers.values() for one in adapters_of(layer) for matrix in (one.down, one.up)]
    return {**layers, **{matrix.name: matrix for matrix in matrices}}
