"""Collects parameters that lie in pieces on several ranks, and hands whole ones out again.

Each rank holds at most one contiguous range of a flattened parameter. Every rank can tell the range of any other, so it
knows who sends what to whom, and a piece is sent only to the ranks that need it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from thanos_lightning.ranks.access import ParameterAccess
from thanos_lightning.ranks.masks import pack_bits, unpack_bits
from thanos_lightning.ranks.view import View


class Range(NamedTuple):
    """Entries `start` to `start + numel` of a flattened parameter."""

    start: int
    numel: int

    @property
    def stop(self) -> int:
        """The entry after the last."""
        return self.start + self.numel

    def of(self, layer: View) -> Range:
        """The part that belongs to a layer, counted from where the layer begins.

        Examples:
            >>> from torch import nn
            >>> up = View("up", "up.weight", nn.Linear(3, 2), "weight", rows=2, cols=3)
            >>> Range(4, 8).of(up)
            Range(start=4, numel=2)
        """
        first = max(self.start, layer.start)
        stop = min(self.stop, layer.start + layer.rows * layer.cols)
        return Range(first - layer.start, stop - first) if stop > first else Range(0, 0)

    def piece(self, layer: View, flat: Tensor) -> Tensor:
        """The entries of a layer among those of this range, by a view."""
        part = self.of(layer)
        return flat[part.start + layer.start - self.start :][: part.numel] if part.numel else flat[:0]


def cover(ranges: Sequence[Range], numel: int, first: int) -> list[tuple[int, Range]]:
    """Choose the rank to take each entry from, so that each entry is taken once: (rank, range), in order.

    `first` is the rank that needs the result, so all that it holds is taken from it.

    Raises:
        ValueError: If no rank holds some entry.
    """
    wanted, position = ranges[first], 0
    parts: list[tuple[int, Range]] = []
    by_start = sorted((pieces.start, -pieces.stop, rank) for rank, pieces in enumerate(ranges))
    holder, stop, passed = first, 0, 0  # of the ranges that begin here or before, the one that reaches farthest
    while position < numel:
        while passed < len(by_start) and by_start[passed][0] <= position:
            if -by_start[passed][1] > stop:
                stop, holder = -by_start[passed][1], by_start[passed][2]
            passed += 1
        if wanted.start <= position < wanted.stop:
            source, end = first, wanted.stop
        elif stop <= position:
            raise ValueError(f"entry {position} of {numel} is held by no rank: {list(ranges)}")
        else:
            source, end = holder, min(stop, wanted.start) if wanted.numel and position < wanted.start else stop
        parts.append((source, Range(position, end - position)))
        position = end
    return parts


class FragmentAccess(ParameterAccess, ABC):
    """The shared part of every `ParameterAccess` whose ranks each hold a range of a parameter."""

    # What a strategy implements

    @abstractmethod
    def _range(self, layer: View, rank: int) -> Range:
        """The entries whose mask a rank needs. Talks to no rank."""

    def _exact_range(self, layer: View, rank: int) -> Range:
        """The entries whose most exact copy a rank holds: the master, if there is one. Talks to no rank."""
        return self._range(layer, rank)

    def _ranges(self, layer: View) -> list[Range]:
        return [self._range(layer, rank) for rank in range(self.world_size)]

    def _exact_ranges(self, layer: View) -> list[Range]:
        return [self._exact_range(layer, rank) for rank in range(self.world_size)]

    @abstractmethod
    def _exact_dtype(self, layer: View) -> torch.dtype:
        """The dtype of the most exact copy, the same on all ranks, even on ranks without a piece."""

    @abstractmethod
    def _read_exact(self, layer: View) -> Tensor:
        """Return this rank's piece of the most exact copy, flat."""

    @abstractmethod
    def _write_exact(self, layer: View, values: Tensor) -> None:
        """Overwrite this rank's piece of the most exact copy with flat values."""

    @abstractmethod
    def _mask_device(self, layer: View) -> torch.device:
        """The device on which the optimizer steps this rank's piece."""

    # ParameterAccess

    @torch.no_grad()
    def collect_weight(self, layer: View, owner: int) -> Tensor | None:
        values, ranges, numel = self._read_exact(layer), self._exact_ranges(layer), layer.rows * layer.cols
        begin = ranges[self.rank].start
        parts = cover(ranges, numel, first=owner)
        whole = torch.empty(numel if self.rank == owner else 0, dtype=values.dtype, device=self._device)
        into = [whole[part.start : part.stop] for _, part in parts]
        self._bring(parts, into, owner, lambda part: values[part.start - begin : part.stop - begin])
        return self._matrix(layer, whole) if self.rank == owner else None

    @torch.no_grad()
    def write(self, layer: View, weight: Tensor | None, keep: Tensor | None, owner: int) -> Tensor:
        self._write_model(layer, weight, owner)
        flat = None if weight is None else layer.oriented(weight).reshape(-1)
        values = self._hand_out(flat, self._exact_ranges(layer), owner, self._exact_dtype(layer))
        if values.numel():
            self._write_exact(layer, values)
        if keep is not None:
            keep = keep.to(self._device)
        flat = None if keep is None else layer.oriented(keep).reshape(-1).logical_not().to(torch.uint8)
        drop = self._hand_out(flat, self._ranges(layer), owner, torch.uint8).bool()
        drop = drop.to(self._mask_device(layer))
        if drop.numel():
            self._zero_moments(layer, drop)
        return drop

    def collect_keep(self, layer: View, drop: Tensor, owner: int | None) -> Tensor | None:
        bits = self.collect_bits(layer, drop, owner or 0)
        if owner is None:
            bits = torch.empty(-(-layer.rows * layer.cols // 8), dtype=torch.uint8) if bits is None else bits
            self.broadcast(bits, owner=0)
        return None if bits is None else unpack_bits(bits.to(self._device), (layer.rows, layer.cols))

    def collect_bits(self, layer: View, drop: Tensor, owner: int) -> Tensor | None:
        keep, ranges = drop.logical_not().flatten(), self._ranges(layer)
        begin = ranges[self.rank].start
        parts = cover(ranges, layer.rows * layer.cols, first=owner)
        sizes = [-(-part.numel // 8) if self.rank == owner else 0 for _, part in parts]
        bits = [torch.empty(size, dtype=torch.uint8, device=self._device) for size in sizes]
        self._bring(parts, bits, owner, lambda part: pack_bits(keep[part.start - begin : part.stop - begin]))
        if self.rank != owner:
            return None
        if not layer.transposed and all(part.start % 8 == 0 for _, part in parts):
            return torch.cat(bits).cpu()
        flat = [unpack_bits(packed.cpu(), (part.numel,)) for packed, (_, part) in zip(bits, parts, strict=True)]
        return pack_bits(self._matrix(layer, torch.cat(flat)))

    def local_drop(self, layer: View, keep: Tensor) -> Tensor:
        entries = self._range(layer, self.rank)
        flat = layer.oriented(keep).reshape(-1)[entries.start : entries.stop]
        return flat.logical_not().to(self._mask_device(layer))

    def _place(self, layer: View) -> slice:
        of_mask, stepped = self._range(layer, self.rank), self._exact_range(layer, self.rank)
        return slice(stepped.start - of_mask.start, stepped.stop - of_mask.start)

    # How pieces are sent and received

    @staticmethod
    def _matrix(layer: View, flat: Tensor) -> Tensor:
        """Reshape a flattened parameter to (out_features, in_features)."""
        return flat.view(layer.cols, layer.rows).t() if layer.transposed else flat.view(layer.rows, layer.cols)

    def _bring(
        self, parts: Sequence[tuple[int, Range]], into: Sequence[Tensor], owner: int, piece: Callable[[Range], Tensor]
    ) -> None:
        """Bring all parts to the owner, each `into` a tensor there. `piece` gives a part that this rank holds."""
        messages: list[tuple[Any, Tensor, int]] = []
        for (holder, part), place in zip(parts, into, strict=True):
            if holder == owner == self.rank:
                place.copy_(piece(part))
            elif holder == self.rank:
                messages.append((dist.isend, piece(part).to(self._device).contiguous(), owner))
            elif owner == self.rank:
                messages.append((dist.irecv, place, holder))
        self._exchange(messages)

    def _hand_out(self, whole: Tensor | None, ranges: Sequence[Range], owner: int, dtype: torch.dtype) -> Tensor:
        entries = ranges[self.rank]
        if all(other == ranges[0] for other in ranges) and self.world_size > 1:
            values = torch.empty(entries.numel, dtype=dtype, device=self._device)
            if whole is not None:
                values.copy_(whole[entries.start : entries.stop])
            dist.broadcast(values, src=owner)
            return values
        if self.rank == owner:
            assert whole is not None
            whole = whole.to(self._device, dtype)
            others = [(rank, other) for rank, other in enumerate(ranges) if rank != owner and other.numel]
            self._exchange([(dist.isend, whole[other.start : other.stop].contiguous(), rank) for rank, other in others])
            return whole[entries.start : entries.stop].clone()
        values = torch.empty(entries.numel, dtype=dtype, device=self._device)
        if entries.numel:
            self._exchange([(dist.irecv, values, owner)])
        return values
