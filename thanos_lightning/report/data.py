"""What happened to which layer, and to the training around it, as data that a checkpoint and a file keep."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from thanos_lightning.report.stopwatch import finish

_CPU = torch.device("cpu")
Part = Literal["calibrating", "scanning", "solving", "writing"]


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


def mean_loss(layers: Sequence[LayerReport]) -> float:
    """Of the relative losses that are known; NaN where none is."""
    known = [layer.relative_loss for layer in layers if math.isfinite(layer.relative_loss)]
    return sum(known) / len(known) if known else math.nan


@dataclass
class EventReport:
    """One event.

    Attributes:
        step: Optimizer step that the schedule gives the event.
        target: Sparsity that the event asked of the callback's main pattern.
        layers: What was pruned, in order.
        calibrating_seconds: What running a calibration set took, or counting training batches before the event.
        scanning_seconds: What finding out what each layer would lose took; 0 where nobody asked.
        solving_seconds: From the first layer's solve to the last one's, on rank 0.
        writing_seconds: What else the event took: writing the weights and masks back, and telling ranks.
    """

    step: int
    target: float
    layers: list[LayerReport] = field(default_factory=list)
    calibrating_seconds: float = 0.0
    scanning_seconds: float = 0.0
    solving_seconds: float = 0.0
    writing_seconds: float = 0.0

    @property
    def sparsity(self) -> float:
        """Fraction of all entries of the event's layers that is pruned."""
        sizes = [math.prod(layer.shape) for layer in self.layers]
        return sum(layer.sparsity * size for layer, size in zip(self.layers, sizes, strict=True)) / sum(sizes)

    @property
    def relative_loss(self) -> float:
        """Mean over the layers of which it is known."""
        return mean_loss(self.layers)

    @property
    def seconds(self) -> float:
        """All that the event took."""
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[Part, float]:
        """What each part of the event took, in seconds."""
        return {part: getattr(self, f"{part}_seconds") for part in get_args(Part)}

    def add(self, parts: dict[Part, float]) -> None:
        """Count more time for parts of the event."""
        for part, seconds in parts.items():
            setattr(self, f"{part}_seconds", self.parts[part] + seconds)


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
        target_weights: Weights of the layers to prune.
        model_weights: All weights of the model; one that several modules share counts once.
    """

    metric: str | None = None
    dense: float | None = None
    pruned: float | None = None
    recovered: float | None = None
    training_seconds: float = 0.0
    event_seconds: float = 0.0
    collecting_seconds: float = 0.0
    target_weights: int = 0
    model_weights: int = 0


@dataclass
class History:
    """How the training went.

    Attributes:
        losses: (optimizer step, loss of the training): each the mean over the steps since the one before.
        metrics: (optimizer step, monitored metric), in the order in which they were measured: two of one step are
            from before and after an event.
        every: Optimizer steps from one loss to the next.
    """

    losses: list[tuple[int, float]] = field(default_factory=list)
    metrics: list[tuple[int, float]] = field(default_factory=list)
    every: int = 1


class Clock:
    """Tells a summary how long the training and its events take, and keeps what each part of an event takes.

    Args:
        summary: Is told.
        device: Where the work is done, which each part of an event waits for.

    Examples:
        >>> summary = Summary()
        >>> clock = Clock(summary)
        >>> with clock.event():
        ...     clock.now("solving")
        ...     time.sleep(0.01)
        >>> clock.tick()
        >>> 0.01 <= summary.event_seconds <= summary.training_seconds
        True
        >>> round(sum(clock.parts.values()), 6) == round(summary.event_seconds, 6)
        True
    """

    def __init__(self, summary: Summary | None = None, device: torch.device = _CPU) -> None:
        self._summary = summary or Summary()
        self._device = device
        self._since: float | None = time.perf_counter()
        self._part: Part = "writing"
        self._part_since = 0.0
        self.parts: dict[Part, float] = {}  # since they were taken

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
        """Count the block as part of an event: as writing, until `now` says something else."""
        finish(self._device)
        self._part, self._part_since = "writing", time.perf_counter()
        yield
        self.now("writing")

    def now(self, part: Part) -> None:
        """Count what comes as this part of the event that is going on."""
        finish(self._device)
        time_now = time.perf_counter()
        self.add(self._part, time_now - self._part_since)
        self._summary.event_seconds += time_now - self._part_since
        self._part, self._part_since = part, time_now

    def add(self, part: Part, seconds: float) -> None:
        """Count time for a part that it took outside of the event."""
        self.parts[part] = self.parts.get(part, 0.0) + seconds

    def take(self) -> dict[Part, float]:
        """What each part has taken since this was called last."""
        taken, self.parts = self.parts, {}
        return taken


def _finite(value: Any) -> Any:
    """NaN and infinities are no JSON."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass
class PruningReport:
    """All events of a training, what they did to the monitored metric, and how the training went.

    Examples:
        >>> report = PruningReport(events=[EventReport(step=10, target=0.5)])
        >>> PruningReport.from_state(report.state()) == report
        True
    """

    events: list[EventReport] = field(default_factory=list)
    summary: Summary = field(default_factory=Summary)
    history: History = field(default_factory=History)

    def state(self) -> dict[str, Any]:
        """The report as plain values."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> PruningReport:
        """Read what `state` returned, or what is in the file that `write` wrote."""

        def layer(entry: dict[str, Any]) -> LayerReport:
            losses = {name: math.nan if entry[name] is None else entry[name] for name in ("loss", "relative_loss")}
            return LayerReport(**{**entry, **losses, "shape": tuple(entry["shape"])})

        def points(entries: list[Any]) -> list[tuple[int, float]]:
            return [(step, math.nan if value is None else value) for step, value in entries]

        events = [
            EventReport(**{**event, "layers": [layer(entry) for entry in event["layers"]]}) for event in state["events"]
        ]
        past = state["history"]
        history = History(points(past["losses"]), points(past["metrics"]), past["every"])
        return cls(events, Summary(**state["summary"]), history)

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
