"""Checkpoints that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy, Strategy
from typing_extensions import override

from thanos_lightning.checksums import require_intact
from thanos_lightning.progress import open_phase


class UnwrittenError(OSError):
    """A checkpoint could not be written, and nothing of it is left."""


class WholeFiles(TorchCheckpointIO):
    """Writes beside the file and renames: Lightning's own leaves a part of it where the disk is full.

    A file of which bytes have changed is refused when it is loaded.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     WholeFiles().save_checkpoint({"a": 1}, f"{folder}/a.ckpt")
        ...     os.listdir(folder)
        ['a.ckpt']
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        file = Path(path)
        partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as opened:
                torch.save(checkpoint, opened)
            partial.replace(file)
        except (OSError, RuntimeError) as error:  # torch's, of a write that failed
            cause = error if isinstance(error, OSError) else error.__context__
            why = os.strerror(cause.errno) if isinstance(cause, OSError) and cause.errno else str(error)
            raise UnwrittenError(
                f"{file} can't be written ({why}), and nothing was left under that name: make room, or give another "
                "default_root_dir, and go on from the last checkpoint (ckpt_path)"
            ) from error
        finally:
            with suppress(OSError):  # it has its name by now, or never was
                partial.unlink()

    @override
    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if Path(path).is_file():
            try:
                with open_phase(f"Reading {Path(path).name}"):
                    require_intact(Path(path))
            except ValueError as error:
                raise MisconfigurationException(str(error)) from error
        return super().load_checkpoint(path, *args, **kwargs)


def save_whole(strategy: Strategy) -> None:
    """Let a strategy that writes a file by Lightning's own means, or a folder, write it whole."""
    if isinstance(strategy, DeepSpeedStrategy) or getattr(strategy, "_save_distributed_checkpoint", False):
        _write_beside(strategy)
        return
    writes_a_file = isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)) and not isinstance(
        strategy, DeepSpeedStrategy
    )
    if writes_a_file and type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = WholeFiles()


def _write_beside(strategy: Any) -> None:
    """Let a strategy whose ranks write one folder do so beside it, and rename it when all have written."""
    if hasattr(strategy.save_checkpoint, "writes_beside"):
        return
    save = strategy.save_checkpoint

    def save_checkpoint(checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        if "://" in str(filepath):
            save(checkpoint, filepath, storage_options)
            return
        path = Path(strategy.broadcast(filepath))
        partial = path.with_name(f".{path.name}.partial")
        if strategy.is_global_zero:
            shutil.rmtree(partial, ignore_errors=True)  # of a rank that was killed
        strategy.barrier()
        save(checkpoint, partial, storage_options)
        strategy.barrier()
        if strategy.is_global_zero:
            _put_in_place(partial, path)
        strategy.barrier()
        if strategy.local_rank == 0 and partial.exists():  # of a node with a disk of its own
            _put_in_place(partial, path)

    save_checkpoint.writes_beside = True  # type: ignore[attr-defined]
    strategy.save_checkpoint = save_checkpoint


def _put_in_place(partial: Path, path: Path) -> None:
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    partial.rename(path)
    if old.is_dir():
        shutil.rmtree(old)
    else:
        old.unlink(missing_ok=True)
