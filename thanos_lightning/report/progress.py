"""Shows the progress and the remaining time of a phase in one line, and lets SIGTERM end a phase at once.

In a terminal the line is a progress bar. Elsewhere it is text, at most every 30 s, so that a log shows that work goes
on. The innermost of nested phases is shown. rich draws the bar together with a live display that exists already, such
as Lightning's RichProgressBar. The bars of tqdm are cleared while this bar is shown.
"""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from types import FrameType
from typing import Any, NoReturn
from weakref import WeakSet

import rich
from lightning_utilities.core.rank_zero import rank_zero_only
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text
from tqdm import tqdm

TERMINATED = 128 + signal.SIGTERM  # exit status in a shell of a process that SIGTERM ended
_FIRST_LINE, _BETWEEN_LINES = 5.0, 30.0  # seconds
_REFRESH = 0.25
_LONGEST_BAR = 24

_hidden: ContextVar[bool] = ContextVar("hidden", default=False)


class Terminated(SystemExit):
    """SIGTERM came during a phase. The process unwinds and exits with status 143."""

    def __init__(self) -> None:
        super().__init__(TERMINATED)


def duration(seconds: float) -> str:
    """Format seconds as minutes and seconds, with hours if there are any.

    Examples:
        >>> duration(9.7), duration(130), duration(7321)
        ('0:09', '2:10', '2:02:01')
    """
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Phase:
    """The progress of a phase. `total` is None if it is not known. `note` is further text, cut if the line is full."""

    def __init__(self, description: str, total: int | None = None, unit: str = "", completed: int = 0) -> None:
        self._first = (description, total, unit)
        self.note = ""
        self._begin = time.monotonic()
        self.become(description, total, unit, completed)

    def become(self, description: str, total: int | None, unit: str, completed: int = 0) -> None:
        """Count something else from now on."""
        self.description, self.total, self.unit = description, total, unit
        self._completed = self._completed_before = completed
        self._counts_since = self._advanced_at = time.monotonic()

    def reset(self) -> None:
        """Return to the initial description, total and unit, with nothing done."""
        self.become(*self._first)

    def wait(self, seconds: float) -> None:
        """Leave time that was spent on something else out of the estimate."""
        self._counts_since += seconds
        self._advanced_at += seconds

    @property
    def completed(self) -> int:
        """Number of units that are done."""
        return self._completed

    @completed.setter
    def completed(self, number: int) -> None:
        if number != self._completed:
            self._completed, self._advanced_at = number, time.monotonic()

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """Count more units as done. If `note` is None, the current note stays."""
        self.completed += count
        if note is not None:
            self.note = note

    @property
    def seconds(self) -> float:
        """Seconds since the phase began."""
        return time.monotonic() - self._begin

    @property
    def seconds_left(self) -> float | None:
        """Estimate from the mean time per unit; None if nothing is done or the total is not known."""
        done = self.completed - self._completed_before
        if self.total is None or done <= 0:
            return None
        each = (self._advanced_at - self._counts_since) / done
        to_do = self.total - self.completed
        # The estimate falls while a unit is in progress, but not below the time that the later units need.
        return each * to_do - min(each, time.monotonic() - self._advanced_at) if to_do > 0 else 0.0

    def line(self, *, ended: bool = False) -> str:
        """Format the phase as a line of a log."""
        counted = f"{self.completed}" if self.total is None or ended else f"{self.completed} of {self.total}"
        counted = f": {counted} {self.unit}".rstrip() if self.completed or self.total is not None else ""
        if ended:
            return f"{self.description}{counted or ': done'} in {duration(self.seconds)}"
        left = self.seconds_left
        ahead = "" if left is None else f", about {duration(left)} left"
        note = f" ({self.note})" if self.note else ""
        return f"{self.description}{counted or ' …'} after {duration(self.seconds)}{ahead}{note}"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        left = self.seconds_left
        count = f" {self.completed}/{self.total}" if self.total is not None else f" {self.completed or ''}".rstrip()
        after = f"{count} {self.unit}".rstrip()
        after += f"  {duration(self.seconds)}" if left is None else f"  {duration(left)} left"
        text = Text(self.description, no_wrap=True, overflow="ellipsis", end="")
        room = options.max_width - len(self.description) - len(after) - 1
        if self.total is not None and room >= 8:
            width = min(_LONGEST_BAR, room - min(len(self.note) + 2, room // 2) if self.note else room)
            filled = min(width, round(width * self.completed / max(1, self.total)))
            text.append(" ").append("━" * filled, style="bold cyan").append("─" * (width - filled), style="dim")
        text.append(after)
        if self.note:
            text.append(f"  {self.note}", style="dim")
        text.truncate(options.max_width, overflow="ellipsis")
        yield text


class _Display:
    """Shows the innermost open phase of this process."""

    def __init__(self) -> None:
        self._phases: list[Phase] = []
        self._lock = threading.RLock()
        self._live: Live | None = None
        self._log = sys.stderr
        self._around = ExitStack()
        self._ends = threading.Event()
        self._last_line = -_BETWEEN_LINES
        # A forked child must not inherit a lock that a thread holds, nor the open phases.
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(
                before=self._lock.acquire, after_in_parent=self._lock.release, after_in_child=self._leave_to_parent
            )

    def open(self, phase: Phase) -> None:
        with self._lock:
            self._phases.append(phase)
            if len(self._phases) > 1:
                return
            self._log = sys.stderr  # kept, because a phase may redirect stderr to silence a library
            console = rich.get_console()
            if console.is_terminal and not console.is_dumb_terminal and not console.is_jupyter:
                self._around.enter_context(tqdm.external_write_mode(nolock=True))
                live = Live(console=console, get_renderable=self._shown, auto_refresh=False, transient=True)
                self._around.callback(setattr, console, "file", console._file)
                console.file = console.file
                direct = sys.stderr
                live.start(refresh=True)
                self._live = live
                self._around.callback(_set_streams, sys.stderr, direct)
                _set_streams(direct, sys.stderr)
            self._ends = threading.Event()
            threading.Thread(target=self._go_on, args=(self._ends,), daemon=True, name="progress").start()

    def close(self, phase: Phase, *, completed: bool) -> None:
        with self._lock:
            self._phases.remove(phase)
            for other in self._phases:
                other.wait(phase.seconds)
            if completed and self._live is None and phase.seconds > _FIRST_LINE:
                self._write(phase.line(ended=True))
            if not self._phases:
                self._ends.set()
                live, self._live = self._live, None
                if live is not None:
                    live.stop()
                self._around.close()

    def _go_on(self, ends: threading.Event) -> None:
        while not ends.wait(_REFRESH):
            with self._lock:
                if ends.is_set() or not self._phases:
                    continue
                if self._live is not None:
                    self._live.refresh()
                elif self._is_due(self._phases[-1]):
                    self._write(self._phases[-1].line())

    def _is_due(self, phase: Phase) -> bool:
        return phase.seconds > _FIRST_LINE and time.monotonic() - self._last_line >= _BETWEEN_LINES

    def _write(self, line: str) -> None:
        self._last_line = time.monotonic()
        with suppress(OSError, ValueError):  # a log that is gone must not end the work
            self._log.write(f"{line}\n")
            self._log.flush()

    def _shown(self) -> Phase | str:
        return self._phases[-1] if self._phases else ""

    def _leave_to_parent(self) -> None:
        self._phases.clear()
        self._lock = threading.RLock()


def _set_streams(before: Any, now: Any) -> None:
    """Move log handlers to another stream. A live display replaces sys.stderr, but handlers have kept the old one."""
    for logger in [logging.root, *logging.root.manager.loggerDict.values()]:
        for handler in getattr(logger, "handlers", ()):  # placeholders have none
            if isinstance(handler, logging.StreamHandler) and handler.stream is before:
                handler.setStream(now)


_display = _Display()


@contextmanager
def hidden(is_hidden: bool = True) -> Iterator[None]:
    """Hide all phases inside the block. If `is_hidden` is False, nothing changes."""
    token = _hidden.set(is_hidden or _hidden.get())
    try:
        yield
    finally:
        _hidden.reset(token)


@contextmanager
def shown(phase: Phase) -> Iterator[Phase]:
    """Show a phase on the first rank while the block runs. Unlike `open_phase`, this leaves SIGTERM alone."""
    if _hidden.get() or getattr(rank_zero_only, "rank", None):
        yield phase
        return
    _display.open(phase)
    completed = False
    try:
        yield phase
        completed = True
    finally:
        _display.close(phase, completed=completed)


@contextmanager
def open_phase(
    description: str, total: int | None = None, unit: str = "", *, adopts_bars: bool = False
) -> Iterator[Phase]:
    """Show a long phase on the first rank, and let SIGTERM end it at once on every rank by raising `Terminated`.

    `total` is None if it is not known, and `unit` is a plural. With `adopts_bars` the phase shows the progress of tqdm
    bars that libraries would draw in the block.

    Examples:
        >>> with open_phase("Counting", total=3, unit="sheep") as phase:
        ...     for _ in range(3):
        ...         phase.advance()
        >>> phase.completed
        3
    """
    with ends_on_sigterm(), shown(Phase(description, total, unit)) as phase:
        if not adopts_bars:
            yield phase
            return
        with _adopted_bars(phase):
            yield phase


@contextmanager
def _adopted_bars(phase: Phase) -> Iterator[None]:
    display, bars = tqdm.display, WeakSet[tqdm]()

    def tell(bar: tqdm, *args: Any, **kwargs: Any) -> bool:  # replaces tqdm.display, as tqdm allows
        bar.fp = io.StringIO()  # swallows the line break at the end of the bar
        if bar.total is not None or bar.desc:
            scale, unit = (10**6, "MB") if bar.unit == "B" else (1, "" if bar.unit == "it" else bar.unit.strip())
            if bar not in bars:
                bars.add(bar)
                description = (bar.desc or phase.description).rstrip(": .…")
                total = int(bar.total / scale) if bar.total else None  # datasets writes 0 for what it doesn't know
                phase.become(description, total, unit)
            phase.completed = int(bar.n / scale)
        return True

    tqdm.display = tell
    try:
        yield
    finally:
        tqdm.display = display
        phase.reset()


@contextmanager
def ends_on_sigterm() -> Iterator[None]:
    """Let SIGTERM raise `Terminated` in the block at once, even if a Trainer's handler would wait for a batch's end.

    Threads other than the main one get no signals, so nothing changes in them.
    """
    before = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread() or before in (_end, signal.SIG_IGN, None):
        yield
        return
    signal.signal(signal.SIGTERM, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(signum: int, frame: FrameType | None) -> NoReturn:
    raise Terminated
