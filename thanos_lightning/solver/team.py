"""Several processes that prune one layer together: each has some of its rows, and its weights depend on no other row.

Only choices join the rows: a budget over all weights, columns that all rows lose, rows that stay dense. For each choice
the members share a few numbers about their rows, and every member computes the same from all of them. How numbers
travel is not known here.

What fails on one member fails on all, at the same place. Members fail inside a stage; they meet whenever they share
something and at the end of each stage; and there each says whether it is in trouble before anything else is exchanged.
A member that fails goes to the next of these meetings, wherever the others will be by then, and says so.
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
    """Another member of the team has failed; it knows why."""


def split_rows(rows: int, members: int) -> list[int]:
    """How many rows each member gets: equally many, up to one.

    Examples:
        >>> from thanos_lightning.solver.team import split_rows
        >>> split_rows(8, members=3)
        [3, 3, 2]
    """
    return [rows // members + (member < rows % members) for member in range(members)]


class RowTeam(ABC):
    """The members that prune one layer, each some consecutive rows of it. All call the same in the same order.

    Attributes:
        index: This member. The rows of member 0 come first.
        rows: How many rows each member has, at least one.
    """

    index: int
    rows: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        """Rows of the layer."""
        return sum(self.rows)

    @property
    def own_rows(self) -> slice:
        """Which of them this member has."""
        start = sum(self.rows[: self.index])
        return slice(start, start + self.rows[self.index])

    @abstractmethod
    def share(self, own: Tensor) -> Tensor:
        """The tensors of all members, (members, ...). Theirs have the shape and the dtype of ``own``.

        Raises:
            FactorizationError: If that is what another member has met since the stage began.
            TeammateError: If another member has failed in another way.
        """

    @abstractmethod
    def stage(self) -> AbstractContextManager[None]:
        """A block that all members complete, or none: at the latest its end raises what ``share`` raises."""

    def total(self, own: Tensor) -> Tensor:
        """The sum of all members' tensors, in the shape of ``own``."""
        return self.share(own).sum(0)

    def every_row(self, own: Shaped[Tensor, " rows"]) -> Shaped[Tensor, " all_rows"]:
        """One value for each row of the layer, from all members.

        Args:
            own: One value for each row of this member.
        """
        padded = own.new_zeros(max(self.rows))
        padded[: len(own)] = own
        return torch.cat([part[:count] for part, count in zip(self.share(padded), self.rows, strict=True)])


class Alone(RowTeam):
    """One process, which has all rows.

    Args:
        rows: Rows of the layer.
    """

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
    """What a member says when members meet; the worst counts."""

    NONE = 0
    FACTORIZATION = 1
    OTHER = 2


class AgreeingTeam(RowTeam):
    """Several processes, of which every one knows in time when another one fails.

    Args:
        index: This member.
        rows: How many rows each member has.
        device: Where tensors have to be to be gathered.
    """

    def __init__(self, index: int, rows: Sequence[int], device: torch.device | None = None) -> None:
        self.index = index
        self.rows = tuple(rows)
        # Allocated here: a member that is out of memory has to be able to say so.
        self._own_trouble = torch.zeros(1, dtype=torch.int32, device=device)
        self._troubles = torch.zeros(len(rows), 1, dtype=torch.int32, device=device)
        self._known: Exception | None = None

    @abstractmethod
    def _gather(self, own: Tensor, everyone: Tensor) -> None:
        """Fill ``everyone``, (members, ...), by the tensors of all members; both are contiguous."""

    def agree(self) -> None:
        """Come together: all members are well, or this raises what ``share`` raises.

        What can fail comes before it, and the exchange that all are ready for comes after it.
        """
        self._meet(_Trouble.NONE)

    @contextmanager
    def exchange(self) -> Iterator[None]:
        """A block in which tensors travel. Where that itself fails, there is no way to tell the others."""
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
        """See ``RowTeam``. Stages may lie inside of each other."""
        try:
            yield
            self.agree()
        except Exception as error:
            if error is not self._known:  # else the others have met this member already
                self._meet(_Trouble.FACTORIZATION if isinstance(error, FactorizationError) else _Trouble.OTHER, error)
            raise

    def _meet(self, own: _Trouble, error: Exception | None = None) -> None:
        """Tell the others of an error of this member, and raise if another one has a worse one."""
        self._own_trouble.fill_(own)
        with self.exchange():
            self._gather(self._own_trouble, self._troubles)
        worst = int(self._troubles.max())
        self._known = error
        if worst > own:
            told = "another process of this layer's team has failed"
            self._known = FactorizationError(told) if worst == _Trouble.FACTORIZATION else TeammateError(told)
            raise self._known from error
