"""Measures the time of work that a device does while the host goes on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Stopwatch:
    """Adds up the time of blocks. A device with events of its own measures by them, so the host does not wait."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._running: list[tuple[Any, Any]] = []  # events of the device, before and after each block

    @contextmanager
    def running(self, device: torch.device) -> Iterator[None]:
        """Measure the block, whose work is done on this device."""
        events = None if device.type == "cpu" else getattr(torch.get_device_module(device), "Event", None)
        if events is None:
            begin = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - begin
            return
        before, after = events(enable_timing=True), events(enable_timing=True)
        before.record()
        yield
        after.record()
        self._running.append((before, after))

    def seconds(self) -> float:
        """Return the measured time. Waits for the last block."""
        if self._running:
            self._running[-1][1].synchronize()
            self._seconds += sum(before.elapsed_time(after) for before, after in self._running) / 1000  # milliseconds
            self._running.clear()
        return self._seconds


def finish(device: torch.device) -> None:
    """Wait until the device has done its queued work."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()
