"""What happened to which layer, as data, as tables and as a plot."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table


@dataclass(frozen=True)
class LayerReport:
    """One layer in one event.

    Attributes:
        name: Fully qualified module name.
        shape: (out_features, in_features).
        pattern: "2:4", "unstructured" or "structured".
        sparsity: Fraction of the entries that are pruned after the event.
        loss: ½·tr(ΔW H ΔWᵀ); NaN where no statistics were needed.
        relative_loss: That over the same of the weight itself.
        seconds: What the solve took.
    """

    name: str
    shape: tuple[int, int]
    pattern: str
    sparsity: float
    loss: float
    relative_loss: float
    seconds: float


@dataclass
class EventReport:
    """One event.

    Attributes:
        step: Optimizer step that the schedule gives the event.
        target: Sparsity that the event asked of the callback's main pattern.
        layers: What was pruned, in order.
    """

    step: int
    target: float
    layers: list[LayerReport] = field(default_factory=list)

    @property
    def sparsity(self) -> float:
        """Fraction of all entries of the event's layers that is pruned."""
        sizes = [math.prod(layer.shape) for layer in self.layers]
        return sum(layer.sparsity * size for layer, size in zip(self.layers, sizes, strict=True)) / sum(sizes)

    @property
    def relative_loss(self) -> float:
        """Mean over the layers."""
        return sum(layer.relative_loss for layer in self.layers) / len(self.layers)

    @property
    def seconds(self) -> float:
        """Time of all solves together."""
        return sum(layer.seconds for layer in self.layers)


@dataclass
class Summary:
    """The monitored metric before the first event, after the last one, and at the end of the training.

    Attributes:
        metric: Name of the metric, or None where none is monitored.
        dense: Before the first event.
        pruned: After the last event.
        recovered: At the end.
        training_seconds: From the first batch on, without validation.
        event_seconds: Of that, what events took, and looking at layers before them.
        collecting_seconds: Of that, what counting the inputs of layers, and gradients at their outputs, took between
            events, on the CPU.
    """

    metric: str | None = None
    dense: float | None = None
    pruned: float | None = None
    recovered: float | None = None
    training_seconds: float = 0.0
    event_seconds: float = 0.0
    collecting_seconds: float = 0.0


class Clock:
    """Tells a summary how long the training and its events take.

    Example:
        >>> summary = Summary()
        >>> clock = Clock(summary)
        >>> with clock.event():
        ...     time.sleep(0.01)
        >>> clock.tick()
        >>> 0.01 <= summary.event_seconds <= summary.training_seconds
        True
    """

    def __init__(self, summary: Summary | None = None) -> None:
        self._summary = summary or Summary()
        self._since: float | None = time.perf_counter()

    def tick(self) -> None:
        """Count the time that has passed, unless the clock is paused."""
        if self._since is not None:
            now = time.perf_counter()
            self._summary.training_seconds += now - self._since
            self._since = now

    def pause(self) -> None:
        """What comes now is no training."""
        self.tick()
        self._since = None

    def go_on(self) -> None:
        """The training goes on."""
        self._since = time.perf_counter()

    @contextmanager
    def event(self) -> Iterator[None]:
        """Count the block as part of an event."""
        begin = time.perf_counter()
        yield
        self._summary.event_seconds += time.perf_counter() - begin


