"""Models that are only read, beside the one that is trained: placed, and given its weights, under any strategy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def place_frozen(model: nn.Module, strategy: Strategy) -> nn.Module:
    """Put a model where the strategy's forward runs. All ranks must call it.

    Under ZeRO-3 it is sharded over the ranks like the model that is trained, else each rank holds all of it.

    Args:
        model: In evaluation mode, its parameters without gradients. Changed in place.
        strategy: Set up.

    Returns:
        The model.
    """
    if isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3:
        from thanos_lightning.sharding.zero import shard_frozen  # deepspeed is optional, and slow to import

        return shard_frozen(model, offload=_offloads_parameters(strategy))
    return model.to(strategy.root_device)


def _offloads_parameters(strategy: DeepSpeedStrategy) -> bool:
    zero: dict[str, Any] = strategy.config["zero_optimization"] if isinstance(strategy.config, dict) else {}
    return bool(zero.get("offload_param"))


@torch.no_grad()
def copy_to_frozen(own: nn.Module, frozen: nn.Module, strategy: Strategy) -> None:
    """Give a placed model the weights of the one that is trained. All ranks must call it.

    Args:
        own: The model that is trained.
        frozen: One of the same parameters and buffers, by name, in any dtype.
        strategy: Under which both are.
    """
    if isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3:
        from thanos_lightning.sharding.zero import copy_sharded

        copy_sharded(own, frozen)
        return
    for parameter, its in _pairs(own, frozen):
        its.copy_(parameter.full_tensor() if isinstance(parameter, DTensor) else parameter)


def _pairs(own: nn.Module, frozen: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    theirs = {**dict(frozen.named_parameters()), **dict(frozen.named_buffers())}
    for name, tensor in [*own.named_parameters(), *own.named_buffers()]:
        yield tensor, theirs[name]


@torch.no_grad()
def frozen_state(frozen: nn.Module, strategy: Strategy) -> dict[str, Tensor]:
    """The state dict of a placed model, whole on rank 0; elsewhere perhaps empty. All ranks must call it."""
    if isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3:
        from thanos_lightning.sharding.zero import gathered_state

        return gathered_state(frozen, wanted=strategy.is_global_zero)
    return dict(frozen.state_dict())
