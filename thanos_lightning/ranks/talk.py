"""How ranks communicate, and how they fail together, so that none waits for a rank that has given up."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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

    def union(self, mapping: Mapping[str, Value]) -> dict[str, Value]:
        """Return what the small mappings of all ranks have together; of equal keys, the last rank's. Talks to all."""
        return {name: value for of_rank in self.gather(mapping) for name, value in of_rank.items()}


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


class PruningError(RuntimeError):
    """Pruning, or a training that prunes, can't go on. All ranks raise it."""


class Failures:
    """Keeps the first error of this rank until all ranks can be told. Raised at once, it would leave them waiting.

    With one rank, or with None for `ranks`, nobody waits, and errors are raised at once.
    """

    def __init__(self, ranks: Ranks | None = None) -> None:
        self.error: Exception | None = None
        self._ranks = ranks if ranks is not None and ranks.world_size > 1 else None

    @contextmanager
    def catching(self, *, layer: str | None = None) -> Iterator[None]:
        """Keep an error that the block raises. `layer` is the one that can't be pruned then, which the error names."""
        try:
            yield
        except Exception as failure:  # out of memory, too
            if layer is None and self._ranks is None:
                raise
            error: Exception = failure
            if layer is not None:
                error = PruningError(f"layer {layer}: {_described(failure)}. No layer of this window was pruned")
                error.__cause__ = failure
            if self._ranks is None:
                raise error from failure
            self.error = self.error or error

    def raise_together(self) -> None:
        """Raise on all ranks if one has kept an error. Talks to all ranks.

        Raises:
            PruningError: With the first error, and with its rank unless it is the same on all ranks.
        """
        if self._ranks is None:
            return
        messages = self._ranks.gather(None if self.error is None else _described(self.error))
        for rank, message in enumerate(messages):
            if message is not None:
                where = "" if len(set(messages)) == 1 else f"rank {rank}: "
                raise PruningError(f"{where}{message}") from self.error


@contextmanager
def failing_together(ranks: Ranks) -> Iterator[None]:
    """Let all ranks leave the block, or none. All ranks must call it, and wait for each other at its end.

    Raises:
        PruningError: On all ranks, if the block raises an error on one of several. With one rank, the error itself.
    """
    failures = Failures(ranks)
    with failures.catching():
        yield
    failures.raise_together()


def reserve(blocks: Mapping[str, int], ranks: Ranks, failures: Failures | None = None) -> None:
    """Test whether the memory for messages about layers is free. All ranks must call it.

    `blocks` maps layers to sizes in bytes. `failures` may have an error of this rank from before.

    Raises:
        PruningError: On all ranks, if one lacks the memory, or has kept an error.
    """
    failures = failures or Failures(ranks)
    if ranks.world_size > 1 and blocks:
        with failures.catching(layer=max(blocks, key=lambda name: blocks[name])):
            ranks.reserve(blocks.values())
    failures.raise_together()


def _described(error: Exception) -> str:
    """The message, after the kind of an error whose message may need it."""
    return f"{error}" if isinstance(error, (ValueError, OSError, PruningError)) else f"{type(error).__name__}: {error}"
