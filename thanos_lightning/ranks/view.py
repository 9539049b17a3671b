"""A matrix that lies in a parameter: the part of the parameter that it takes, and its orientation there."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn


def whole_shape(parameter: Tensor) -> tuple[int, ...]:
    """Return the whole shape of a parameter, even if this rank holds only a piece of it."""
    # DeepSpeed's ZeRO-3 leaves an empty tensor behind, and keeps the shape in ds_shape.
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def numel_of(parameters: Iterable[Tensor]) -> int:
    """Return the number of entries of whole parameters, even if this rank holds only pieces of them."""
    return sum(math.prod(whole_shape(parameter)) for parameter in parameters)


class Part(NamedTuple):
    """A matrix in a parameter of three dimensions: rows of one entry of the first dimension."""

    entry: int
    rows: slice = slice(None)

    def of(self, tensor: Tensor) -> Tensor:
        """The matrix in a tensor of the parameter's shape, by a view."""
        return tensor[self.entry, self.rows]

    def __str__(self) -> str:
        """As one writes it in Python.

        Examples:
            >>> f"gate_up_proj{Part(7, slice(0, 64))}"
            'gate_up_proj[7, 0:64]'
        """
        rows = "" if self.rows == slice(None) else f", {self.rows.start}:{self.rows.stop}"
        return f"[{self.entry}{rows}]"


@dataclass(frozen=True)
class View:
    """A matrix of (rows, cols) in a parameter, of which ranks may hold pieces. A bias is a matrix of one column."""

    name: str
    parameter_name: str  # among the model's parameters; followed by the part, if the matrix is a part
    holder: nn.Module  # has the parameter as an attribute
    attribute: str
    rows: int  # out_features
    cols: int  # in_features; 1 of a bias
    transposed: bool = False  # whether it is stored as (in_features, out_features), as transformers' Conv1D does
    part: Part | None = None  # None: the whole parameter

    @property
    def parameter(self) -> nn.Parameter:
        """The whole parameter as it is stored.

        It is read anew each time, because wrappers and moves may replace it.
        """
        parameter = getattr(self.holder, self.attribute)
        assert isinstance(parameter, nn.Parameter), "checked where layers are found"
        return parameter

    @property
    def start(self) -> int:
        """The entry of the flattened parameter with which the matrix begins."""
        if self.part is None:
            return 0
        _, first, second = whole_shape(self.parameter)
        return (self.part.entry * first + range(first)[self.part.rows][0]) * second

    def part_of(self, tensor: Tensor) -> Tensor:
        """The entries of the matrix in a tensor of the parameter's shape, by a view."""
        return tensor if self.part is None else self.part.of(tensor)

    def oriented(self, tensor: Tensor) -> Tensor:
        """Convert between the layout in the parameter and (rows, cols), by a view."""
        if self.attribute == "bias":
            return tensor.squeeze(1) if tensor.ndim == 2 else tensor.unsqueeze(1)
        return tensor.t() if self.transposed else tensor
