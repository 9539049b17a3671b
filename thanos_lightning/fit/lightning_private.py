"""Reads the private names of Lightning that pruning needs. No other file does. A test reports names that go missing."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import wraps
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.optim.swa_utils import AveragedModel


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """The Trainer's callbacks, in the order in which they are called."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
    return callbacks


def replace_callbacks(trainer: Trainer, callbacks: list[Callback]) -> None:
    """Replace the callbacks that the Trainer calls."""
    trainer.callbacks = callbacks  # type: ignore[attr-defined]


def after_configure_model(module: LightningModule, then: Callable[[LightningModule], None]) -> None:
    """Call `then(module)` after the module's next `configure_model`, for which there is no hook."""
    if not is_overridden("configure_model", module):
        return
    configure = module.configure_model

    @wraps(configure)
    def configure_model() -> None:
        del module.configure_model  # this function, which hides the module's own
        configure()
        then(module)

    module.configure_model = configure_model  # type: ignore[method-assign]


def training_metrics(trainer: Trainer) -> Collection[str]:
    """Names of the metrics that the training step has logged."""
    if trainer._results is None:
        return []
    names: Collection[str] = trainer._logger_connector.metrics["callback"]
    return names


def logged_step(trainer: Trainer) -> int:
    """The step number with which the Trainer logs training metrics."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def validate(trainer: Trainer) -> None:
    """Run the Trainer's validation loop in the middle of a training, as if it were due."""
    connector = trainer._logger_connector
    first = connector._first_loop_iter
    trainer.validating = True  # the loops read here which of them is active
    try:
        trainer.fit_loop.epoch_loop.val_loop.run()
    finally:
        trainer.training = True
        connector._first_loop_iter = first


def average_of(callback: WeightAveraging) -> AveragedModel | None:
    """The averaged model of a WeightAveraging callback; None before it exists."""
    return callback._average_model


def note_sigterm(trainer: Trainer) -> None:
    """Let SIGTERM be noted alone by one of several ranks, until all of them call `end_on_sigterm`.

    Lightning's own handler broadcasts at once, wherever this rank is: in a backward or an event the ranks then hang.
    """
    connector: Any = trainer._signal_connector
    if trainer.world_size == 1 or hasattr(connector, "is_noted"):
        return
    connector.is_noted = False

    def note(signum: int, frame: FrameType | None) -> None:
        if not connector.is_noted and trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(signum)  # as Lightning's handler does
        connector.is_noted = True

    connector._sigterm_notifier_fn = note
    # Lightning tells of a SIGTERM at the next batch, and only of rank 0's
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def has_sigterm(trainer: Trainer) -> bool:
    """Whether SIGTERM has come to this rank."""
    return trainer.received_sigterm or getattr(trainer._signal_connector, "is_noted", False)


def end_on_sigterm(trainer: Trainer) -> None:
    """Let Lightning end the training after this batch, with its SIGTERMException. All ranks must call it."""
    trainer._signal_connector.received_sigterm = True


def saves_shards(strategy: Strategy) -> bool:
    """Whether the strategy saves a folder to which each rank adds its shards (ModelParallelStrategy's default)."""
    return bool(getattr(strategy, "_save_distributed_checkpoint", False))
