"""Shows how far a training, a validation, a test or a prediction is: by Lightning's bar, or by lines in a log."""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from typing_extensions import override

from thanos_lightning.plan.training_steps import steps_of
from thanos_lightning.report.progress import Phase, shown

_BETWEEN_READINGS = 1.0  # seconds


class _SeldomReading(ProgressBar):
    """Reads metrics once a second at most, since reading one makes the host wait for the device."""

    _metrics: dict[str, Any]
    _read_at = -math.inf

    @override
    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        if time.monotonic() - self._read_at >= _BETWEEN_READINGS:
            self._read_at, self._metrics = time.monotonic(), super().get_metrics(trainer, pl_module)
        return self._metrics


class TrainingBar(_SeldomReading, RichProgressBar):
    """Lightning's bar, which counts the optimizer steps of a training, and not the batches of each epoch.

    Examples:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(max_steps=50, callbacks=[TrainingBar()], logger=False, enable_checkpointing=False)
    """

    @override
    def configure_columns(self, trainer: Trainer) -> list[Any]:
        return super().configure_columns(trainer)[:-1]  # without batches a second, which metrics need the room of

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self.progress is not None:
            total = steps_of(trainer) or math.inf
            self.train_progress_bar_id = self.progress.add_task("Training", total=total, completed=trainer.global_step)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on with the training's bar."""

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        if self.progress is not None and self.train_progress_bar_id is not None:
            self.progress.update(self.train_progress_bar_id, completed=trainer.global_step)
            self.on_train_epoch_end(trainer, pl_module)  # which shows the metrics


class TrainingLog(_SeldomReading):
    """A line in a log, at most every 30 s, of a training, validation, test or prediction."""

    def __init__(self) -> None:
        super().__init__()
        self._is_enabled = True
        self._phases: list[tuple[Phase, ExitStack]] = []  # a validation is within a training

    @override
    def disable(self) -> None:
        self._is_enabled = False

    @override
    def enable(self) -> None:
        self._is_enabled = True

    def _begin(self, what: str, total: float, unit: str = "batches", completed: int = 0) -> None:
        if self._is_enabled:
            phase, shows = Phase(what, int(total) if math.isfinite(total) else None, unit, completed), ExitStack()
            shows.enter_context(shown(phase))
            self._phases.append((phase, shows))

    def _advance(self, *_: Any, **__: Any) -> None:
        for phase, _shows in self._phases[-1:]:
            phase.advance()

    def _end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for _phase, shows in self._phases[-1:]:
            self._phases.pop()
            shows.close()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin("Training", steps_of(trainer) or math.inf, "steps", trainer.global_step)

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        for phase, _shows in self._phases:
            metrics = self.get_metrics(trainer, pl_module).items()
            note = "  ".join(f"{name} {value:.4g}" for name, value in metrics if isinstance(value, float))
            phase.reach(trainer.global_step, note)

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

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "")

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        while self._phases:
            self._end(trainer, pl_module)
