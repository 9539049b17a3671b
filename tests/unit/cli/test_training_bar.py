import io
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import rich
import torch
from lightning.pytorch import Callback, Trainer
from patience import until
from rich.console import Console
from toy import ToyLM, loader, trainer

from thanos_lightning import CalibrationOptions, ThanosPruningCallback
from thanos_lightning.cli.training_bar import TrainingBar
from thanos_lightning.report.progress import Terminated

pytestmark = pytest.mark.usefixtures("impatient")


def at_once(batches: Any, memory_gib: float | None = None, **options: Any) -> ThanosPruningCallback:
    return ThanosPruningCallback("2:4", calibration=CalibrationOptions(batches, memory_gib=memory_gib), **options)


class Logged(ToyLM):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("train/loss", loss, prog_bar=True)
        return loss


def test_a_log_tells_training_validation_and_events(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = ""

    class Waits(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            nonlocal told
            told += until("train/loss ", lambda: capsys.readouterr().err)

    pruning, bar = at_once(list(loader(8)), memory_gib=40 / 2**20, monitor="val/loss"), TrainingBar()
    fitted = trainer(tmp_path, pruning, bar, Waits(), max_steps=6, enable_progress_bar=True, num_sanity_val_steps=0)
    fitted.fit(Logged(), loader(), loader(8))
    told += capsys.readouterr().err
    lines = told.splitlines()
    assert any(line.startswith("Training: 6 steps in ") for line in lines)
    of_windows = "Pruning at step 0: 1 of 2 windows after ", "Pruning at step 0: 2 windows in "
    for begin in (*of_windows, "Validating: ", "Calibrating: ", "Solving at step 0: ", "Writing at step 0: "):
        assert any(line.startswith(begin) for line in lines), begin
    assert "Epoch" not in told
    assert "\r" not in told


def test_a_terminal_has_a_bar_of_all_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(rich, "_console", Console(file=terminal, force_terminal=True, width=80, _environ={}))

    class Waits(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 20:
                until("20 of 20 steps", terminal.getvalue)

    parts = at_once(list(loader(8))), TrainingBar(), Waits()
    fitted = trainer(tmp_path, *parts, max_steps=20, enable_progress_bar=True)
    fitted.fit(Logged(), loader(32))
    told = terminal.getvalue()
    assert "train/loss " in told
    assert "Epoch" not in told


def test_the_bar_of_a_training_has_no_metric_of_a_validation_that_is_over(tmp_path: Path) -> None:
    notes: list[str] = []

    class Validated(Logged):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val/loss", super().training_step(batch, batch_idx), prog_bar=True)

    class Reads(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            notes.append(bar._note)

    bar = TrainingBar()
    parts = at_once(list(loader(8)), monitor="val/loss"), bar, Reads()
    trainer(tmp_path, *parts, max_steps=4, enable_progress_bar=True).fit(Validated(), loader(), loader(8))
    assert all(note.startswith("train/loss ") for note in notes)
    assert not any("val/loss" in note for note in notes)


def test_a_trainer_without_a_bar_is_quiet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(tmp_path, at_once(list(loader(8))), max_steps=2).fit(ToyLM(), loader())
    assert "Calibrating" not in capsys.readouterr().err


def test_it_tests_and_predicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Module(ToyLM):
        def test_step(self, batch: Any, batch_idx: int) -> None: ...

        def predict_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return batch["input_ids"]

    fitted = trainer(tmp_path, TrainingBar(), enable_progress_bar=True)
    fitted.test(Module(), loader(8))
    fitted.predict(Module(), loader(8))
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("Testing: 2 batches in") for line in lines)
    assert any(line.startswith("Predicting: 2 batches in") for line in lines)


@pytest.mark.parametrize(("number", "ends"), [(signal.SIGTERM, Terminated), (signal.SIGINT, SystemExit)])
def test_a_signal_ends_a_calibration_at_once(number: signal.Signals, ends: type[BaseException], tmp_path: Path) -> None:
    class Interrupted(list[Any]):
        taken = 0

        def __iter__(self) -> Iterator[Any]:
            for batch in super().__iter__():
                self.taken += 1
                if self.taken == 2:
                    os.kill(os.getpid(), number)
                yield batch

    batches, lm = Interrupted(loader(32)), ToyLM()
    dense = lm.model.state_dict()
    before = {name: value.clone() for name, value in dense.items()}
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
    try:
        with pytest.raises(ends):
            trainer(tmp_path, at_once(batches), TrainingBar(), max_steps=2, enable_progress_bar=True).fit(lm, loader())
    finally:
        signal.signal(signal.SIGINT, handlers[1])  # which Lightning leaves ignored
    assert batches.taken <= 3
    assert all(torch.equal(value, before[name]) for name, value in dense.items())
    assert not any(module._forward_pre_hooks for module in lm.modules())
    assert signal.getsignal(signal.SIGTERM) == handlers[0]
