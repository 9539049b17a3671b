"""Shows a training in one line: the optimizer step of how many, the loss, the monitored metric and the time left."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from torch import Tensor
from typing_extensions import override

from thanos_lightning.report.progress import Phase, shown

_BETWEEN_READINGS = 1.0  # seconds: reading a loss makes the host wait for the device


class TrainingBar(ProgressBar):
    """Shows training, validation, test and prediction as phases, one at a time, each in a line that fits the terminal.

    Without a terminal it writes a line at most every 30 s.

    Examples:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(max_steps=50, callbacks=[TrainingBar()], logger=False, enable_checkpointing=False)
    """

    def __init__(self) -> None:
        super().__init__()
        self._is_enabled = True
        self._training: Phase | None = None
        self._looking: Phase | None = None
        self._open_training, self._open_looking = ExitStack(), ExitStack()
        self._read_at = -math.inf
        self._loss = ""
        self._metrics = ""

    @override
    def disable(self) -> None:
        self._is_enabled = False

    @override
    def enable(self) -> None:
        self._is_enabled = True

    # Training

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._is_enabled:
            total = trainer.estimated_stepping_batches
            known = int(total) if math.isfinite(total) and total > 0 else None
            phase = Phase("Training", known, "steps", completed=trainer.global_step)
            self._training = self._open_training.enter_context(shown(phase))

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._training is None:
            return
        self._training.completed = trainer.global_step
        if time.monotonic() - self._read_at >= _BETWEEN_READINGS:
            self._read_at = time.monotonic()
            loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
            self._loss = f"loss {float(loss):.4g}" if isinstance(loss, Tensor) and loss.numel() == 1 else ""
            others = [
                f"{name} {value:.4g}"
                for name, value in self.get_metrics(trainer, pl_module).items()
                if isinstance(value, float) and not name.endswith("loss") and name not in self._monitored(trainer)
            ]
            self._training.note = "  ".join(part for part in (self._loss, self._metrics, *others) if part)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._open_training.close()
        self._training = None

    # Validation, test, prediction

    def _look(self, what: str, batches: int | float | list[int | float]) -> None:
        if self._is_enabled:
            total = sum(batches) if isinstance(batches, list) else batches
            known = int(total) if math.isfinite(total) else None
            self._looking = self._open_looking.enter_context(shown(Phase(what, known, "batches")))

    def _advance(self) -> None:
        if self._looking is not None:
            self._looking.advance()

    def _looked(self) -> None:
        self._open_looking.close()
        self._looking = None

    def _monitored(self, trainer: Trainer) -> list[str]:
        """Name the metrics that the Trainer's callbacks monitor, each once."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
        names = [name for callback in callbacks if isinstance(name := getattr(callback, "monitor", None), str)]
        return list(dict.fromkeys(names))

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        what = "Checking the validation" if trainer.sanity_checking else "Validating"
        self._look(what, trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches)

    @override
    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        self._advance()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._looked()
        found = {name: trainer.callback_metrics.get(name) for name in self._monitored(trainer)}
        self._metrics = "  ".join(f"{name} {float(value):.4g}" for name, value in found.items() if value is not None)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look("Testing", trainer.num_test_batches)

    @override
    def on_test_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        self._advance()

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._looked()

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look("Predicting", trainer.num_predict_batches)

    @override
    def on_predict_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        self._advance()

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._looked()

    # At the end, also after an error

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._close()

    def _close(self) -> None:
        self._looked()
        self._open_training.close()
        self._training = None
