"""The report of a training and of each pruned layer, as data that a checkpoint and a file keep."""

from __future__ import annotations

import json
import math
import os
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from thanos_lightning.report.plain import read_as
from thanos_lightning.report.stopwatch import finish

_CPU = torch.device("cpu")
MOST_LOSSES = 400  # of a history; even, so that all losses form pairs
Part = Literal["calibrating", "scanning", "solving", "reconstructing", "writing"]


@dataclass(frozen=True)
class LayerReport:
    """The result of pruning one layer, or dropping experts of one mixture, in one event."""

    name: str  # fully qualified, of the module
    shape: tuple[int, int]  # (out_features, in_features); of a mixture its number of experts, and of weights in each
    pattern: str  # "2:4", "unstructured", "structured", "channels" or "experts"
    sparsity: float  # fraction of the entries that are pruned after the event
    # ½·tr(ΔW H ΔWᵀ); NaN where no statistics were needed. For a mixture: the sum of ‖share · output‖² over (token,
    # dropped expert) pairs, divided by the number of all (token, expert) pairs
    loss: float
    relative_loss: float  # `loss` over ½·tr(W H Wᵀ), the loss of removing the whole weight, or all experts
    seconds: float  # of the solve
    # How many tokens its inputs were counted on, on all ranks; None where no statistics were needed. An expert that
    # fewer than four tokens for each input have reached was solved on the mean of its layer's experts, too. Of a
    # mixture all tokens that its experts got, each as often as there were experts that got it
    tokens: int | None = None


@dataclass(frozen=True)
class BlockReport:
    """The result of training a block, such as a decoder layer, to give what it gave before an event."""

    name: str  # fully qualified, of the module
    # Mean over tokens of ‖Y' - Y‖² / ‖Y‖², of the outputs Y' with the weights that the solver gave, on the inputs that
    # the block got before the event, when it gave Y
    error_solved: float
    error: float  # the same after the training
    seconds: float  # of the training


def mean_loss(layers: Sequence[LayerReport]) -> float:
    """Mean of the known relative losses; NaN if none is known."""
    known = [layer.relative_loss for layer in layers if math.isfinite(layer.relative_loss)]
    return sum(known) / len(known) if known else math.nan


@dataclass
class EventReport:
    """The report of one pruning event."""

    step: int  # optimizer step at which the schedule puts the event
    target: float  # sparsity that the event asked of the callback's main pattern
    layers: list[LayerReport] = field(default_factory=list)  # of those that were pruned, in order
    calibrating_seconds: float = 0.0  # to run a calibration set, or to collect statistics of training batches before it
    scanning_seconds: float = 0.0  # to measure what each layer would lose; 0 if there was no such scan
    solving_seconds: float = 0.0  # from the first layer's solve to the last one's, on rank 0
    reconstructing_seconds: float = 0.0  # to train blocks after that
    writing_seconds: float = 0.0  # the rest of the event: writing weights and masks back, and informing the ranks
    blocks: list[BlockReport] = field(default_factory=list)  # of those that were trained after the solves

    @property
    def sparsity(self) -> float:
        """Fraction of all entries of the event's layers that is pruned."""
        sizes = [math.prod(layer.shape) for layer in self.layers]
        return sum(layer.sparsity * size for layer, size in zip(self.layers, sizes, strict=True)) / sum(sizes)

    @property
    def relative_loss(self) -> float:
        """Mean relative loss of the layers with a known loss."""
        return mean_loss(self.layers)

    @property
    def seconds(self) -> float:
        """Total time of the event."""
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[Part, float]:
        """Seconds that each part of the event took."""
        return {part: getattr(self, f"{part}_seconds") for part in get_args(Part)}

    def add(self, parts: dict[Part, float]) -> None:
        """Add time to parts of the event."""
        for part, seconds in parts.items():
            setattr(self, f"{part}_seconds", self.parts[part] + seconds)


@dataclass
class Summary:
    """The monitored metric before the first event, after the last one, and at the end of the training."""

    metric: str | None = None  # its name, or None where none is monitored
    dense: float | None = None  # before the first event
    pruned: float | None = None  # after the last event
    recovered: float | None = None  # at the end of the training
    training_seconds: float = 0.0  # from the first batch on, without validation
    event_seconds: float = 0.0  # part of `training_seconds` that events took, including the scans of layers before them
    # Part of `training_seconds` that was spent between events on collecting statistics of the layers' inputs and of the
    # gradients at their outputs
    collecting_seconds: float = 0.0
    target_weights: int = 0  # in the layers to prune
    model_weights: int = 0  # a weight that several modules share counts once
    sparsity: float = 0.0  # fraction of `target_weights` that is pruned

    @property
    def sparsity_of_model(self) -> float:
        """Fraction of `model_weights` that is pruned."""
        return self.sparsity * self.target_weights / self.model_weights


@dataclass
class History:
    """How the training went."""

    # (optimizer step, training loss). Each loss is the mean over the steps since the previous entry
    losses: list[tuple[int, float]] = field(default_factory=list)
    # (optimizer step, monitored metric), in the order of measurement. Two metrics of the same step are from before and
    # after an event
    metrics: list[tuple[int, float]] = field(default_factory=list)
    every: int = 1  # optimizer steps from one loss to the next


