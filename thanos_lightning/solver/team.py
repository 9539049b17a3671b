"""A team of processes that prune one layer together. Each member has some of the rows, and the rows are independent.

Only choices join the rows: a budget over all weights, columns that all rows lose, rows that stay dense. For each choice
the members share a few numbers about their rows, and every member computes the same choice from them. Subclasses decide
how numbers travel.

If one member fails, all members fail at the same place. Members fail inside a stage. They meet whenever they share
something, and at the end of each stage. At a meeting each member first says whether it has failed. A member that fails
goes straight to the next meeting, wherever the others meet next, and says so there.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from enum import IntEnum

import torch
from jaxtyping import Shaped
from torch import Tensor

from thanos_lightning.solver.linalg import FactorizationError


class TeammateError(RuntimeError):
    """Another member of the team has failed. That member raises the cause."""


def split_rows(rows: int, members: int) -> list[int]:
    """How many rows each member gets: equally many, up to one.

    Examples:
        >>> from thanos_lightning.solver.team import split_rows
        >>> split_rows(8, members=3)
        [3, 3, 2]
    """
    return [rows // members + (member < rows % members) for member in range(members)]


class RowTeam(ABC):
    """The members that prune one layer. Each has consecutive rows, and all make the same calls in the same order.

    Attributes:
        index: This member. The rows of member 0 come first.
        rows: How many rows each member has, at least one.
    """

    index: int
    rows: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        """Number of rows of the layer."""
        return sum(self.rows)

    @property
    def own_rows(self) -> slice:
        """The rows of this member, among those of the layer."""
        start = sum(self.rows[: self.index])
        return slice(start, start + self.rows[self.index])

    @abstractmethod
    def share(self, own: Tensor) -> Tensor:
        """The tensors of all members, (members, ...). All members give the same shape and dtype.

        Raises:
            FactorizationError: If another member has raised it since the stage began.
            TeammateError: If another member has failed in another way.
        """

    @abstractmethod
    def stage(self) -> AbstractContextManager[None]:
        """A block that all members complete, or none. If one fails, the others raise as in ``share`` by its end."""

    def total(self, own: Tensor) -> Tensor:
        """The sum of all members' tensors, in the shape of ``own``."""
        return self.share(own).sum(0)

    def every_row(self, own: Shaped[Tensor, " rows"]) -> Shaped[Tensor, " all_rows"]:
        """One value for each row of the layer, from all members. ``own`` has one for each row of this member."""
        padded = own.new_zeros(max(self.rows))
        padded[: len(own)] = own
        return torch.cat([part[:count] for part, count in zip(self.share(padded), self.rows, strict=True)])


class Alone(RowTeam):
    """A team of one process that has all rows."""

    def __init__(self, rows: int) -> None:
        self.index = 0
        self.rows = (rows,)

    def share(self, own: Tensor) -> Tensor:
        """See ``RowTeam``."""
        return own.unsqueeze(0)

    def stage(self) -> AbstractContextManager[None]:
        """See ``RowTeam``."""
        return nullcontext()


class _Trouble(IntEnum):
    """What a member reports at a meeting. The worst report counts."""

    NONE = 0
    FACTORIZATION = 1
    OTHER = 2


class AgreeingTeam(RowTeam):
    """A team of several processes. Each learns in time when another fails, who says so by a tensor on ``device``."""

    def __init__(self, index: int, rows: Sequence[int], device: torch.device | None = None) -> None:
        self.index = index
        self.rows = tuple(rows)
        # Allocated early, since a member that is out of memory has to be able to report it.
        self._own_trouble = torch.zeros(1, dtype=torch.int32, device=device)
        self._troubles = torch.zeros(len(rows), 1, dtype=torch.int32, device=device)
        self._known: Exception | None = None

    @abstractmethod
    def _gather(self, own: Tensor, everyone: Tensor) -> None:
        """Fill ``everyone``, (members, ...), with the tensors of all members. Both arguments are contiguous."""

    def agree(self) -> None:
        """Meet the other members, and raise as in ``share`` if one of them has failed.

        Do the work that can fail before this call, and exchange tensors after it.
        """
        self._meet(_Trouble.NONE)

    @contextmanager
    def exchange(self) -> Iterator[None]:
        """A block in which tensors travel. If the exchange itself fails, this member can't tell the others."""
        try:
            yield
        except Exception as lost:
            self._known = lost
            raise

    def share(self, own: Tensor) -> Tensor:
        """See ``RowTeam``."""
        own = own.contiguous()
        everyone = own.new_empty(len(self.rows), *own.shape)
        self.agree()
        with self.exchange():
            self._gather(own, everyone)
        return everyone

    @contextmanager
    def stage(self) -> Iterator[None]:
        """See ``RowTeam``. Stages may be nested."""
        self._known = None
        try:
            yield
            self.agree()
        except Exception as error:
            if error is not self._known:  # otherwise the others know it already
                self._meet(_Trouble.FACTORIZATION if isinstance(error, FactorizationError) else _Trouble.OTHER, error)
            raise

    def _meet(self, own: _Trouble, error: Exception | None = None) -> None:
        """Report an error of this member to the others, and raise if another member has a worse one."""
        self._own_trouble.fill_(own)
        with self.exchange():
            self._gather(self._own_trouble, self._troubles)
        worst = int(self._troubles.max())
        self._known = error
        if worst > own:
            message = "another process of this layer's team has failed"
            self._known = FactorizationError(message) if worst == _Trouble.FACTORIZATION else TeammateError(message)
            raise self._known from error
