"""Adapts the Trainer and its other callbacks to pruning: those that average, stop early, or keep the best model."""

from __future__ import annotations

import shlex
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    Checkpoint,
    EarlyStopping,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from typing_extensions import override

from thanos_lightning.fit.lightning_private import (
    average_of,
    callbacks_of,
    replace_callbacks,
    training_metrics,
    validate,
)
from thanos_lightning.report.progress import Terminated


def check_trainer(trainer: object) -> None:
    """Refuse a Trainer from Lightning's other package (pytorch_lightning), which has different classes."""
    if not isinstance(trainer, Trainer):
        raise MisconfigurationException(
            f"ThanosPruningCallback is a callback of lightning.pytorch, and the Trainer is one of "
            f"{type(trainer).__module__.partition('.')[0]}: import Trainer and LightningModule from lightning.pytorch "
            "(pip install lightning), where they have the same arguments"
        )


def check_companions(trainer: Trainer, own: Callback, strategy: Strategy | None = None) -> None:
    """Refuse callbacks beside `own` that prune, or that average weights in a way that would lose zeros.

    `strategy` is the one to train by; the Trainer's if it is None.
    """
    for callback in callbacks_of(trainer):
        if callback is not own and "ThanosPruningCallback" in {kind.__name__ for kind in type(callback).__mro__}:
            raise MisconfigurationException(
                "the Trainer has more than one ThanosPruningCallback: keep one, and give layers patterns of their own "
                "by its overrides"
            )
        if isinstance(callback, ModelPruning):
            raise MisconfigurationException(
                f"{type(callback).__name__} puts masks of its own on the weights that ThanosPruningCallback prunes: "
                "remove one of the two"
            )
        if isinstance(callback, StochasticWeightAveraging):
            raise MisconfigurationException(
                f"{type(callback).__name__} writes averages of dense and pruned weights at the end of the training, "
                "so the zeros would be lost: take WeightAveraging or EMAWeightAveraging, which begin anew at each event"
            )
        strategy = strategy or trainer.strategy
        sharded = isinstance(strategy, (DeepSpeedStrategy, ModelParallelStrategy))
        if isinstance(callback, WeightAveraging) and sharded:
            raise MisconfigurationException(
                f"{type(callback).__name__} needs all weights on each rank, which {type(strategy).__name__} "
                "may not have: remove it, or train on one device or under DDP"
            )


@torch.no_grad()
def restart_averages(trainer: Trainer, pl_module: LightningModule) -> None:
    """Restart weight averages from the current weights, because earlier weights were less sparse."""
    for callback in callbacks_of(trainer):
        average = average_of(callback) if isinstance(callback, WeightAveraging) else None
        if average is None:
            continue
        averaged = {**dict(average.module.named_parameters()), **dict(average.module.named_buffers())}
        for name, tensor in [*pl_module.named_parameters(), *pl_module.named_buffers()]:
            averaged[name].copy_(tensor)
        average.n_averaged.zero_()


def hold_back_stopping(trainer: Trainer) -> list[EarlyStopping]:
    """Take EarlyStopping callbacks out of the Trainer, and return them for `release_stopping`.

    Until the last event, a metric says nothing about the final model.
    """
    callbacks = callbacks_of(trainer)
    held = [callback for callback in callbacks if isinstance(callback, EarlyStopping)]
    if held:
        rank_zero_info(f"{', '.join(type(one).__name__ for one in held)} counts from the last pruning event on")
        replace_callbacks(trainer, [callback for callback in callbacks if callback not in held])
    return held


def release_stopping(trainer: Trainer, held: list[EarlyStopping]) -> None:
    """Put back the callbacks that `hold_back_stopping` took out."""
    if held:
        callbacks = callbacks_of(trainer)
        # Lightning keeps checkpoint callbacks last.
        first = next((index for index, one in enumerate(callbacks) if isinstance(one, ModelCheckpoint)), len(callbacks))
        replace_callbacks(trainer, [*callbacks[:first], *held, *callbacks[first:]])
        held.clear()


def validate_quietly(trainer: Trainer) -> None:
    """Run the validation loop in the middle of a training, for its metrics alone.

    A validation that the user didn't ask for must not save a checkpoint or stop the training.
    """
    callbacks = callbacks_of(trainer)
    replace_callbacks(trainer, [one for one in callbacks if not isinstance(one, (Checkpoint, EarlyStopping))])
    try:
        validate(trainer)
    finally:
        replace_callbacks(trainer, callbacks)


