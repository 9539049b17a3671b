"""Checkpoints that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy, Strategy
from torch.distributed.checkpoint.api import CheckpointException
from typing_extensions import override

from thanos_lightning.checkpoints.folders import bring_back, clear, partial_beside, put_in_place, remove
from thanos_lightning.ranks.talk import PruningError, Ranks, failing_together


class WholeFiles(TorchCheckpointIO):
    """Writes a temporary file and renames it. Lightning's own class leaves part of a file if the disk is full."""

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        file = Path(path)
        partial = partial_beside(file)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as opened:
                torch.save(checkpoint, opened)
            partial.replace(file)
        except (OSError, RuntimeError) as error:  # torch raises RuntimeError if a write fails
            raise _unwritten(file, error) from error
        finally:
            with suppress(OSError):  # it was renamed, or never made
                partial.unlink()


def _unwritten(path: Path, error: BaseException) -> PruningError:
    cause = error if isinstance(error, OSError) else error.__context__
    why = os.strerror(cause.errno) if isinstance(cause, OSError) and cause.errno else str(error)
    return PruningError(
        f"{path} can't be written ({why}), and nothing was left under that name: make room, or give another "
        "default_root_dir, and go on from the last checkpoint (ckpt_path)"
    )


def save_whole(strategy: Strategy, *, shards: bool = False) -> None:
    """Make a strategy's checkpoints appear whole or not at all, if they are folders or Lightning's own files.

    Changes the strategy in place. `shards` says whether it writes a folder to which each rank adds its shards. If one
    rank cannot write, all ranks raise a `PruningError`. Loading finds a folder that a killed save has set aside.
    """
    if hasattr(strategy.save_checkpoint, "whole"):
        return
    if isinstance(strategy, DeepSpeedStrategy) or shards:
        write = _by_deepspeed if isinstance(strategy, DeepSpeedStrategy) else _by_torch
        _replace(strategy, _beside(strategy, write))
        strategy.load_checkpoint = _brought_back(strategy.load_checkpoint)  # type: ignore[method-assign]
    elif isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)):
        if type(strategy.checkpoint_io) is TorchCheckpointIO:
            strategy.checkpoint_io = WholeFiles()
        if isinstance(strategy, DDPStrategy):
            _replace(strategy, _by_the_first(strategy))


def _replace(strategy: Strategy, save_checkpoint: Any) -> None:
    save_checkpoint.whole = True
    strategy.save_checkpoint = save_checkpoint  # type: ignore[method-assign]


def _brought_back(load: Callable[..., dict[str, Any]]) -> Any:
    def load_checkpoint(checkpoint_path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        bring_back(Path(checkpoint_path))
        return load(checkpoint_path, *args, **kwargs)

    return load_checkpoint


@contextmanager
def _written_together(strategy: Any, path: Path) -> Iterator[None]:
    """Raise on all ranks if one rank's block fails to write. All ranks must call it, and wait for each other."""
    with failing_together(Ranks(strategy.global_rank, strategy.world_size)):
        try:
            yield
        except (OSError, RuntimeError) as error:  # torch raises RuntimeError if a write fails
            raise _unwritten(path, error) from error


def _by_the_first(strategy: Any) -> Any:
    """Wrap a save in which rank 0 writes one file."""
    save = strategy.save_checkpoint

    def save_checkpoint(checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        unwritten = None
        try:
            save(checkpoint, filepath, storage_options)
        except PruningError as error:  # others may come amid a talk, and are raised at once
            unwritten = error
        with failing_together(Ranks(strategy.global_rank, strategy.world_size)):
            if unwritten is not None:
                raise unwritten

    return save_checkpoint


def _by_deepspeed(strategy: Any, save: Callable[[], None]) -> BaseException | None:
    """DeepSpeed's ranks meet after writing. A rank that cannot write joins them, or the others would hang."""
    engine = strategy.deepspeed_engine.checkpoint_engine
    write = engine.save
    errors: list[Exception] = []

    def keep(*args: Any, **kwargs: Any) -> None:
        try:
            write(*args, **kwargs)
        except (OSError, RuntimeError) as error:  # torch raises RuntimeError if a write fails
            errors.append(error)

    engine.save = keep
    try:
        save()
    finally:
        engine.save = write
    return next(iter(errors), None)


def _by_torch(strategy: Any, save: Callable[[], None]) -> BaseException | None:
    """Torch tells every rank about all failures. Only the lowest failed rank returns its own."""
    try:
        save()
    except CheckpointException as error:
        failed, _ = next(iter(error.failures.values()))
        return failed if strategy.global_rank == min(error.failures) else None
    except OSError as error:  # rank 0 failed to write its additional file
        return error
    return None


def _beside(strategy: Any, write: Callable[[Any, Callable[[], None]], BaseException | None]) -> Any:
    """Wrap a save in which all ranks write a temporary folder, which is renamed when all have written."""
    save = strategy.save_checkpoint

    def save_checkpoint(checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        if "://" in str(filepath):
            save(checkpoint, filepath, storage_options)
            return
        path = Path(strategy.broadcast(filepath))
        if strategy.local_rank == 0:  # a node may have its own disk
            clear(path)
        partial = Path(strategy.broadcast(partial_beside(path) if strategy.local_rank == 0 else None))
        strategy.barrier()
        # Whoever has made the folder renames it. Nobody looks whether it is there: over NFS, another node may see a
        # name that was renamed half a minute ago. To make a new name asks the disk itself
        made = False
        for has_turn in (strategy.is_global_zero, strategy.local_rank == 0):
            with _written_together(strategy, path), suppress(FileExistsError):
                if has_turn and not made:
                    partial.mkdir(parents=True)
                    made = True
        failure = write(strategy, lambda: save(checkpoint, partial, storage_options))
        try:
            with _written_together(strategy, path):
                if failure is not None:
                    raise failure
        except PruningError:
            remove(partial)
            raise
        with _written_together(strategy, path):
            if made:
                put_in_place(partial, path)

    return save_checkpoint
