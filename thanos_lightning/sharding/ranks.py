"""What processes tell each other, whatever the strategy."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Value = TypeVar("Value")

# A triangle travels in strips of rows; each strip is a rectangle that begins at the diagonal.
_STRIPS = 16


class Ranks:
    """One process among others. With one process nothing is sent.

    Args:
        rank: This process among `world_size`.
        world_size: Number of processes. Above 1, torch.distributed is initialised.
        device: Where this process sends from and receives to.
    """

    def __init__(self, rank: int = 0, world_size: int = 1, device: torch.device | None = None) -> None:
        self.rank = rank
        self.world_size = world_size
        self._device = device

    def sum_on(self, owner: int, matrix: Tensor | None, width: int) -> Tensor | None:
        """The sum of a symmetric matrix over ranks, on its owner; None elsewhere. Talks to all.

        Little more than the upper triangle is sent, by reduction, with a sixteenth of the matrix in flight.

        Args:
            owner: Who gets the sum.
            matrix: fp32 (width, width) of this rank, which stays as it is, or None for zeros.
            width: The same on all ranks.
        """
        if self.world_size == 1:
            return matrix
        total = torch.empty(width, width, device=self._device) if self.rank == owner else None
        step = -(-width // _STRIPS)
        for start in range(0, width, step):
            stop = min(start + step, width)
            if matrix is None:
                strip = torch.zeros(stop - start, width - start, device=self._device)
            else:
                strip = matrix[start:stop, start:].to(self._device, copy=True).contiguous()
            dist.reduce(strip, dst=owner)
            if total is not None:
                total[start:stop, start:] = strip
                total[stop:, start:stop] = strip[:, stop - start :].T
        return total

    def to_first(self, tensor: Tensor | None, *, source: int, shape: tuple[int, ...]) -> Tensor | None:
        """The source's fp32 tensor, on the CPU, on the source and on rank 0; None elsewhere. Those two talk."""
        if self.rank == source:
            assert tensor is not None
            if source != 0:
                dist.send(tensor.to(self._device), dst=0)
            return tensor
        if self.rank != 0:
            return None
        received = torch.empty(shape, dtype=torch.float32, device=self._device)
        dist.recv(received, src=source)
        return received.cpu()

    def broadcast(self, tensor: Tensor, owner: int) -> None:
        """Overwrite a tensor of all ranks, which has one shape and dtype everywhere, by the owner's. Talks to all."""
        if self.world_size == 1:
            return
        sent = tensor.to(self._device).contiguous()
        dist.broadcast(sent, src=owner)
        if sent is not tensor:
            tensor.copy_(sent)

    def gather(self, value: Value) -> list[Value]:
        """The small Python values of all ranks, by rank. Talks to all."""
        if self.world_size == 1:
            return [value]
        values: list[Value | None] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]  # every entry has been filled
