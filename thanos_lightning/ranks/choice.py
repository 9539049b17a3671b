"""What follows from a Trainer's strategy: the `ParameterAccess`, and where a frozen model lies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from lightning.pytorch.strategies.single_xla import SingleDeviceXLAStrategy
from lightning.pytorch.strategies.xla import XLAStrategy
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from thanos_lightning.ranks.access import ParameterAccess
from thanos_lightning.ranks.fsdp import FsdpAccess
from thanos_lightning.ranks.view import View

_SUPPORTED = (SingleDeviceStrategy, DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)
_KINDS_OF_THEIR_OWN = (SingleDeviceXLAStrategy, XLAStrategy)  # subclasses of supported ones


def check_strategy(strategy: Strategy) -> None:
    """Raise a MisconfigurationException, which names the supported strategies, if this one would lose zeros."""
    if not isinstance(strategy, _SUPPORTED) or isinstance(strategy, _KINDS_OF_THEIR_OWN):
        raise MisconfigurationException(
            f"ThanosPruningCallback does not support the strategy {type(strategy).__name__}: its zeros would be lost. "
            "Supported are one device (strategy='auto', devices=1), DDP (strategy='ddp'), DeepSpeed ZeRO "
            "(strategy='deepspeed_stage_1', '_2', '_3') and FSDP2 (ModelParallelStrategy with fully_shard)"
        )


def choose_access(strategy: Strategy, layers: Mapping[str, View]) -> ParameterAccess:
    """Return the access for a strategy whose model and optimizers are set up. All ranks must call it.

    `layers` are all that may be pruned.

    Raises:
        MisconfigurationException: If zeros would be lost, naming the cause.
    """
    check_strategy(strategy)
    if isinstance(strategy, DeepSpeedStrategy):  # tested first, because it is a DDPStrategy, too
        from thanos_lightning.ranks.zero import ZeroAccess  # deepspeed is optional, and slow to import

        return ZeroAccess(strategy, layers)
    if isinstance(strategy, ModelParallelStrategy):
        return FsdpAccess(strategy, layers)
    assert isinstance(strategy, (DDPStrategy, SingleDeviceStrategy)), "checked above"
    return ParameterAccess(strategy.global_rank, strategy.world_size, strategy.root_device, strategy.optimizers)


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
