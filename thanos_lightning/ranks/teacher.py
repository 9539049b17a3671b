"""Places a frozen model beside the trained model under any strategy."""

from __future__ import annotations

from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DeepSpeedStrategy, Strategy
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def place_frozen(model: nn.Module, strategy: Strategy, first: nn.Module) -> nn.Module:
    """Put a frozen model where the strategy's forward runs, and return it. All ranks must call it.

    Under ZeRO-3 the frozen model is sharded like the trained model. Otherwise each rank holds all of it. The model is
    in evaluation mode, with parameters of one dtype and without gradients, and is changed in place. `strategy` is set
    up already. `first` is the module of the model that each pass begins with.
    """
    config = sharding_config(strategy, next(model.parameters()).dtype)
    if config is not None:
        from thanos_lightning.ranks.zero import shard_frozen  # deepspeed is optional, and slow to import

        return shard_frozen(model, first, config)
    return model.to(strategy.root_device)


def sharding_config(strategy: Strategy, dtype: torch.dtype) -> dict[str, Any] | None:
    """Return DeepSpeed's configuration for a frozen model, fetched like the trained one; None if it stays whole.

    The strategy is already set up. `dtype` is the frozen model's, which need not be the training's.
    """
    if not (isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3):
        return None
    assert isinstance(strategy.config, dict), "the strategy is set up"
    zero: dict[str, Any] = strategy.config["zero_optimization"]
    fetched = {name: value for name, value in zero.items() if name.startswith("stage3_")}
    if offloaded := zero.get("offload_param"):
        # Never on NVMe: DeepSpeed would empty the folder that holds the trained model's parameters.
        fetched["offload_param"] = {"device": "cpu", "pin_memory": offloaded.get("pin_memory", False)}
    return {
        "train_micro_batch_size_per_gpu": 1,  # required by DeepSpeed, but not used
        "zero_optimization": {"stage": 3, **fetched},
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
    }


def require_own_gathering(model: nn.Module) -> None:
    """Refuse an FSDP2 model whose base and head can't be called separately, as distillation calls them."""
    parts = [module for module in model.modules() if isinstance(module, FSDPModule) and module is not model]
    gathered = {id(parameter) for part in parts for parameter in part.parameters()}
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor) and id(parameter) not in gathered:
            raise MisconfigurationException(
                f"distillation calls the base of {type(model).__name__} and its head one by one, but {name} is "
                "gathered only where the whole model is called: in configure_model, call fully_shard on each decoder "
                "layer, then on the list of the embeddings, the last norm and the head, and then on the model"
            )
