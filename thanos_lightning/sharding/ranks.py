"""How processes communicate, whatever the strategy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Value = TypeVar("Value")

# A triangle travels in strips of rows; each strip is a rectangle that begins at the diagonal.
_STRIPS = 16
# Strips of up to this many entries (16 MiB) travel together: gloo takes as long for a small message as for one MiB.
_ENTRIES_IN_FLIGHT = 2**22


class Ranks:
    """One process among others. With one process nothing is sent. With more, torch.distributed must be initialised.

    Attributes:
        rank: This process among `world_size`.
        world_size: Number of processes.

    `device` is where this process sends from and receives to.
    """

    def __init__(self, rank: int = 0, world_size: int = 1, device: torch.device | None = None) -> None:
        self.rank = rank
        self.world_size = world_size
        self._device = device

    def reserve(self, sizes: Iterable[int]) -> None:
        """Allocate blocks of these sizes in bytes, all at once, and free them. Talks to no rank.

        A rank that runs out of memory here raises, and can tell the others. Between two messages, the others would wait
        for it.
        """
        blocks = [torch.empty(size, dtype=torch.uint8, device=self._device) for size in sizes]
        del blocks

    def sum_on(self, owner: int, matrix: Tensor | None, width: int) -> Tensor | None:
        """Sum a symmetric fp32 matrix (width, width) over ranks, on its owner; None elsewhere. Talks to all.

        A rank without a matrix passes None, which counts as zeros. This rank's matrix stays unchanged. A reduction
        sends little more than the upper triangle, and at most a sixteenth of a large matrix at a time.
        """
        if self.world_size == 1:
            return matrix
        total = torch.empty(width, width, dtype=torch.float32, device=self._device) if self.rank == owner else None
        for strips in _batches_of_strips(width):
            shapes = [(stop - start, width - start) for start, stop in strips]
            flat = torch.zeros(sum(rows * cols for rows, cols in shapes), dtype=torch.float32, device=self._device)
            parts = torch.split(flat, [rows * cols for rows, cols in shapes])
            in_flight = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
            if matrix is not None:
                for (start, stop), strip in zip(strips, in_flight, strict=True):
                    strip.copy_(matrix[start:stop, start:])
            dist.reduce(flat, dst=owner)
            if total is not None:
                for (start, stop), strip in zip(strips, in_flight, strict=True):
                    total[start:stop, start:] = strip
                    total[stop:, start:stop] = strip[:, stop - start :].T
        return total

    def total(self, tensor: Tensor) -> Tensor:
        """Sum tensors of one shape and dtype over ranks, on all ranks. Talks to all."""
        if self.world_size > 1:
            tensor = tensor.to(self._device, copy=True)
            dist.all_reduce(tensor)
        return tensor

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
        if self.rank == source:
            assert tensor is not None
            if source != destination:
                self._exchange([(dist.isend, tensor.to(self._device).contiguous(), destination)])
            return tensor
        if self.rank != destination:
            return None
        received = torch.empty(shape, dtype=dtype, device=self._device)
        self._exchange([(dist.irecv, received, source)])
        return received

    @staticmethod
    def _exchange(messages: Sequence[tuple[Any, Tensor, int]]) -> None:
        """Send and receive (dist.isend or dist.irecv, contiguous tensor, other rank) and wait."""
        # Even one message is a batch: NCCL would open a communicator for every pair of ranks that talk alone.
        if messages:
            for work in dist.batch_isend_irecv([dist.P2POp(*message) for message in messages]):
                work.wait()

    def broadcast(self, tensor: Tensor, owner: int) -> None:
        """Overwrite a tensor, of one shape and dtype on all ranks, with the owner's values. Talks to all."""
        if self.world_size == 1:
            return
        sent = tensor.to(self._device).contiguous()
        dist.broadcast(sent, src=owner)
        if sent is not tensor:
            tensor.copy_(sent)

    def gather(self, value: Value) -> list[Value]:
        """Return the small Python values of all ranks, by rank. Talks to all."""
        if self.world_size == 1:
            return [value]
        values: list[Value | None] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]  # every entry has been filled

    def union(self, own: Mapping[str, Value]) -> dict[str, Value]:
        """Return what the small mappings of all ranks have together; of equal keys, the last rank's. Talks to all."""
        return {name: value for of_rank in self.gather(own) for name, value in of_rank.items()}


def _batches_of_strips(width: int) -> Iterator[list[tuple[int, int]]]:
    """Yield batches of strips that travel together, each strip as rows [start, stop)."""
    step = -(-width // _STRIPS)
    batch: list[tuple[int, int]] = []
    entries = 0
    for start in range(0, width, step):
        stop = min(start + step, width)
        entries += (stop - start) * (width - start)
        if batch and entries > _ENTRIES_IN_FLIGHT:
            yield batch
            batch, entries = [], (stop - start) * (width - start)
        batch.append((start, stop))
    yield batch
