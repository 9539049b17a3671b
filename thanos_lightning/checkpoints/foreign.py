"""What a file has to be before it is opened: others may have written it, or its bytes may have changed."""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

_LONGEST = 255  # letters of a name, which is what file systems allow
_OF_FIT = "say fit --weights_only false (in Python, fit(…, weights_only=False))"
# All that torch writes into the metadata of FSDP2's folders, beside plain values and dtypes
_OF_METADATA = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "pathlib": {"Path", "PosixPath", "WindowsPath"},
    "pathlib._local": {"Path", "PosixPath", "WindowsPath"},  # where Python 3.13 has them
}


def require_regular(path: Path) -> None:
    """Raise an error if there is nothing at the path, or something that could be read without an end."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: give a file that does")
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no regular file but a device or a pipe"
        raise ValueError(f"{path} is {what}: give a file, or copy what it gives into one")


def require_regular_files(folder: Path) -> None:
    """Refuse a folder in which there is something else than files and folders. Any other path passes."""
    for file in folder.iterdir() if folder.is_dir() else ():
        if file.exists() and not file.is_dir():
            require_regular(file)


def require_bounded(path: Path) -> None:
    """Refuse a checkpoint that could become far more in memory than its file is: its parts are compressed, or overlap.

    `torch.save` writes each part as it is, so that a checkpoint needs no more memory than its file has bytes.
    """
    require_regular(path)
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
    except Exception as error:  # zipfile raises many kinds of errors for damaged names and sizes
        raise ValueError(f"{path} is damaged ({error}): take another checkpoint, or copy it again") from error
    compressed = next((part for part in parts if part.compress_type != zipfile.ZIP_STORED), None)
    if compressed is not None:
        raise ValueError(
            f"{path} has a compressed part ({compressed.filename[:_LONGEST]}), which torch.save never writes and which "
            "may become larger than memory: take another checkpoint"
        )
    size = sum(part.file_size for part in parts)
    if size > path.stat().st_size:
        raise ValueError(
            f"{path} has parts of {size:,} bytes in all, more than the whole file of {path.stat().st_size:,}: they "
            "overlap, as torch.save never writes them: take another checkpoint"
        )


def require_intact(path: Path) -> None:
    """Check every part of a file from `torch.save` against its checksum (CRC-32), which `torch.load` does not do.

    Reads the whole file, and raises ValueError if bytes of it have changed. Files in the format from before torch 1.6
    have no checksums and pass.
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except Exception as error:  # zipfile raises many kinds of errors for damaged names and sizes
        broken = type(error).__name__
    if broken is not None:
        raise ValueError(
            f"{path} is damaged: some of its bytes are not those that were written ({broken}). Take another "
            "checkpoint, or copy it again"
        )


def inside(folder: Path, name: str, named_by: Path) -> Path:
    """The path of a name that a file gives, right inside `folder`. Raises ValueError if the name leads elsewhere."""
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\\0") or len(name) > _LONGEST:
        raise ValueError(
            f"{named_by} has the name {str(name)[:_LONGEST]!r}, which would be a path: a name of a file or folder has "
            f"at most {_LONGEST} letters and no slash. Take the file from somebody whom you trust"
        )
    return folder / name


def check_shards(path: Path) -> None:
    """Refuse a folder of FSDP2 with objects of other classes than torch writes, whose reading could run any code.

    A folder whose shards would be read from outside of it is refused, too. Any other path passes.
    """
    for file in sorted(path.glob("*.metadata")) if path.is_dir() else ():  # one of all ranks, or one of each rank
        require_bounded(file)
        try:
            with file.open("rb") as opened:
                names = [stored.relative_path for stored in _MetadataReader(opened).load().storage_data.values()]
        except pickle.UnpicklingError as error:
            raise not_plain(file, error) from error
        except Exception as error:  # pickle raises many kinds of errors for a damaged file
            raise ValueError(f"{file} is damaged: take another checkpoint, or copy it again") from error
        for name in names:
            require_bounded(inside(path, name, file))


class _MetadataReader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _OF_METADATA.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")


def not_plain(path: Path, error: Exception, mend: str = _OF_FIT) -> ValueError:
    """Make the error for a file whose reading could run code. `mend` is what those do who trust the file."""
    named = re.search(r"GLOBAL (\S+)", str(error))
    what = named[1] if named else str(error).partition("\n")[0]
    return ValueError(
        f"{path} holds objects that are not plain values ({what}), and reading these could run any code: if you trust "
        f"who wrote it, {mend}"
    )
