"""Devices that `plan` knows by name: their memory, as data sheets say it."""

from __future__ import annotations

from thanos_lightning.cli.mistakes import Mistake, did_you_mean

_GIGABYTES = {"a100": 80, "h100": 80, "h200": 141, "b200": 180, "l40s": 48, "mi300x": 192, "mi325x": 256}


def gigabytes_of(name: str) -> int:
    """The memory of a device, in GB.

    Raises:
        Mistake: If no device has this name.
    """
    if name.lower() not in _GIGABYTES:
        meant = did_you_mean(name.lower(), _GIGABYTES)
        raise Mistake(f"--device {name}: {meant}Known are {', '.join(_GIGABYTES)}; for another give --memory-gib")
    return _GIGABYTES[name.lower()]
