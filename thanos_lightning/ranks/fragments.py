"""Collects parameters that lie in pieces on several ranks, and hands whole ones out again.

Each rank holds at most one contiguous range of a flattened parameter. Every rank can tell the range of any other, so it
knows who sends what to whom, and a piece is sent only to the ranks that need it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

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
        own = self.of(layer)
        return flat[own.start + layer.start - self.start :][: own.numel] if own.numel else flat[:0]


def cover(ranges: Sequence[Range], numel: int, first: int) -> list[tuple[int, Range]]:
    """Choose the rank to take each entry from, so that each entry is taken once: (rank, range), in order.

    `first` is the rank that needs the result, so all that it holds is taken from it.

    Raises:
        ValueError: If no rank holds some entry.
    """
    own, position = ranges[first], 0
    taken: list[tuple[int, Range]] = []
    others = sorted((held.start, -held.stop, rank) for rank, held in enumerate(ranges))
    holder, stop, seen = first, 0, 0  # of those that begin here or before, the rank that holds most
    while position < numel:
        while seen < len(others) and others[seen][0] <= position:
            if -others[seen][1] > stop:
                stop, holder = -others[seen][1], others[seen][2]
            seen += 1
        if own.start <= position < own.stop:
            source, end = first, own.stop
        elif stop <= position:
            raise ValueError(f"entry {position} of {numel} is held by no rank: {list(ranges)}")
        else:
            source, end = holder, min(stop, own.start) if own.numel and position < own.start else stop
        taken.append((source, Range(position, end - position)))
        position = end
    return taken


class FragmentAccess(ParameterAccess, ABC):
    """The shared part of every `ParameterAccess` whose ranks each hold a range of a parameter."""

    # What a strategy implements

    @abstractmethod
    def _held(self, layer: View, rank: int) -> Range:
        """The entries whose mask a rank holds. Talks to no rank."""

    def _held_exactly(self, layer: View, rank: int) -> Range:
        """The entries whose most exact copy a rank holds: the master, if there is one. Talks to no rank."""
        return self._held(layer, rank)

    def _ranges(self, layer: View) -> list[Range]:
        return [self._held(layer, rank) for rank in range(self.world_size)]

    def _exact_ranges(self, layer: View) -> list[Range]:
        return [self._held_exactly(layer, rank) for rank in range(self.world_size)]

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
    def _write_model(self, layer: View, weight: Tensor | None, owner: int) -> None:
        """Overwrite the model's copy on all ranks with the owner's (out_features, in_features). Talks to all."""

    # ParameterAccess

    @torch.no_grad()
    def collect_weight(self, layer: View, owner: int) -> Tensor | None:
        return self._collect(layer, self._read_exact(layer), self._exact_ranges(layer), owner)

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
        held, keep = self._held(layer, self.rank), drop.logical_not().flatten()
        parts = cover(self._ranges(layer), layer.rows * layer.cols, first=owner)
        own = [
            pack_bits(keep[part.start - held.start :][: part.numel]) for holder, part in parts if holder == self.rank
        ]
        if self.rank != owner:
            self._exchange([(dist.isend, bits.to(self._device), owner) for bits in own])
            return None
        bits, awaited = [], []
        for holder, part in parts:
            if holder == owner:
                bits.append(own.pop(0))
            else:
                bits.append(torch.empty(-(-part.numel // 8), dtype=torch.uint8, device=self._device))
                awaited.append((dist.irecv, bits[-1], holder))
        self._exchange(awaited)
        if not layer.transposed and all(part.start % 8 == 0 for _, part in parts):
            return torch.cat([one.cpu() for one in bits])
        flat = [unpack_bits(one.cpu(), (part.numel,)) for one, (_, part) in zip(bits, parts, strict=True)]
        return pack_bits(self._matrix(layer, torch.cat(flat)))

    def local_drop(self, layer: View, keep: Tensor) -> Tensor:
        held = self._held(layer, self.rank)
        flat = layer.oriented(keep).reshape(-1)[held.start : held.stop]
        return flat.logical_not().to(self._mask_device(layer))

    @abstractmethod
    def _mask_device(self, layer: View) -> torch.device:
        """The device on which the optimizer steps this rank's piece."""

    def _place(self, layer: View) -> slice:
        held, stepped = self._held(layer, self.rank), self._held_exactly(layer, self.rank)
        return slice(stepped.start - held.start, stepped.stop - held.start)

    # How pieces are sent and received

    @staticmethod
    def _matrix(layer: View, flat: Tensor) -> Tensor:
        """Reshape a flattened parameter to (out_features, in_features)."""
        return flat.view(layer.cols, layer.rows).t() if layer.transposed else flat.view(layer.rows, layer.cols)

    def _collect(self, layer: View, own: Tensor, ranges: Sequence[Range], owner: int) -> Tensor | None:
        numel = layer.rows * layer.cols
        parts = cover(ranges, numel, first=owner)
        held = ranges[self.rank]
        if self.rank != owner:
            mine = [own[part.start - held.start :][: part.numel] for holder, part in parts if holder == self.rank]
            self._exchange([(dist.isend, piece.to(self._device).contiguous(), owner) for piece in mine])
            return None
        whole = torch.empty(numel, dtype=own.dtype, device=self._device)
        awaited = []
        for holder, part in parts:
            into = whole[part.start : part.stop]
            if holder == owner:
                into.copy_(own[part.start - held.start :][: part.numel])
            else:
                awaited.append((dist.irecv, into, holder))
        self._exchange(awaited)
        return self._matrix(layer, whole)

    def _hand_out(self, whole: Tensor | None, ranges: Sequence[Range], owner: int, dtype: torch.dtype) -> Tensor:
        held = ranges[self.rank]
        if all(other == ranges[0] for other in ranges) and self.world_size > 1:
            values = torch.empty(held.numel, dtype=dtype, device=self._device)
            if whole is not None:
                values.copy_(whole[held.start : held.stop])
            dist.broadcast(values, src=owner)
            return values
        if self.rank == owner:
            assert whole is not None
            whole = whole.to(self._device, dtype)
            others = [(rank, other) for rank, other in enumerate(ranges) if rank != owner and other.numel]
            self._exchange([(dist.isend, whole[other.start : other.stop].contiguous(), rank) for rank, other in others])
            return whole[held.start : held.stop].clone()
        values = torch.empty(held.numel, dtype=dtype, device=self._device)
        if held.numel:
            self._exchange([(dist.irecv, values, owner)])
        return values