def _finite(value: Any) -> Any:
    """NaN and infinities are no JSON."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass
class PruningReport:
    """All events of a training, and what they did to the monitored metric.

    Example:
        >>> report = PruningReport(events=[EventReport(step=10, target=0.5)])
        >>> PruningReport.from_state(report.state()) == report
        True
    """

    events: list[EventReport] = field(default_factory=list)
    summary: Summary = field(default_factory=Summary)

    def state(self) -> dict[str, Any]:
        """The report as plain values."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> PruningReport:
        """Read what `state` returned, or what is in the file that `write` wrote."""

        def layer(entry: dict[str, Any]) -> LayerReport:
            losses = {name: math.nan if entry[name] is None else entry[name] for name in ("loss", "relative_loss")}
            return LayerReport(**{**entry, **losses, "shape": tuple(entry["shape"])})

        events = [
            EventReport(event["step"], event["target"], [layer(entry) for entry in event["layers"]])
            for event in state["events"]
        ]
        return cls(events, Summary(**state["summary"]))

    @classmethod
    def read(cls, path: Path) -> PruningReport:
        """Read the file that `write` wrote.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If it is something else.
        """
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: give the pruning_report.json of a training")
        try:
            return cls.from_state(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is no pruning report ({error}): give the pruning_report.json of a training"
            ) from error

    def write(self, path: Path) -> None:
        """Write the report as JSON; numbers that JSON can't hold become null. Never leaves half a file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        part.write_text(json.dumps(_finite(self.state()), indent=1) + "\n", encoding="utf-8")
        os.replace(part, path)


def print_event(event: EventReport, console: Console | None = None) -> None:
    """One table after an event: a row per kind of layer, since a model has hundreds of alike ones."""
    table = Table(
        title=f"Pruned at optimizer step {event.step} to {event.target:.1%} (asked)",
        title_justify="left",
        box=SIMPLE_HEAD,  # eight columns in the 80 of a plain terminal
    )
    table.add_column("layers", no_wrap=True)
    for column in ("n", "shape", "pattern", "zeros", "rel. loss", "worst", "time"):
        table.add_column(column, justify="right", no_wrap=True)
    kinds: dict[tuple[str, tuple[int, int], str], list[LayerReport]] = {}
    for layer in event.layers:
        kinds.setdefault((layer.name.rsplit(".", 1)[-1], layer.shape, layer.pattern), []).append(layer)
    for (kind, shape, pattern), layers in kinds.items():
        table.add_row(
            kind,
            str(len(layers)),
            f"{shape[0]}×{shape[1]}",
            pattern,
            f"{sum(layer.sparsity for layer in layers) / len(layers):.2%}",
            f"{sum(layer.relative_loss for layer in layers) / len(layers):.4f}",
            f"{max(layer.relative_loss for layer in layers):.4f}",
            f"{sum(layer.seconds for layer in layers):.1f} s",
        )
    table.add_section()
    table.add_row(
        "all", str(len(event.layers)), "", "", f"{event.sparsity:.2%}", f"{event.relative_loss:.4f}", "",
        f"{event.seconds:.1f} s",
    )  # fmt: skip
    (console or Console()).print(table)


def print_summary(report: PruningReport, sparsity: float, console: Console | None = None) -> None:
    """The last table: dense, pruned, recovered."""
    summary = report.summary
    table = Table(
        title=f"Pruned to {sparsity:.2%} in {len(report.events)} event(s)", title_justify="left", box=SIMPLE_HEAD
    )
    table.add_column("" if summary.metric is None else summary.metric)
    table.add_column("value", justify="right")
    for label, value in (
        ("dense, before the first event", summary.dense),
        ("pruned, after the last event", summary.pruned),
        ("recovered, at the end", summary.recovered),
    ):
        table.add_row(label, "not measured" if value is None else f"{value:.4g}")
    console = console or Console()
    console.print(table)
    pruning = summary.event_seconds + summary.collecting_seconds
    if summary.training_seconds:
        console.print(
            f"Pruning took {pruning / summary.training_seconds:.1%} of {summary.training_seconds:.1f} s of training: "
            f"events {summary.event_seconds:.1f} s, counting before them {summary.collecting_seconds:.1f} s"
        )


class OnSolved(Protocol):
    """Called with a layer's name and relative loss."""

    def __call__(self, name: str, loss: float) -> None:
        """Advance by one layer."""
        ...


@contextmanager
def event_progress(step: int, total: int, *, enabled: bool, console: Console | None = None) -> Iterator[OnSolved]:
    """A progress bar over the layers of an event: layer, loss, time left.

    Args:
        step: Optimizer step of the event, for the label.
        total: Number of layers that this process solves.
        enabled: Whether anything is shown; nothing is where the console is no terminal.
        console: Where to show it.
    """
    console = console or Console()
    progress = Progress(
        TextColumn("Pruning at step {task.fields[step]}"),
        BarColumn(bar_width=8),  # the name of a layer has to fit beside it into 80 columns
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
        console=console,
        transient=True,
        disable=not (enabled and console.is_terminal),
    )
    with progress:
        task = progress.add_task("", total=total, step=step)

        def on_solved(name: str, loss: float) -> None:
            short = ".".join(name.split(".")[-4:])
            progress.update(task, advance=1, description=f"{short} {loss:.4f}")

        yield on_solved


def plot_report(report: PruningReport, path: Path) -> None:
    """Draw the sparsity over optimizer steps and each layer's relative loss, as a picture.

    Args:
        report: With at least one event.
        path: The picture; its ending chooses the format.

    Raises:
        ModuleNotFoundError: Where matplotlib isn't installed.
        ValueError: If the report has no event.
    """
    if not report.events:
        raise ValueError("the report has no event: nothing to plot")
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("plots need matplotlib: pip install 'thanos-lightning[plots]'") from error
    figure = Figure(figsize=(10, 4), layout="constrained")
    over_time, over_layers = figure.subplots(1, 2)
    steps = [event.step for event in report.events]
    over_time.step([0, *steps], [0.0, *(event.sparsity for event in report.events)], where="post", marker="o")
    over_time.set(xlabel="optimizer step", ylabel="sparsity of the pruned layers", ylim=(0, 1))
    for event in report.events:
        losses = [layer.relative_loss for layer in event.layers]
        over_layers.plot(losses, marker=".", linestyle="none", label=f"step {event.step}")
    over_layers.set(xlabel="layer, front to back", ylabel="relative loss", yscale="log")
    over_layers.legend()
    figure.savefig(path)
