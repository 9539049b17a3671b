"""Plain values out of a file, held against the types that they have to be of."""

from __future__ import annotations

import math
import reprlib
from dataclasses import MISSING, fields, is_dataclass
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", dict: "keys and values"}
_LONGEST = 1000  # letters of a text
_LARGEST = 2**63 - 1  # of whole numbers


def read_as(kind: Any, value: Any, what: str) -> Any:
    """Return a value as a type, such as `dict[str, list[int]]` or a dataclass, whose fields are keys in the file.

    A list may stand for a tuple, and null for a float that is NaN. Raises ValueError if the value is of another type, a
    text has more than 1,000 letters, or a whole number more than 63 bits. The message names the place, from `what` on.
    """
    origin, arguments = get_origin(kind) or kind, get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, UnionType):
        if value is None and type(None) in arguments:
            return None
        (kind,) = (other for other in arguments if other is not type(None))
        return read_as(kind, value, what)
    if is_dataclass(origin):
        return _made(origin, value, what)
    if origin is float and value is None:
        return math.nan
    if origin is float and type(value) is int:
        value = float(value) if abs(value) <= _LARGEST else value
    if origin is tuple and isinstance(value, list):
        value = tuple(value)
    if not isinstance(value, origin) or (isinstance(value, bool) and origin is not bool):
        raise _wrong(value, _WORDS.get(origin, "a list" if origin in (list, tuple) else origin.__name__), what)
    if isinstance(value, str) and len(value) > _LONGEST:
        raise _wrong(value, f"text of at most {_LONGEST:,} letters", what)
    if origin is int and abs(value) > _LARGEST:
        raise _wrong(value, "a whole number of at most 63 bits", what)
    if origin is tuple and arguments and arguments[-1] is not ...:
        if len(value) != len(arguments):
            raise _wrong(value, f"a list of {len(arguments)}", what)
        return tuple(read_as(*entry, what) for entry in zip(arguments, value, strict=True))
    if origin in (list, tuple) and arguments:
        return origin(read_as(arguments[0], entry, what) for entry in value)
    if origin is dict and arguments:
        return {
            read_as(arguments[0], key, f"{what}: a key"): read_as(arguments[1], entry, _place(what, key))
            for key, entry in value.items()
        }
    return value


def _made(kind: Any, value: Any, what: str) -> Any:
    entries = read_as(dict[str, Any], value, what)
    hints = get_type_hints(kind)
    types = {field.name: hints[field.name] for field in fields(kind) if field.init}
    if unknown := entries.keys() - types.keys():
        raise ValueError(f"{what} has {min(unknown)[:_LONGEST]!r}, which is not known")
    needed = {field.name for field in fields(kind) if field.default is MISSING and field.default_factory is MISSING}
    if missing := needed - entries.keys():
        raise ValueError(f"{what} lacks {min(missing)}")
    return kind(**{name: read_as(types[name], entry, _place(what, name)) for name, entry in entries.items()})


def _place(what: str, key: Any) -> str:
    return f"{what}{'.' if ': ' in what else ': '}{str(key)[:60]}"


def _wrong(value: Any, wanted: str, what: str) -> ValueError:
    return ValueError(f"{what} is {reprlib.repr(value)}, not {wanted}")
