"""Keep masks and their form in a checkpoint: one bit per entry, keyed by parameter name, plain values only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from thanos_lightning.report.plain import read_as
from thanos_lightning.solver import Channels, Pattern, parse_pattern


def pack_bits(mask: Tensor) -> Tensor:
    """Pack a bool tensor of any shape into a flat uint8 tensor on the CPU, eight entries a byte, lowest bit first."""
    flat = mask.detach().flatten()
    padded = torch.nn.functional.pad(flat.to(torch.uint8), (0, -flat.numel() % 8))
    places = torch.arange(8, dtype=torch.uint8, device=flat.device)
    return (padded.view(-1, 8) << places).sum(dim=1, dtype=torch.uint8).cpu()


def unpack_bits(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Undo `pack_bits`: return a bool tensor of the shape, on the device of `packed`.

    Raises:
        ValueError: If the number of bytes is not ceil(prod(shape) / 8).
    """
    numel = _require_size(packed, shape)
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed.unsqueeze(1) >> places) & 1
    return bits.flatten()[:numel].bool().view(shape)


def _require_size(packed: Tensor, shape: tuple[int, ...]) -> int:
    """Return the number of entries of the shape, after checking that the packed bytes fit it."""
    numel = math.prod(shape)
    if packed.numel() != -(-numel // 8):
        raise ValueError(
            f"a packed mask of shape {tuple(shape)} takes {-(-numel // 8)} bytes, but {packed.numel()} were stored: "
            "the checkpoint is damaged, resume from another one"
        )
    return numel


@dataclass(frozen=True, eq=False)
class LayerMask:
    """The keep mask of a pruned layer. It stays packed until its entries are needed.

    Raises:
        ValueError: If the bits do not fit the shape.
    """

    bits: Tensor  # uint8 (ceil(out_features · in_features / 8),): the keep mask, as `pack_bits` returns it
    shape: tuple[int, int]  # (out_features, in_features)
    pattern: Pattern  # that the mask was made for, at the sparsity of its event
    transposed: bool = False  # whether the parameter is (in_features, out_features), as in transformers' Conv1D

    def __post_init__(self) -> None:
        _require_size(self.bits, self.shape)

    @classmethod
    def of(cls, keep: Tensor, pattern: Pattern, transposed: bool = False) -> LayerMask:
        """Make a mask from its entries: bool (out_features, in_features), True = kept."""
        rows, cols = keep.shape
        return cls(pack_bits(keep), (rows, cols), pattern, transposed)

    @property
    def keep(self) -> Tensor:
        """Bool (out_features, in_features), True = kept."""
        return unpack_bits(self.bits, self.shape)

    @property
    def stored_shape(self) -> tuple[int, int]:
        """Shape of the parameter as the model stores it."""
        rows, cols = self.shape
        return (cols, rows) if self.transposed else (rows, cols)

    def state(self) -> dict[str, Any]:
        """The mask as plain values: what `from_state` reads."""
        return {
            "bits": self.bits,
            "shape": list(self.shape),
            "transposed": self.transposed,
            "pattern": self.pattern.name,
            "sparsity": self.pattern.sparsity,
            "outlier_fraction": self.pattern.outlier_fraction,
            **dim_of_channels(self.pattern),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> LayerMask:
        """Read what `state` wrote.

        Raises:
            ValueError: If a value is of another type, the bits do not fit the shape, or the pattern is invalid.
        """
        shape = read_as(tuple[int, int], state.get("shape"), "a mask's shape")
        bits = read_as(Tensor, state.get("bits"), "a mask's bits")
        if min(shape) < 1 or bits.dtype != torch.uint8 or bits.dim() != 1:
            raise ValueError(f"a mask has {bits.dtype} {tuple(bits.shape)} for {shape}: give an undamaged checkpoint")
        return cls(bits, shape, recorded_pattern(state), read_as(bool, state.get("transposed"), "a mask's transposed"))


def checked(
    masks: Iterable[tuple[str, LayerMask]], pruned: Mapping[str, int]
) -> Iterator[tuple[str, LayerMask, Tensor]]:
    """Yield each (name, mask) with the mask's entries, after holding it against its pattern and what was recorded.

    `pruned` has the number of pruned entries of all masks that were saved.

    Raises:
        ValueError: If a mask keeps more than its pattern allows, or prunes another number of entries than was
            recorded, or after the last one, if a mask is missing. The message names the mask.
    """
    mend = "the checkpoint was changed after it was saved, take another one"
    missing = dict(pruned)
    for name, mask in masks:
        keep = mask.keep
        if excess := mask.pattern.violations(keep):
            raise ValueError(f"the mask of {name} keeps {excess} more entries than {mask.pattern.name} allows: {mend}")
        dropped = keep.numel() - int(keep.count_nonzero())
        if dropped != (recorded := missing.pop(name, 0)):
            raise ValueError(f"the mask of {name} prunes {dropped} entries, recorded were {recorded}: {mend}")
        yield name, mask, keep
    if missing:
        name, number = next(iter(missing.items()))
        raise ValueError(f"the mask of {name}, of {number} pruned entries, is missing: {mend}")


def dim_of_channels(pattern: Pattern) -> dict[str, int]:
    """What a record of a pattern needs beside its name and fractions: where channels lie, if it is of channels."""
    return {"dim": pattern.dim} if isinstance(pattern, Channels) else {}


def recorded_pattern(entry: Mapping[str, Any]) -> Pattern:
    """Read the pattern of a mask's state, or of an entry of `sparsity.json`. An invalid one raises a ValueError."""
    name = read_as(str, entry.get("pattern"), "a pattern's name")
    sparsity = read_as(float, entry.get("sparsity"), f"sparsity of {name}")
    pattern = parse_pattern(
        name, sparsity, read_as(float, entry.get("outlier_fraction"), f"outlier_fraction of {name}")
    )
    if not isinstance(pattern, Channels):
        return pattern
    if (dim := read_as(int, entry.get("dim"), f"dim of {name}")) not in (0, 1):
        raise ValueError(f"dim of {name} is {dim}: it is 0 or 1")
    return replace(pattern, dim=dim)
