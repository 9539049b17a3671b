"""Devices that `plan` knows by name: their memory, as data sheets say it."""

from __future__ import annotations

import difflib

from thanos_lightning.cli.mistakes import Mistake

_GIGABYTES = {"a100": 80, "h100": 80, "h200": 141, "b200": 180, "l40s": 48, "mi300x": 192, "mi325x": 256}


def gigabytes_of(name: str) -> int:
    """The memory of a device, in GB.

    Raises:
        Mistake: If no device has this name.
    """
    if name.lower() not in _GIGABYTES:
        close = difflib.get_close_matches(name.lower(), _GIGABYTES, n=1)
        meant = f"did you mean {close[0]}? " if close else ""
        raise Mistake(f"--device {name}: {meant}Known are {', '.join(_GIGABYTES)}; for another give --memory-gib")
    return _GIGABYTES[name.lower()]