def saved_checkpoint(trainer: Trainer) -> Path | None:
    """Return the checkpoint to continue with: the best one by a metric if there is one, else the last one."""
    checkpoints = [callback for callback in callbacks_of(trainer) if isinstance(callback, ModelCheckpoint)]
    best = [checkpoint.best_model_path for checkpoint in checkpoints if checkpoint.monitor is not None]
    others = [path for one in checkpoints for path in (one.last_model_path, one.best_model_path)]
    return next((Path(path) for path in [*best, *others] if path and Path(path).exists()), None)


def call_last(trainer: Trainer, last: Callback, *, saves: bool) -> None:
    """In a callback's hook, let the Trainer call `last` after all others, and skip those that save if not `saves`."""
    called = callbacks_of(trainer)  # which the Trainer goes through
    replace_callbacks(trainer, list(called))
    called[:] = [*(one for one in called if saves or not isinstance(one, Checkpoint)), last]


class Farewell(Callback):
    """Says which checkpoint to go on from when a signal has ended the training, and which ones are replaced.

    It has to be made before any save.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._saved: list[Path] = []
        save = trainer.save_checkpoint

        @wraps(save)
        def save_checkpoint(filepath: Any, *args: Any, **kwargs: Any) -> None:
            path = Path(filepath)
            if path not in self._saved and path.exists():
                rank_zero_info(f"{path} is of an earlier training, and is replaced")
            save(filepath, *args, **kwargs)
            self._saved.append(path)

        trainer.save_checkpoint = save_checkpoint  # type: ignore[method-assign]

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if not isinstance(exception, (KeyboardInterrupt, SIGTERMException, Terminated)):
            return
        by = "Ctrl-C" if isinstance(exception, KeyboardInterrupt) else "SIGTERM"
        before = [] if trainer.ckpt_path is None else [Path(trainer.ckpt_path)]
        newest = next((path for path in reversed([*before, *self._saved]) if path.exists()), None)
        rank_zero_info(
            f"{by} ended the training at step {trainer.global_step}: "
            + (
                "no checkpoint was saved, so the next training begins anew"
                if newest is None
                else f"to go on, give the newest checkpoint as ckpt_path (--ckpt_path {shlex.quote(str(newest))})"
            )
        )


class BestScores:
    """Keeps `ModelCheckpoint(monitor=...)` from choosing a best checkpoint by a metric from before the last event.

    The last event makes it forget all scores so far, because they belong to less sparse models. After the event, a
    ModelCheckpoint that saves at optimizer steps may still read old metrics: a training metric is old until the next
    step, and a validation metric is old until the next validation. Scores by old metrics are forgotten, too. The old
    files are deleted one by one as later files replace them.

    `old` maps "step" and "validation" to the monitors that are old until the next of its kind. It is changed in place.
    """

    def __init__(self, old: dict[str, list[str]]) -> None:
        self._old = old

    def pruned(self, trainer: Trainer) -> None:
        """Forget all scores, because the model has just reached its final sparsity."""
        of_step = training_metrics(trainer)
        for checkpoint in _monitored(trainer):
            assert checkpoint.monitor is not None
            self._old["step" if checkpoint.monitor in of_step else "validation"].append(checkpoint.monitor)
        _forget(trainer, [*self._old["step"], *self._old["validation"]])

    def renewed(self, trainer: Trainer, by: str) -> None:
        """Forget scores by old metrics after a step or a validation (`by`), before anything is saved again."""
        if self._old[by]:
            _forget(trainer, self._old[by])
            self._old[by] = []

    def warn_of_none(self, trainer: Trainer, step: int) -> None:
        """Warn of each ModelCheckpoint with a monitor that has scored no checkpoint since the last event, at `step`."""
        for by in self._old:
            self.renewed(trainer, by)
        for checkpoint in _monitored(trainer):
            if not checkpoint.best_model_path:
                rank_zero_warn(
                    f"{type(checkpoint).__name__}(monitor={checkpoint.monitor!r}) has scored no checkpoint since the "
                    f"last pruning event at optimizer step {step}, so there is no best sparse one: validate more often "
                    "(val_check_interval), or save the last one (save_last=True)"
                )


def _monitored(trainer: Trainer) -> list[ModelCheckpoint]:
    checkpoints = [callback for callback in callbacks_of(trainer) if isinstance(callback, ModelCheckpoint)]
    return [checkpoint for checkpoint in checkpoints if checkpoint.monitor is not None]


def _forget(trainer: Trainer, monitors: list[str]) -> None:
    for checkpoint in _monitored(trainer):
        if checkpoint.monitor in monitors:
            worst = torch.tensor(torch.inf if checkpoint.mode == "min" else -torch.inf)
            checkpoint.best_k_models = dict.fromkeys(checkpoint.best_k_models, worst)
            checkpoint.kth_value = worst
            checkpoint.best_model_path = ""
            checkpoint.best_model_score = None
