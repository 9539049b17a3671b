"""Shows how far a phase is and how long it still goes on, and lets SIGTERM end a phase at once.

In a terminal rich draws a bar, under a live display that exists already, such as Lightning's RichProgressBar. Elsewhere
it is a line of text, at most every 30 s, so that a log shows that work goes on. Of nested phases all are shown.
"""

from __future__ import annotations

import io
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from datetime import timedelta
from types import FrameType
from typing import Any, NoReturn, TextIO
from weakref import WeakSet

import rich
from lightning_utilities.core.rank_zero import rank_zero_only
from rich.cells import cell_len
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.progress_bar import ProgressBar
from rich.table import Column
from rich.text import Text
from tqdm import tqdm
from typing_extensions import override

TERMINATED = 128 + signal.SIGTERM  # exit status in a shell of a process that SIGTERM ended
_FIRST_LINE, _BETWEEN_LINES = 5.0, 30.0  # seconds
_REFRESH = 0.25
_BAR_WIDTH = 16

_hidden: ContextVar[bool] = ContextVar("hidden", default=False)


class Terminated(SystemExit):
    """SIGTERM came during a phase. The process unwinds and exits with status 143."""

    def __init__(self) -> None:
        super().__init__(TERMINATED)


class _Bar(BarColumn):
    """As long as the texts beside it allow."""

    @override
    def render(self, task: Task) -> ProgressBar:
        texts = (task.description, _how_far(task), task.fields["note"])
        self.bar_width = max(3, min(_BAR_WIDTH, rich.get_console().width - sum(map(cell_len, texts)) - len(texts)))
        return super().render(task)


class _HowFar(ProgressColumn):
    """What is done of a phase, in the words that a log has, too."""

    def render(self, task: Task) -> Text:
        return Text(_how_far(task))


def _how_far(task: Task) -> str:
    counted = f"{task.completed:.0f}" if task.total is None else f"{task.completed:.0f} of {task.total:.0f}"
    done = f"{counted} {task.fields['unit']}".rstrip() if task.completed or task.total is not None else "…"
    left = task.time_remaining
    return f"{done}, {_whole(left)} left" if left else f"{done} after {_whole(task.elapsed or 0.0)}"


def _whole(seconds: float) -> timedelta:
    return timedelta(seconds=int(seconds))


class Phase:
    """The progress of a phase. `total` is None if it is not known, and `unit` is a plural."""

    def __init__(self, description: str, total: int | None = None, unit: str = "", completed: int = 0) -> None:
        self.bar = Progress(
            TextColumn("{task.description}", markup=False),
            _Bar(),
            _HowFar(Column(no_wrap=True)),
            TextColumn("{task.fields[note]}", markup=False, table_column=Column(no_wrap=True, ratio=1)),
            expand=True,
            auto_refresh=False,  # a display within another is refreshed by nobody else
            transient=True,
            speed_estimate_period=math.inf,  # a unit may take minutes
        )
        self._begin = time.monotonic()
        self.bar.add_task(description, total=total, completed=completed, unit=unit, note="")

    @property
    def task(self) -> Task:
        """What is counted."""
        return self.bar.tasks[0]

    def become(self, description: str, total: float | None, unit: str) -> None:
        """Count something else from now on."""
        self.task.total = total  # for reset, None means what it was
        self.bar.reset(self.task.id, description=description, unit=unit, note="")

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """Count more units as done. `note` is further text; if it is None, the current note stays."""
        self.reach(int(self.task.completed) + count, note)

    def reach(self, completed: int, note: str | None = None) -> None:
        """Count so many units as done in all."""
        self.bar.update(self.task.id, completed=completed)
        if note is not None:
            self.bar.update(self.task.id, note=note)

    @property
    def seconds(self) -> float:
        """Seconds since the phase began."""
        return time.monotonic() - self._begin

    def line(self, *, ended: bool = False) -> str:
        """Format the phase as a line of a log."""
        task = self.task
        if not ended:
            note = f" ({task.fields['note']})" if task.fields["note"] else ""
            return f"{task.description}: {_how_far(task)}{note}"
        done = f"{task.completed:.0f} {task.fields['unit']}".rstrip() if task.completed else "done"
        return f"{task.description}: {done} in {_whole(self.seconds)}"


