"""Files and folders that appear whole or not at all: written beside their names, and renamed at the end.

A process that is killed leaves what it has written. It is removed when something else is written into the same folder.
"""

from __future__ import annotations

import ctypes
import glob
import itertools
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# Of Linux's renameat2: paths are relative to the working folder, and the two names change places
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def require_free(output: Path) -> None:
    """Raise ValueError if there is anything but an empty folder at this path."""
    if (free := first_free(output)) != output:
        raise ValueError(f"{output} exists already: give another folder, such as {free}, or remove it first")


def first_free(path: Path) -> Path:
    """The first of path, path-2, path-3 and so on at which there is nothing but an empty folder."""
    paths = itertools.chain([path], (path.with_name(f"{path.name}-{number}") for number in itertools.count(2)))
    return next(one for one in paths if not one.exists() or (one.is_dir() and not any(one.iterdir())))


def partial_beside(path: Path) -> Path:
    """A new name beside a path, under which it is written until it is whole. The name has the host and the process.

    Whatever dead processes of this host have left beside the path under such names is removed. Of a process on another
    host nobody knows here whether it lives.
    """
    host = socket.gethostname()
    for left in path.parent.glob(".*.partial"):
        written = re.fullmatch(rf"\..+\.{re.escape(host)}\.(\d{{1,9}})\.[0-9a-f]{{8}}\.partial", left.name)
        if written is not None and not _lives(int(written[1])):
            remove(left)
    return path.with_name(f".{path.name}.{host}.{os.getpid()}.{uuid.uuid4().hex[:8]}.partial")


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # signal 0 only asks
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's
        pass
    return True


def remove(path: Path) -> None:
    """Remove a file or a folder, as far as that is possible."""
    shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):  # it was a folder, or is not there
        path.unlink()


def put_in_place(partial: Path, path: Path) -> None:
    """Rename a whole folder to its name, and remove what was there.

    A kill leaves what was there under the name, or the new folder, or neither: then `bring_back` finds the former.
    """
    if not _exchange(partial, path):
        aside = _aside(path)
        with suppress(FileNotFoundError):  # the name is new
            path.rename(aside)
        try:
            partial.rename(path)
        except OSError:
            bring_back(path)
            raise
        with suppress(FileNotFoundError):
            aside.rename(partial)
    remove(partial)


def bring_back(path: Path) -> None:
    """Give a folder its name back if a process was killed when `put_in_place` had set it aside."""
    with suppress(OSError):  # it is not aside, or the new one has the name: a folder replaces only an empty one
        _aside(path).rename(path)


def clear(path: Path) -> None:
    """Remove what earlier writers of this folder have left beside it, on whatever host they were. None may live."""
    bring_back(path)
    for left in (_aside(path), *path.parent.glob(f".{glob.escape(path.name)}.*.partial")):
        remove(left)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _exchange(path: Path, other: Path) -> bool:
    """Let two names change places in one step. Return False, and do nothing, where the system can't: on NFS."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:  # not Linux
        return False
    return bool(rename(_AT_FDCWD, os.fsencode(path), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0)


@contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to `output` at the end. An error deletes it."""
    partial = partial_beside(output)
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
        remove(partial)
        for parent in new_parents:
            with suppress(OSError):  # not empty: somebody else uses it by now
                parent.rmdir()
        raise
