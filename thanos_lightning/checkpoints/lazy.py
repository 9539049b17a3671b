"""Tensors that stay on disk until they are asked for, and parts of tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from torch import Tensor


class LazyTensors(Mapping[str, Tensor]):
    """A mapping that keeps no tensors: every access calls the function of that name in `make`."""

    def __init__(self, make: Mapping[str, Callable[[], Tensor]]) -> None:
        self._make = dict(make)

    def __getitem__(self, name: str) -> Tensor:
        return self._make[name]()

    def __contains__(self, name: object) -> bool:
        return name in self._make

    def __iter__(self) -> Iterator[str]:
        return iter(self._make)

    def __len__(self) -> int:
        return len(self._make)

    def stored_name(self, names: Sequence[str]) -> str:
        """Return which of a parameter's names is here, because tied weights are stored once; the first if none is."""
        return next((name for name in names if name in self), names[0])


def without_prefix(tensors: Mapping[str, Tensor], prefix: str) -> LazyTensors:
    """Those of the tensors whose names begin with the prefix, under the rest of their names."""
    return LazyTensors(
        {name.removeprefix(prefix): partial(tensors.__getitem__, name) for name in tensors if name.startswith(prefix)}
    )


def changed(tensors: Mapping[str, Tensor], changes: Mapping[str, Callable[[Tensor], Tensor]]) -> LazyTensors:
    """The same tensors, of which some are changed whenever they are read."""

    def make(name: str) -> Tensor:
        return changes[name](tensors[name]) if name in changes else tensors[name]

    return LazyTensors({name: partial(make, name) for name in tensors})


_PART = re.compile(r"(?P<whole>.+)\[(?P<expert>\d+)(?:, (?P<start>\d+):(?P<stop>\d+))?\]")


def whole_of(name: str) -> str:
    """The name of the tensor that a name with a place, such as "down_proj[7]", is a part of; or the name itself.

    Examples:
        >>> whole_of("experts.gate_up_proj[7, 0:64]"), whole_of("up_proj.weight")
        ('experts.gate_up_proj', 'up_proj.weight')
    """
    match = _PART.fullmatch(name)
    return name if match is None else match["whole"]


def part_of(tensor: Tensor, name: str) -> Tensor:
    """The part of a whole tensor that a name with a place stands for, as a view.

    Examples:
        >>> import torch
        >>> part_of(torch.arange(8).view(2, 2, 2), "experts.gate_up_proj[1, 0:1]")
        tensor([[4, 5]])
    """
    match = _PART.fullmatch(name)
    if match is None:
        return tensor
    rows = slice(None) if match["start"] is None else slice(int(match["start"]), int(match["stop"]))
    return tensor[int(match["expert"]), rows]


class WithParts(LazyTensors):
    """A mapping of tensors that has their parts, too, by name and place. The last whole tensor stays in memory."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__({name: partial(tensors.__getitem__, name) for name in tensors})
        self._last: tuple[str, Tensor] | None = None

    def __getitem__(self, name: str) -> Tensor:
        whole = whole_of(name)
        if whole == name:
            return super().__getitem__(name)
        if self._last is None or self._last[0] != whole:
            self._last = (whole, super().__getitem__(whole))
        return part_of(self._last[1], name)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and super().__contains__(whole_of(name))
