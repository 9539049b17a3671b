"""Chooses the `ParameterAccess` for a Trainer's strategy."""

from __future__ import annotations

from collections.abc import Mapping

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
