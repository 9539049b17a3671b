"""Waits for what another thread or process says, however long a busy machine takes."""

from __future__ import annotations

import time
from collections.abc import Callable


def until(text: str, read: Callable[[], str]) -> str:
    """Read until `text` has been said, for two minutes at most. Return all that was said."""
    end, said = time.monotonic() + 120, read()
    while text not in said and time.monotonic() < end:
        time.sleep(0.01)
        said += read()
    assert text in said
    return said
