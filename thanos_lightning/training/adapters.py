"""Makes LoRA adapters keep zeros while they are trained."""

from __future__ import annotations

from collections.abc import Container

from lightning.pytorch.strategies import DeepSpeedStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from thanos_lightning.models.adapters import MaskedAdapter, tuner_layers
from thanos_lightning.sharding.adapters import gather_whole


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
        from thanos_lightning.training.masked_lora import mask

        mask(module)


def prepare_adapters(model: nn.Module, strategy: Strategy) -> None:
    """Mask the adapters of a model that is about to be trained under a strategy."""
    mask_adapters(model)
    if isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3:
        gather_whole(model)


def warn_of_adapters(model: nn.Module, pruned: Container[str]) -> None:
    """Warn of adapters on layers that are not pruned, and of adapters that an export can't merge."""
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
