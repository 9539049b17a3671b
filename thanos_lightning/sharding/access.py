"""The contract between pruning and the strategies that place parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import NamedTuple, Protocol, TypeVar

from torch import Tensor
from torch.optim import Optimizer

from thanos_lightning.models.targets import PrunableLayer
from thanos_lightning.sharding.ranks import RankTeam

Value = TypeVar("Value")


class LocalPiece(NamedTuple):
    """A tensor of this rank that belongs to a layer's weight.

    Attributes:
        what: "weight" (the model's copy), "master", or the name of a moment.
        tensor: The values, writable unless said otherwise.
        place: Which part of the rank's drop mask they stand under.
    """

    what: str
    tensor: Tensor
    place: slice = slice(None)


class ParameterAccess(Protocol):
    """How a strategy's parameters are read, written and masked, and how its ranks agree.

    "Local" means the piece of a tensor that this rank holds, in whatever layout the strategy keeps it. The drop mask of
    a layer is bool, True = pruned, in that layout. The owner of a layer is the rank that solves it, or leads the team
    that does.

    Attributes:
        rank: This process among `world_size`.
        world_size: Number of processes.
        optimizers: The torch optimizers that step the parameters, or their masters.
        saves_every_rank: Whether a checkpoint keeps what each rank's callbacks return, and gives each its own back;
            else it is rank 0's, for all.
        can_differentiate: Whether a backward beside the training leaves the training as it was.
        timeout: How long the ranks that solve one layer wait for each other; None for as long as torch's backend does.
    """

    rank: int
    world_size: int
    optimizers: list[Optimizer]
    saves_every_rank: bool
    can_differentiate: bool
    timeout: timedelta | None

    # Reading and writing layers: all ranks call these, in one order

    def collect_weight(self, layer: PrunableLayer, owner: int) -> Tensor | None:
        """The full weight (out_features, in_features) on its owner, from the most exact copy. Not to be written to."""
        ...

    def collect_keep(self, layer: PrunableLayer, drop: Tensor, owner: int) -> Tensor | None:
        """The keep mask (out_features, in_features) on its owner, of which `drop` is this rank's piece."""
        ...

    def write(self, layer: PrunableLayer, weight: Tensor | None, keep: Tensor | None, owner: int) -> Tensor:
        """Replace a weight wherever a copy of it is kept, and zero its moments where it is pruned.

        Args:
            layer: The layer.
            weight: (out_features, in_features) on the owner, None elsewhere.
            keep: Its keep mask, likewise.
            owner: The rank that has both.

        Returns:
            This rank's drop mask.
        """
        ...

    def full_keep(self, layer: PrunableLayer, drop: Tensor) -> Tensor:
        """The keep mask (out_features, in_features) on every rank, of which `drop` is this rank's piece."""
        ...

    def release(self) -> None:
        """Drop whole copies of sharded weights, which a forward or a backward beside the training leaves behind."""
        ...

    # What this rank does alone

    def local_drop(self, layer: PrunableLayer, keep: Tensor) -> Tensor:
        """This rank's drop mask of a keep mask (out_features, in_features). Talks to no rank."""
        ...

    def completes_step(self, optimizer: Optimizer) -> bool:
        """Asked in a post-step hook: whether a step of the training is complete with this call. Talks to no rank.

        It isn't where a scaler has skipped the step, and where a step is several calls and more of them follow.
        """
        ...

    def stepped_by(self, optimizer: Optimizer, layers: Mapping[str, PrunableLayer]) -> set[str]:
        """Names of the layers of which the optimizer updates something on this rank. Talks to no rank."""
        ...

    def stepped_tensors(self, layer: PrunableLayer, optimizer: Optimizer) -> Iterator[LocalPiece]:
        """What the optimizer has just written for a layer: the weight or its master, and moments. Talks to no rank."""
        ...

    def local_tensors(self, layer: PrunableLayer) -> Iterator[LocalPiece]:
        """Everything of a layer on this rank, to be counted, not written to. Talks to no rank."""
        ...

    def numbered_parameters(self) -> list[list[Tensor | None]]:
        """Of each optimizer, the module's parameters that its state numbers, in order; None for what is none."""
        ...

    def mask_gradient(self, layer: PrunableLayer, drop: Tensor) -> None:
        """Zero the pruned part of the gradient that the next step will use, where there is one. Talks to no rank."""
        ...

    # How ranks agree

    def sum_on(self, owner: int, matrix: Tensor | None, width: int) -> Tensor | None:
        """The sum of a symmetric fp32 (width, width) over ranks on its owner, None elsewhere. Talks to all.

        A rank without a matrix gives None, and counts as zeros.
        """
        ...

    def total(self, tensor: Tensor) -> Tensor:
        """The sum of fp32 tensors of one shape over ranks, on all of them. Talks to all."""
        ...

    def broadcast(self, tensor: Tensor, owner: int) -> None:
        """Overwrite a tensor of all ranks, which has one shape and dtype everywhere, by the owner's. Talks to all."""
        ...

    def to_first(self, tensor: Tensor | None, *, source: int, shape: tuple[int, ...]) -> Tensor | None:
        """The source's fp32 tensor, on the CPU, on the source and on rank 0; None elsewhere. Those two talk."""
        ...

    def reserve(self, sizes: Iterable[int]) -> None:
        """Ask for blocks of so many bytes, all at once, and give them back. Talks to no rank.

        What runs out of memory here can be told to the others; between two messages they would wait for it.

        Raises:
            torch.OutOfMemoryError: If there isn't as much.
        """
        ...

    def gather(self, value: Value) -> list[Value]:
        """The small Python values of all ranks, by rank. Talks to all."""
        ...

    def in_teams(self, teams: Mapping[range, int]) -> AbstractContextManager[RankTeam | None]:
        """This rank's team, or None if it is in none, for the time in which they solve. Talks to all.

        Args:
            teams: The ranks of each team, no rank in two of them -> the number of rows of its layer. The same, in the
                same order, on all ranks.
        """
        ...
