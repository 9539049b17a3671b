"""The contract between pruning and the strategies that place parameters, and the choice by strategy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol, TypeVar

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy, Strategy
from torch import Tensor
from torch.optim import Optimizer

from thanos_lightning.sharding.replicated import ReplicatedAccess
from thanos_lightning.solver import PrunedLayer
from thanos_lightning.targets import PrunableLayer

Value = TypeVar("Value")


class ParameterAccess(Protocol):
    """How a strategy's parameters are read, written and masked, and how its ranks agree.

    "Local" means the piece of a tensor that this rank holds, in whatever layout the strategy keeps it.
    """

    rank: int
    world_size: int

    def weight(self, layer: PrunableLayer) -> Tensor:
        """The full weight (out_features, in_features), in its training dtype. Not to be written to."""
        ...

    def write(self, layer: PrunableLayer, weight: Tensor) -> None:
        """Replace the weight by one of shape (out_features, in_features), wherever a copy of it is kept."""
        ...

    def local_drop(self, layer: PrunableLayer, keep: Tensor) -> Tensor:
        """The local piece of the inverted keep mask, bool, True = pruned, in the layout of `local_tensors`."""
        ...

    def full_keep(self, layer: PrunableLayer, drop: Tensor) -> Tensor:
        """The keep mask (out_features, in_features) of which `local_drop` returned a piece. Talks to all ranks."""
        ...

    def stepped_by(self, optimizer: Optimizer, layers: Mapping[str, PrunableLayer]) -> set[str]:
        """Names of the layers whose weight the optimizer updates. Talks to no rank."""
        ...

    def local_tensors(self, layer: PrunableLayer, optimizer: Optimizer | None) -> Iterator[tuple[str, Tensor]]:
        """(what it is, local piece): the weight and, given its optimizer, each moment. Writable. Talks to no rank."""
        ...

    def local_gradient(self, layer: PrunableLayer) -> Tensor | None:
        """The local piece of the weight's gradient, writable, or None. Talks to no rank."""
        ...

    def sum_on_owner(self, tensor: Tensor, owner: int) -> None:
        """Sum a tensor over ranks in place on the owner; the others' content is undefined after. Talks to all."""
        ...

    def share(self, layer: PrunableLayer, pruned: PrunedLayer | None, owner: int) -> PrunedLayer:
        """The owner's result, on every rank. Talks to all."""
        ...

    def to_first(self, tensor: Tensor | None, *, source: int, shape: tuple[int, ...]) -> Tensor | None:
        """The source's fp32 tensor, on the CPU, on the source and on rank 0; None elsewhere. Those two talk."""
        ...

    def gather(self, value: Value) -> list[Value]:
        """The small Python values of all ranks, by rank. Talks to all."""
        ...


def choose_access(strategy: Strategy) -> ParameterAccess:
    """The access for a Trainer's strategy.

    Raises:
        MisconfigurationException: If the strategy is not supported, naming the ones that are.
    """
    if isinstance(strategy, SingleDeviceStrategy):
        return ReplicatedAccess()
    if isinstance(strategy, DDPStrategy) and not isinstance(strategy, DeepSpeedStrategy):  # which is one to Lightning
        return ReplicatedAccess(strategy.global_rank, strategy.world_size, strategy.root_device)
    raise MisconfigurationException(
        f"ThanosPruningCallback does not support the strategy {type(strategy).__name__} yet: its zeros would be lost. "
        "Supported are one device (strategy='auto', devices=1) and DDP (strategy='ddp')"
    )
