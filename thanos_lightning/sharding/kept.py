"""An error of one rank that waits until all ranks can be told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from thanos_lightning.sharding.access import ParameterAccess


class KeptError:
    """Keeps the first error of this rank: raised amid a forward or a backward, it would leave the others waiting.

    Args:
        keeps: False where there are no other ranks: errors are raised where they come up.

    Attributes:
        error: The one that is kept.

    Examples:
        >>> kept = KeptError(keeps=True)
        >>> with kept.keeping():
        ...     raise ValueError("no memory")
        >>> kept.error
        ValueError('no memory')
    """

    def __init__(self, *, keeps: bool) -> None:
        self.error: Exception | None = None
        self._keeps = keeps

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Keep what the block raises."""
        try:
            yield
        except Exception as error:  # of a device that lacks memory, too
            if not self._keeps:
                raise
            self.error = self.error or error

    def raise_everywhere(self, access: ParameterAccess) -> None:
        """Raise on all ranks if one has kept an error. Talks to all ranks.

        Raises:
            ValueError: With the first rank's error, if it is one.
            RuntimeError: If it is another.
        """
        own = None
        if self.error is not None:
            is_value = isinstance(self.error, ValueError)
            own = is_value, str(self.error) if is_value else f"{type(self.error).__name__}: {self.error}"
        for rank, told in enumerate(access.gather(own)):
            if told is not None:
                is_value, message = told
                raise (ValueError if is_value else RuntimeError)(f"{message} (on rank {rank})") from self.error
