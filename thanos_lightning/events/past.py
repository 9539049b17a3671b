"""What a training has behind it: kept in checkpoints, and from one fit of a Trainer to its next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

from thanos_lightning.checkpoints.format import CHECKPOINT_FORMAT
from thanos_lightning.plan.allocation import LayerSensitivity
from thanos_lightning.plan.options import PruningOptions
from thanos_lightning.report.data import PruningReport
from thanos_lightning.solver import Pattern


@dataclass
class Past:
    """What has happened so far.

    Attributes:
        optimizer_steps: How many were taken.
        windows_done: How many windows of the plan were pruned or scanned.
        patterns: Layer name -> what it was pruned to. Not in the state: masks say it there.
        sensitivities: Layer name -> what a scan has found.
        measured: Optimizer steps at the last validation, and the monitored metric then.
        old_scores: Monitors of checkpoints whose values are from before the last event, by what renews them.
        report: What is told of it.
        total_steps: Of a Trainer's first fit, of which the schedule has fractions. Not in the state.
    """

    optimizer_steps: int = 0
    windows_done: int = 0
    patterns: dict[str, Pattern] = field(default_factory=dict)
    sensitivities: dict[str, LayerSensitivity] = field(default_factory=dict)
    measured: tuple[int, float] | None = None
    old_scores: dict[str, list[str]] = field(default_factory=lambda: {"step": [], "validation": []})
    report: PruningReport = field(default_factory=PruningReport)
    total_steps: int | None = None

    def arguments(self, options: PruningOptions) -> dict[str, str]:
        """What is asked, in words that a resumed training compares with its own."""
        length = {} if self.total_steps is None else {"max_steps": str(self.total_steps)}
        return options.in_words() | length

    def state(self, options: PruningOptions) -> dict[str, Any]:
        """Plain values, which `of_state` reads; between fits, when no window is open and no mask is held."""
        return {
            "format": CHECKPOINT_FORMAT,
            "arguments": self.arguments(options),
            "optimizer_steps": self.optimizer_steps,
            "windows": [],
            "windows_done": self.windows_done,
            "masks": {},
            "collected": None,
            "couples_rows": options.calibration.couples_rows,
            "report": self.report.state(),
            "event_parts": {},
            "measured": self.measured,
            "old_scores": self.old_scores,
            "sensitivities": {name: found.state() for name, found in self.sensitivities.items()},
            "save": "",
        }

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> Past:
        """Read what `state` wrote.

        Raises:
            MisconfigurationException: If another version of the package has written it.
        """
        if state.get("format") != CHECKPOINT_FORMAT:
            raise MisconfigurationException(
                f"the checkpoint's pruning state has format {state.get('format')!r}, this version reads "
                f"{CHECKPOINT_FORMAT}: resume with the version of thanos_lightning that wrote it"
            )
        return cls(
            optimizer_steps=state["optimizer_steps"],
            windows_done=state["windows_done"],
            sensitivities={name: LayerSensitivity(**found) for name, found in state["sensitivities"].items()},
            measured=state["measured"] and tuple(state["measured"]),
            old_scores={by: list(monitors) for by, monitors in state["old_scores"].items()},
            report=PruningReport.from_state(state["report"]),
        )
