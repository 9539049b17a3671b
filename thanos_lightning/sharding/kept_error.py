"""Keeps an error of one rank until all ranks can be told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from thanos_lightning.sharding.access import ParameterAccess


class KeptError:
    """Keeps the first error of this rank. Raised within a forward or backward, it would leave other ranks waiting.

    With `keeps=False`, where there are no other ranks, errors are raised at once.

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
        """Keep an error that the block raises."""
        try:
            yield
        except Exception as error:  # out of memory, too
            if not self._keeps:
                raise
            self.error = self.error or error

    def raise_everywhere(self, access: ParameterAccess) -> None:
        """Raise on all ranks if one has kept an error. Talks to all ranks.

        Raises:
            ValueError: If the first rank with an error has kept a ValueError.
            RuntimeError: If that rank has kept another error.
        """
        own = None
        if self.error is not None:
            is_value = isinstance(self.error, ValueError)
            own = is_value, str(self.error) if is_value else f"{type(self.error).__name__}: {self.error}"
        for rank, failure in enumerate(access.gather(own)):
            if failure is not None:
                is_value, message = failure
                raise (ValueError if is_value else RuntimeError)(f"{message} (on rank {rank})") from self.error