class _Display:
    """Shows the open phases of this process."""

    def __init__(self) -> None:
        self._phases: list[Phase] = []
        self._lock = threading.RLock()
        self._last_line = -_BETWEEN_LINES
        # A forked child must not inherit a lock that a thread holds, nor the open phases.
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(
                before=self._lock.acquire, after_in_parent=self._lock.release, after_in_child=self._leave_to_parent
            )

    @contextmanager
    def showing(self, phase: Phase) -> Iterator[None]:
        console, log, ends = rich.get_console(), sys.stderr, threading.Event()
        is_outermost = not self._phases
        with ExitStack() as around:
            if console.is_interactive:
                if is_outermost:
                    around.enter_context(tqdm.external_write_mode(nolock=True))
                    around.callback(setattr, console, "file", console._file)
                    console.file = console.file  # kept, because a phase may redirect stdout to silence a library
                around.enter_context(phase.bar)
            self._phases.append(phase)
            if is_outermost:
                threading.Thread(target=self._go_on, args=(ends, log), daemon=True, name="progress").start()
            has_ended = False
            try:
                yield
                has_ended = True
            finally:
                with self._lock:  # no line about an open phase comes after the line that says it has ended
                    if has_ended and not console.is_interactive and phase.seconds > _FIRST_LINE:
                        self._write(log, phase.line(ended=True))
                    phase.bar.update(phase.task.id, visible=False, refresh=True)  # a display around it goes on
                    self._phases.remove(phase)
                    if is_outermost:
                        ends.set()

    def _go_on(self, ends: threading.Event, log: TextIO) -> None:
        while not ends.wait(_REFRESH):
            with self._lock:
                if ends.is_set():
                    return
                if (bar := self._phases[-1].bar).live.is_started:
                    bar.refresh()
                elif self._phases[0].seconds > _FIRST_LINE and time.monotonic() - self._last_line >= _BETWEEN_LINES:
                    self._write(log, "; ".join(phase.line() for phase in self._phases))

    def _write(self, log: TextIO, line: str) -> None:
        self._last_line = time.monotonic()
        with suppress(OSError, ValueError):  # a log that is gone must not end the work
            log.write(f"{line}\n")
            log.flush()

    def _leave_to_parent(self) -> None:
        self._phases.clear()
        self._lock = threading.RLock()


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
    is_silent = _hidden.get() or getattr(rank_zero_only, "rank", None)
    with nullcontext() if is_silent else _display.showing(phase):
        yield phase


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
        >>> phase.task.finished
        True
    """
    phase = Phase(description, total, unit)
    with ends_on_sigterm(), shown(phase), _adopted_bars(phase) if adopts_bars else nullcontext():
        yield phase


@contextmanager
def _adopted_bars(phase: Phase) -> Iterator[None]:
    display, bars = tqdm.display, WeakSet[tqdm]()
    first = (phase.task.description, phase.task.total, phase.task.fields["unit"])

    def tell(bar: tqdm, *args: Any, **kwargs: Any) -> bool:  # replaces tqdm.display, as tqdm allows
        bar.fp = io.StringIO()  # swallows the line break at the end of the bar
        if bar.total is not None or bar.desc:
            scale, unit = (10**6, "MB") if bar.unit == "B" else (1, "" if bar.unit == "it" else bar.unit.strip())
            if bar not in bars:
                bars.add(bar)
                description = (bar.desc or phase.task.description).rstrip(": .…")
                total = int(bar.total / scale) if bar.total else None  # datasets writes 0 for what it doesn't know
                phase.become(description, total, unit)
            phase.reach(int(bar.n / scale))
        return True

    tqdm.display = tell
    try:
        yield
    finally:
        tqdm.display = display
        phase.become(*first)


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
