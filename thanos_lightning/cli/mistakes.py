"""A user's mistake as one line."""

from __future__ import annotations

import sys

PROGRAM = "thanos-lightning"
DEBUG = "THANOS_LIGHTNING_DEBUG"


def users_mistake(error: BaseException) -> BaseException | None:
    """The error to show in one line: one of ours or a misconfiguration, also where another one was raised from it."""
    kinds: tuple[type[BaseException], ...] = (ValueError, FileNotFoundError, ModuleNotFoundError)
    misconfiguration: tuple[type[BaseException], ...] = ()
    if "lightning" in sys.modules:
        from lightning.fabric.utilities.exceptions import MisconfigurationException

        misconfiguration = (MisconfigurationException,)
    current: BaseException | None = error
    while current is not None:
        if isinstance(current, misconfiguration) or (isinstance(current, kinds) and _is_raised_by_us(current)):
            return current
        current = current.__cause__ or current.__context__
    return None


def _is_raised_by_us(error: BaseException) -> bool:
    trace = error.__traceback__
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    module: str = trace.tb_frame.f_globals.get("__name__", "")
    return module.partition(".")[0] == "thanos_lightning"
