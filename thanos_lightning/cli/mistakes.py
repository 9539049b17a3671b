"""Turns a user's mistake into one line of text."""

from __future__ import annotations

import difflib
import errno
import os
import traceback
from argparse import ArgumentError
from collections.abc import Iterable

PROGRAM = "thanos-lightning"
DEBUG = "THANOS_LIGHTNING_DEBUG"
# Errors of the machine, and advice for each. Wherever they are raised, the code is not the cause.
_OF_THE_MACHINE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room for it, or give a folder on another disk"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "give a path that you may use"),
    errno.ENOTDIR: "give a path whose parents are folders",
    errno.EISDIR: "give a file",
    errno.ENOENT: "give a path that exists",
    errno.EEXIST: "give another path, or remove what is there",
}


class Mistake(Exception):  # noqa: N818  # the user's, not an error of ours
    """A user's mistake, whose text is the line to show."""


def did_you_mean(name: str, known: Iterable[str], *, before: str = "", after: str = "") -> str:
    """Ask whether the known name that is most alike was meant; empty if none is alike.

    The question ends with a space. `before` and `after` stand around the name in it.

    Examples:
        >>> did_you_mean("sparsty", ["pattern", "sparsity"])
        'did you mean sparsity? '
    """
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {before}{close[0]}{after}? " if close else ""


def users_mistake(error: BaseException) -> str | None:
    """Return the line to show for a user's mistake, or None if the error does not look like one.

    The search begins at the error and follows its chain of causes. The first mistake in it gives the line.
    """
    current: BaseException | None = error
    while current is not None:
        if _is_said_by_us(current):
            return " ".join(str(current).split())
        if isinstance(current, OSError) and current.errno in _OF_THE_MACHINE:
            where = "" if current.filename is None else f"{os.fspath(current.filename)}: "
            return f"{where}{os.strerror(current.errno).lower()}: {_OF_THE_MACHINE[current.errno]}"
        if type(current).__module__.startswith("pydantic"):  # which DeepSpeed checks its configuration with
            wrong = current.errors()[0]  # type: ignore[attr-defined]
            name = ".".join(map(str, wrong["loc"]))
            return f"{current.title}: {name} is {wrong['input']!r}: {wrong['msg']}"  # type: ignore[attr-defined]
        mark = getattr(current, "problem_mark", None)  # of a YAMLError
        if mark is not None and mark.buffer is not None:
            text = " ".join(mark.buffer.rstrip("\0").split())
            problem = str(getattr(current, "problem", current))
            return f"{text} is no YAML: {problem}; close each bracket and quote, and quote names that begin with *"
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return None


def _is_said_by_us(error: BaseException) -> bool:
    if isinstance(error, (Mistake, ArgumentError)) or _is_of_the_package(type(error).__module__):
        return True
    if type(error).__name__ == "MisconfigurationException":  # Lightning's, which need not be imported
        return True
    raised_in = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    kinds = (ValueError, FileNotFoundError, ImportError)
    return isinstance(error, kinds) and bool(raised_in) and _is_of_the_package(raised_in[-1])


def _is_of_the_package(module: str) -> bool:
    return module.partition(".")[0] == "thanos_lightning"
