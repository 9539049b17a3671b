"""Tensors that stay on disk until they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

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