class LossRecorder:
    """Adds the losses of training steps to a history.

    The history keeps fewer than 400 losses. At 400, each pair of neighbours becomes its mean, and from then on each
    loss is the mean of twice as many steps. Losses stay on their device until `settle`.
    """

    def __init__(self, history: History) -> None:
        self._history = history
        self._pending: list[tuple[int, Tensor]] = []
        self._sum: Tensor | None = None
        self._count = 0

    def add(self, step: int, outputs: Any) -> None:
        """Count the loss of an optimizer step. A training step whose `outputs` have no scalar loss is not counted."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if not isinstance(loss, Tensor) or loss.ndim:
            return
        loss = loss.detach().float()
        self._sum = loss if self._sum is None else self._sum + loss
        self._count += 1
        if self._count >= self._history.every:
            self._pending.append((step, self._sum / self._count))
            self._sum, self._count = None, 0
            if len(self._pending) + len(self._history.losses) >= MOST_LOSSES:
                self._thin()

    def settle(self) -> None:
        """Move pending losses from their device into the history."""
        if self._pending:
            values = torch.stack([value for _, value in self._pending]).tolist()
            self._history.losses += [(step, value) for (step, _), value in zip(self._pending, values, strict=True)]
            self._pending.clear()

    def _thin(self) -> None:
        self.settle()
        losses = self._history.losses
        pairs = zip(losses[::2], losses[1::2], strict=True)
        self._history.losses = [(step, (before + loss) / 2) for (_, before), (step, loss) in pairs]
        self._history.every *= 2


class Clock:
    """Measures the training, its events and the parts of each event.

    The times of the training and of its events go to `summary`. Each part of an event waits for the work of `device`.
    """

    def __init__(self, summary: Summary | None = None, device: torch.device = _CPU) -> None:
        self._summary = summary or Summary()
        self._device = device
        self._since: float | None = time.perf_counter()
        self._part: Part = "writing"
        self._part_since = 0.0
        self.parts: dict[Part, float] = {}  # since the last take()

    def tick(self) -> None:
        """Count the time that has passed, unless the clock is paused."""
        if self._since is not None:
            now = time.perf_counter()
            self._summary.training_seconds += now - self._since
            self._since = now

    def pause(self) -> None:
        """Stop counting, because what follows is not training."""
        self.tick()
        self._since = None

    def go_on(self) -> None:
        """Count again, because training goes on."""
        self._since = time.perf_counter()

    @contextmanager
    def event(self) -> Iterator[None]:
        """Count the block as event time. It counts as writing until `now` names another part."""
        finish(self._device)
        self._part, self._part_since = "writing", time.perf_counter()
        yield
        self.now("writing")

    def now(self, part: Part) -> None:
        """Count what follows as this part of the current event."""
        finish(self._device)
        time_now = time.perf_counter()
        self.add(self._part, time_now - self._part_since)
        self._summary.event_seconds += time_now - self._part_since
        self._part, self._part_since = part, time_now

    def add(self, part: Part, seconds: float) -> None:
        """Add time that a part took outside the event's block."""
        self.parts[part] = self.parts.get(part, 0.0) + seconds

    def take(self) -> dict[Part, float]:
        """Return what each part took since the last call, and start again at zero."""
        parts, self.parts = self.parts, {}
        return parts


def _finite(value: Any) -> Any:
    """Replace NaN and infinities by None, because JSON has neither."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _json_of(event: EventReport) -> str:
    return textwrap.indent(json.dumps(_finite(asdict(event)), indent=1), "  ")  # as deep as it is in the file


@dataclass
class PruningReport:
    """All events of a training, what they did to the monitored metric, and how the training went."""

    events: list[EventReport] = field(default_factory=list)
    summary: Summary = field(default_factory=Summary)
    history: History = field(default_factory=History)
    _finished: list[str] = field(default_factory=list, init=False, repr=False, compare=False)  # JSON of these events

    def state(self) -> dict[str, Any]:
        """The report as plain values. Each event is JSON text, so that many events cost a checkpoint little."""
        # Only the last event can still change, so only it is written anew each time.
        self._finished += map(_json_of, self.events[len(self._finished) : -1])
        events = [*self._finished, *map(_json_of, self.events[-1:])]
        return {"events": events, "summary": asdict(self.summary), "history": asdict(self.history)}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> PruningReport:
        """Rebuild a report from the result of `state`, or from the JSON in a file of `write`.

        Raises ValueError if the state is of other types, or an event has no weights.
        """
        entries = read_as(dict[str, Any], state, "the report")
        events = read_as(list[Any], entries.get("events"), "the report: events")
        decoded = [json.loads(event) if isinstance(event, str) else event for event in events]
        report: PruningReport = read_as(cls, {**entries, "events": decoded}, "the report")
        if any(math.prod(layer.shape) < 1 for event in report.events for layer in event.layers):
            raise ValueError("the report has a layer without weights")
        return report

    @classmethod
    def read(cls, path: Path) -> PruningReport:
        """Read what `write` wrote. Raises FileNotFoundError if there is no such file, ValueError if it is no report."""
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: give the pruning_report.json of a training")
        try:
            return cls.from_state(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{path} is no pruning report ({error}): give the pruning_report.json of a training"
            ) from error

    def write(self, path: Path) -> None:
        """Write the report as JSON; numbers that JSON can't hold become null. Never leaves half a file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        state = self.state()
        before, after = json.dumps(_finite(state | {"events": []}), indent=1).split("[]", 1)
        events = ",\n".join(state["events"])
        part.write_text(f"{before}[\n{events}\n ]{after}\n", encoding="utf-8")
        os.replace(part, path)
