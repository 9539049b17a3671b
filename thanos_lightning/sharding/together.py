"""Lets ranks fail together: an error of one rank ends all, so that none waits for a rank that has given up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from thanos_lightning.sharding.ranks import Ranks


class PruningError(RuntimeError):
    """Pruning, or a training that prunes, can't go on. All ranks raise it."""


class KeptError:
    """Keeps the first error of this rank until all ranks can be told. Raised at once, it would leave them waiting.

    With one rank, or with None for `ranks`, nobody waits, and errors are raised at once.
    """

    def __init__(self, ranks: Ranks | None = None) -> None:
        self.error: Exception | None = None
        self._ranks = ranks if ranks is not None and ranks.world_size > 1 else None

    @contextmanager
    def keeping(self, *, layer: str | None = None) -> Iterator[None]:
        """Keep an error that the block raises. `layer` is the one that can't be pruned then, which the error names."""
        try:
            yield
        except Exception as failure:  # out of memory, too
            if layer is None and self._ranks is None:
                raise
            error: Exception = failure
            if layer is not None:
                error = PruningError(f"layer {layer}: {_described(failure)}. No layer of this window was pruned")
                error.__cause__ = failure
            if self._ranks is None:
                raise error from failure
            self.error = self.error or error

    def fail_together(self) -> None:
        """Raise on all ranks if one has kept an error. Talks to all ranks.

        Raises:
            PruningError: With the first error, and with its rank unless it is the same on all ranks.
        """
        if self._ranks is None:
            return
        told = self._ranks.gather(None if self.error is None else _described(self.error))
        for rank, message in enumerate(told):
            if message is not None:
                where = "" if len(set(told)) == 1 else f"rank {rank}: "
                raise PruningError(f"{where}{message}") from self.error


@contextmanager
def failing_together(ranks: Ranks) -> Iterator[None]:
    """Let all ranks leave the block, or none. All ranks must call it, and wait for each other at its end.

    Raises:
        PruningError: On all ranks, if the block raises an error on one of several. With one rank, the error itself.
    """
    kept = KeptError(ranks)
    with kept.keeping():
        yield
    kept.fail_together()


def reserve(blocks: Mapping[str, int], access: Ranks, kept: KeptError | None = None) -> None:
    """Test whether the memory for messages about layers is free. All ranks must call it.

    `blocks` maps layers to sizes in bytes. `kept` may have an error of this rank from before.

    Raises:
        PruningError: On all ranks, if one lacks the memory, or has kept an error.
    """
    kept = kept or KeptError(access)
    if access.world_size > 1 and blocks:
        with kept.keeping(layer=max(blocks, key=lambda name: blocks[name])):
            access.reserve(blocks.values())
    kept.fail_together()


def _described(error: Exception) -> str:
    """The message, after the kind of an error whose message may need it."""
    return f"{error}" if isinstance(error, (ValueError, OSError, PruningError)) else f"{type(error).__name__}: {error}"
