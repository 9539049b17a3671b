"""Shows how far a training, a validation, a test or a prediction is: a bar in a terminal, or lines in a log."""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from typing_extensions import override

from thanos_lightning.fit.lightning_private import training_metrics
from thanos_lightning.plan.schedule import steps_of
from thanos_lightning.report.progress import Phase, shown

_BETWEEN_READINGS = 1.0  # seconds


class TrainingBar(ProgressBar):
    """Counts the optimizer steps of a training, and not the batches of each epoch."""

    def __init__(self) -> None:
        super().__init__()
        self._phases: list[tuple[Phase, ExitStack]] = []  # a validation is within a training
        self._note, self._read_at = "", -math.inf

    @override
    def disable(self) -> None:
        """Nothing to do: other ranks than the first show no phase."""

    enable = disable

    def _begin(self, what: str, total: float, unit: str = "batches", completed: int = 0) -> None:
        phase, shows = Phase(what, int(total) if math.isfinite(total) else None, unit, completed), ExitStack()
        shows.enter_context(shown(phase))
        self._phases.append((phase, shows))

    def _advance(self, *_: Any, **__: Any) -> None:
        self._phases[-1][0].advance()

    def _end(self, *_: Any, **__: Any) -> None:
        self._phases.pop()[1].close()

    def _end_all(self, *_: Any, **__: Any) -> None:
        while self._phases:
            self._end()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin("Training", steps_of(trainer) or math.inf, "steps", trainer.global_step)

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        if time.monotonic() - self._read_at >= _BETWEEN_READINGS:  # the host waits for the device to read metrics
            metrics, of_step = self.get_metrics(trainer, pl_module), training_metrics(trainer)  # not a validation's
            told = {name: value for name, value in metrics.items() if name in of_step}
            self._note = "  ".join(f"{name} {value:.4g}" for name, value in told.items() if isinstance(value, float))
            self._read_at = time.monotonic()
        self._phases[-1][0].reach(trainer.global_step, self._note)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        batches = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        self._begin("Validating", sum(batches))

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin("Testing", sum(trainer.num_test_batches))

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin("Predicting", sum(trainer.num_predict_batches))

    on_validation_batch_end = on_test_batch_end = on_predict_batch_end = _advance
    on_train_end = on_validation_end = on_test_end = on_predict_end = _end
    on_exception = teardown = _end_all
