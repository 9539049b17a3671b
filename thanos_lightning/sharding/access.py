"""The contract between pruning and the strategies that place parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from thanos_lightning.models.targets import PrunableLayer

Value = TypeVar("Value")


class LocalPiece(NamedTuple):
    """A tensor of this rank that belongs to a layer's weight.

    Attributes:
        what: "weight" (the model's copy), "master", or the name of a moment.
        tensor: The values, writable unless said otherwise.
        place: The part of the rank's drop mask that covers the values.
    """

    what: str
    tensor: Tensor
    place: slice = slice(None)


class ParameterAccess(Protocol):
    """How a strategy's parameters are read, written and masked, and how its ranks agree.

    "Local" means the piece of a tensor that this rank holds, in whatever layout the strategy keeps it. The drop mask of
    a layer is bool, True = pruned, in that layout. The owner of a layer is the rank that solves it.

    Attributes:
        rank: This process among `world_size`.
        world_size: Number of processes.
        optimizers: The torch optimizers that step the parameters, or their masters.
        saves_every_rank: Whether a checkpoint keeps the callback state of every rank, and returns each rank its own.
            Otherwise it keeps rank 0's state for all ranks.
        can_differentiate: Whether an extra backward outside a training step leaves the training unchanged.
    """

    rank: int
    world_size: int
    optimizers: list[Optimizer]
    saves_every_rank: bool
    can_differentiate: bool

    # Reading and writing layers: all ranks call these, in one order

    def collect_weight(self, layer: PrunableLayer, owner: int) -> Tensor | None:
        """Return the full weight (out_features, in_features) on its owner, from the most exact copy. Read-only."""
        ...

    def collect_keep(self, layer: PrunableLayer, drop: Tensor, owner: int) -> Tensor | None:
        """Assemble the keep mask (out_features, in_features) on the owner from every rank's `drop`."""
        ...

    def collect_parameters(self, module: nn.Module, owner: int) -> dict[str, Tensor] | None:
        """Return copies of all parameters of a module, whole, by name, on the owner. They are the model's copies."""
        ...

    def write(self, layer: PrunableLayer, weight: Tensor | None, keep: Tensor | None, owner: int) -> Tensor:
        """Replace every copy of a weight, and zero the optimizer moments of its pruned entries.

        `weight` and `keep` are (out_features, in_features) on the owner, None elsewhere. Return this rank's drop mask.
        """
        ...

    def full_keep(self, layer: PrunableLayer, drop: Tensor) -> Tensor:
        """Assemble the keep mask (out_features, in_features) on every rank from every rank's `drop`."""
        ...

    def release(self) -> None:
        """Free the whole copies of sharded weights that a forward or backward outside a training step leaves behind."""
        ...

    # What this rank does alone

    def local_drop(self, layer: PrunableLayer, keep: Tensor) -> Tensor:
        """Return this rank's drop mask for a keep mask (out_features, in_features). Talks to no rank."""
        ...

    def completes_step(self, optimizer: Optimizer) -> bool:
        """Whether this call of a post-step hook completes a training step. Talks to no rank.

        It does not if a scaler has skipped the step, or if the optimizer is called again for the same step.
        """
        ...

    def stepped_by(self, optimizer: Optimizer, layers: Mapping[str, PrunableLayer]) -> set[str]:
        """Names of the layers that the optimizer updates, at least in part, on this rank. Talks to no rank."""
        ...

    def stepped_weight(self, layer: PrunableLayer) -> LocalPiece:
        """What optimizers step of a layer that one of them updates: the weight or its master. Talks to no rank."""
        ...

    def local_tensors(self, layer: PrunableLayer) -> Iterator[LocalPiece]:
        """All tensors of a layer on this rank, for counting only; they may be copies. Talks to no rank."""
        ...

    def numbered_parameters(self) -> list[list[Tensor | None]]:
        """For each optimizer, the module's parameters in the order of its state; None for any other tensor."""
        ...

    def mask_gradient(self, drops: Sequence[tuple[PrunableLayer, Tensor]]) -> None:
        """Zero the pruned parts of the gradient that the next step will use, where there is one. Talks to no rank.

        `drops` are layers of one parameter, each with this rank's piece of its drop mask.
        """
        ...

    # How ranks agree

    def sum_on(self, owner: int, matrix: Tensor | None, width: int) -> Tensor | None:
        """Sum a symmetric fp32 matrix (width, width) over ranks, on its owner; None elsewhere. Talks to all.

        A rank without a matrix passes None, which counts as zeros.
        """
        ...

    def total(self, tensor: Tensor) -> Tensor:
        """Sum fp32 tensors of one shape over ranks, on all ranks. Talks to all."""
        ...

    def broadcast(self, tensor: Tensor, owner: int) -> None:
        """Overwrite a tensor, of one shape and dtype on all ranks, with the owner's values. Talks to all."""
        ...

    def send(
        self,
        tensor: Tensor | None,
        *,
        source: int,
        destination: int,
        shape: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
    ) -> Tensor | None:
        """Send the source's tensor, of a shape and dtype, to a rank. Both return it, others None. Only these talk."""
        ...

    def reserve(self, sizes: Iterable[int]) -> None:
        """Allocate blocks of these sizes in bytes, all at once, and free them. Talks to no rank.

        A rank that runs out of memory here raises, and can tell the others. Between two messages, the others would wait
        for it.
        """
        ...

    def gather(self, value: Value) -> list[Value]:
        """Return the small Python values of all ranks, by rank. Talks to all."""
        ...
