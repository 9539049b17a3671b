"""The progress of a training. Checkpoints keep it, and so does the callback from one fit to the next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

from thanos_lightning.checkpoints.format import CHECKPOINT_FORMAT
from thanos_lightning.plan.allocation import LayerSensitivity
from thanos_lightning.plan.options import PruningOptions
from thanos_lightning.report.data import PruningReport
from thanos_lightning.report.plain import read_as
from thanos_lightning.solver import Pattern


@dataclass
class Past:
    """What a training has done so far."""

    optimizer_steps: int = 0  # taken so far
    windows_done: int = 0  # windows of the plan that were pruned or scanned
    patterns: dict[str, Pattern] = field(default_factory=dict)  # layer -> what it was pruned to; saved with its mask
    sensitivities: dict[str, LayerSensitivity] = field(default_factory=dict)  # of scanned layers
    measured: tuple[int, float] | None = None  # optimizer steps at the last validation, and the monitored metric then
    # Monitored metrics that were measured before the last event, by what measures them anew: "step" or "validation"
    old_scores: dict[str, list[str]] = field(default_factory=lambda: {"step": [], "validation": []})
    report: PruningReport = field(default_factory=PruningReport)
    memory_gib: float | None = None  # for second moments in a window, by the memory that was free at the beginning
    total_steps: int | None = None  # of the Trainer's first fit, if the schedule has fractions; the state omits it

    def arguments(self, options: PruningOptions) -> dict[str, str]:
        """The callback's arguments as text, which a resumed training compares with its own arguments."""
        length = {} if self.total_steps is None else {"max_steps": str(self.total_steps)}
        return options.in_words() | length

    def state(self, options: PruningOptions, **of_run: Any) -> dict[str, Any]:
        """The state as plain values, for `of_state`.

        `of_run` is what `PruningRun.state` adds. While no fit runs, there are no masks and no sums of a window.
        """
        state = {
            "format": CHECKPOINT_FORMAT,
            "arguments": self.arguments(options),
            "optimizer_steps": self.optimizer_steps,
            "windows": [],
            "windows_done": self.windows_done,
            "masks": {},
            "pruned": {},
            "collected": None,
            "report": self.report.state(),
            "event_parts": {},
            "measured": self.measured,
            "old_scores": self.old_scores,
            "sensitivities": {name: asdict(scan) for name, scan in self.sensitivities.items()},
            "memory_gib": self.memory_gib,
            "save": "",
        }
        assert of_run.keys() <= state.keys()
        return state | of_run

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> Past:
        """Read a state that `state` or `PruningRun.state` returned.

        Raises:
            MisconfigurationException: If a version of the package with another format wrote the state.
            ValueError: If a value is of another type.
        """
        if state.get("format") != CHECKPOINT_FORMAT:
            raise MisconfigurationException(
                f"the checkpoint's pruning state has format {state.get('format')!r}, this version reads "
                f"{CHECKPOINT_FORMAT}: resume with the version of thanos_lightning that wrote it"
            )
        kinds: dict[str, Any] = {
            "optimizer_steps": int,
            "windows_done": int,
            "sensitivities": dict[str, LayerSensitivity],
            "measured": tuple[int, float] | None,
            "old_scores": dict[str, list[str]],
            "memory_gib": float | None,
        }
        values = {name: read_as(kind, state.get(name), f"the pruning state: {name}") for name, kind in kinds.items()}
        return cls(**values, report=PruningReport.from_state(state["report"]))
