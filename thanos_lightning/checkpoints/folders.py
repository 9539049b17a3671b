"""Folders that appear whole or not at all."""

from __future__ import annotations

import itertools
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def require_free(output: Path) -> None:
    """Raise ValueError if there is anything but an empty folder at this path."""
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists():
        raise ValueError(f"{output} exists already: give another folder, or remove it first")


def new_folder(parent: Path, name: str) -> Path:
    """Make a folder of this name. If the name is taken, append the first free number.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     [new_folder(Path(parent), "teacher").name for _ in range(3)]
        ['teacher', 'teacher-1', 'teacher-2']
    """
    for number in itertools.count():
        folder = parent / (f"{name}-{number}" if number else name)
        with suppress(FileExistsError):
            folder.mkdir(parents=True)
            break
    return folder


@contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to `output` at the end. An error deletes it."""
    partial = output.with_name(f".{output.name}.{uuid.uuid4().hex[:8]}.partial")
    new_parents = [parent for parent in output.parents if not parent.exists()]
    try:
        try:
            partial.mkdir(parents=True)
        except OSError as error:
            error.filename = str(output)  # the path that the user gave
            raise
        yield partial
        for file in partial.rglob("*"):  # some writers let only the owner read
            if file.is_file():
                file.chmod(partial.stat().st_mode & 0o666)
        if output.exists():  # an empty folder: not every system lets a rename replace it
            output.rmdir()
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in new_parents:
            with suppress(OSError):  # not empty: somebody else uses it by now
                parent.rmdir()
        raise
