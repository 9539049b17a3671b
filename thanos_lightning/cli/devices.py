"""Devices that `plan` knows by name: what their data sheets say."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from thanos_lightning.cli.mistakes import Mistake


@dataclass(frozen=True)
class Device:
    """A data sheet's memory in GB, and its 10¹² operations a second of dense matrix products in fp32 and in bf16.

    TF32 does not count, since the solver doesn't use it.
    """

    gigabytes: int
    exact: float
    half: float


_KNOWN = {
    "a100": Device(80, 19.5, 312),
    "h100": Device(80, 67, 989),
    "h200": Device(141, 67, 989),
    "b200": Device(180, 75, 2250),
    "l40s": Device(48, 91.6, 362),
    "mi300x": Device(192, 163.4, 1307),
    "mi325x": Device(256, 163.4, 1307),
}


def device_of(name: str) -> Device:
    """The device of a name.

    Raises:
        Mistake: If none has it.
    """
    if name.lower() not in _KNOWN:
        close = difflib.get_close_matches(name.lower(), _KNOWN, n=1)
        meant = f"did you mean {close[0]}? " if close else ""
        raise Mistake(
            f"--device {name}: {meant}Known are {', '.join(_KNOWN)}; for another give --memory-gib, and leave --device "
            "out: then times are those of the device that is here"
        )
    return _KNOWN[name.lower()]
