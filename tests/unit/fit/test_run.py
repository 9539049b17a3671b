"""SIGTERM and Ctrl-C before, in and after an event of a training that a script starts."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from toy import ResumableBatches, ToyLM, loader, trainer

import thanos_lightning.event.window
from thanos_lightning import CalibrationOptions, SparsitySchedule, ThanosPruningCallback
from thanos_lightning.report.progress import Terminated


class Signals(Callback):
    """Sends this process a signal in a hook, the first time that the condition is met."""

    def __init__(self, hook: str, *, when: Callable[[Trainer], bool], number: int = signal.SIGTERM) -> None:
        self.sent = False
        setattr(self, hook, lambda trainer, *_: self._send(when(trainer), number))

    def _send(self, is_time: bool, number: int) -> None:
        if is_time and not self.sent:
            self.sent = True
            os.kill(os.getpid(), number)


@pytest.fixture(autouse=True)
def _default_handlers() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
    yield
    signal.signal(signal.SIGINT, before)  # which Lightning leaves ignored


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr("thanos_lightning.fit.other_callbacks.rank_zero_info", lines.append)
    return lines


def once(batches: Any = None, **options: Any) -> ThanosPruningCallback:
    schedule = SparsitySchedule(at=[2]) if batches is None else None
    return ThanosPruningCallback("2:4", **{"schedule": schedule, **options}, calibration=CalibrationOptions(batches))


def fit(root: Path, *callbacks: Callback, resume: Path | None = None, **settings: Any) -> ToyLM:
    module = ToyLM()
    saves = any(isinstance(callback, Checkpoint) for callback in callbacks)
    settings = {"max_steps": 4, "num_sanity_val_steps": 0, "enable_checkpointing": saves, **settings}
    trainer(root, *callbacks, **settings).fit(module, ResumableBatches(), loader(8), ckpt_path=resume)
    return module


def in_the_last_batch(trainer: Trainer) -> bool:
    return trainer.fit_loop.epoch_loop.val_loop.batch_progress.is_last_batch


@pytest.mark.parametrize(
    ("hook", "when"),
    [
        ("on_validation_batch_start", lambda trainer: True),
        ("on_validation_batch_start", in_the_last_batch),
        ("on_validation_end", lambda trainer: True),
        ("on_sanity_check_end", lambda trainer: True),
        ("on_train_start", lambda trainer: True),
    ],
    ids=["first batch", "last batch", "validated", "sanity", "start"],
)
def test_sigterm_before_the_first_step_leaves_out_the_event(
    hook: str, when: Callable[[Trainer], bool], tmp_path: Path, said: list[str]
) -> None:
    class Counted(ResumableBatches):
        begun = 0

        def __iter__(self) -> Iterator[Any]:
            self.begun += 1
            return super().__iter__()

    batches = Counted(8)
    pruning = once(batches, monitor="val/loss")
    with pytest.raises(SIGTERMException):
        fit(tmp_path, Signals(hook, when=when), pruning, num_sanity_val_steps=1)
    assert batches.begun == 0
    assert not pruning.report.events
    assert said == ["SIGTERM ended the training at step 0: no checkpoint was saved, so the next training begins anew"]


@pytest.mark.parametrize("calibrates", [False, True])
def test_sigterm_in_the_batch_before_an_event_saves_where_lightning_does(
    calibrates: bool, tmp_path: Path, said: list[str]
) -> None:
    def callback() -> ThanosPruningCallback:
        return once(ResumableBatches(8) if calibrates else None, schedule=SparsitySchedule(at=[2]))

    whole = fit(tmp_path / "whole", callback())
    pruning, saving = callback(), ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2)
    signals = Signals("on_before_backward", when=lambda trainer: trainer.global_step == 1)
    with pytest.raises(SIGTERMException):
        fit(tmp_path, signals, pruning, saving)
    assert not pruning.report.events
    saved = tmp_path / "step=2.ckpt"
    assert said == [
        f"SIGTERM ended the training at step 2: to go on, give the newest checkpoint as ckpt_path (--ckpt_path {saved})"
    ]
    resumed = callback()
    gone_on = fit(tmp_path / "resumed", resumed, resume=saved)
    assert [event.step for event in resumed.report.events] == [2]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, gone_on.state_dict()[name]), name


def test_sigterm_saves_on_exception(tmp_path: Path, said: list[str]) -> None:
    pruning, saving = once(), ModelCheckpoint(tmp_path, filename="{step}", save_on_exception=True, save_top_k=0)
    signals = Signals("on_before_backward", when=lambda trainer: trainer.global_step == 1)
    with pytest.raises(SIGTERMException):
        fit(tmp_path, signals, pruning, saving)
    assert said[-1].endswith(f"(--ckpt_path {tmp_path / 'step=2.ckpt'})")
    resumed = once()
    fit(tmp_path, resumed, resume=tmp_path / "step=2.ckpt")
    assert [event.step for event in resumed.report.events] == [2]


@pytest.mark.parametrize(("number", "ends"), [(signal.SIGTERM, Terminated), (signal.SIGINT, SystemExit)])
def test_a_signal_in_an_event_saves_nothing_of_it(
    number: int, ends: type[BaseException], tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    solve = thanos_lightning.event.window.prune_layer

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), number)
        return solve(*args, **kwargs)

    monkeypatch.setattr(thanos_lightning.event.window, "prune_layer", interrupted)
    saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_on_exception=True)
    with pytest.raises(ends):
        fit(tmp_path, once(), saving, OnExceptionCheckpoint(tmp_path))
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["step=1.ckpt"]
    by = "SIGTERM" if number == signal.SIGTERM else "Ctrl-C"
    assert said == [
        f"{by} ended the training at step 2: to go on, give the newest checkpoint as ckpt_path "
        f"(--ckpt_path {tmp_path / 'step=1.ckpt'})"
    ]
    monkeypatch.setattr(thanos_lightning.event.window, "prune_layer", solve)
    resumed = once()
    fit(tmp_path, resumed, resume=tmp_path / "step=1.ckpt")
    assert [event.step for event in resumed.report.events] == [2]


def test_ctrl_c_names_the_checkpoint_that_the_training_went_on_from(tmp_path: Path, said: list[str]) -> None:
    fit(tmp_path, once(), ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3))
    signals = Signals("on_train_batch_start", when=lambda trainer: True, number=signal.SIGINT)
    with pytest.raises(SystemExit):
        fit(tmp_path, once(), signals, resume=tmp_path / "step=3.ckpt")
    assert said == [
        "Ctrl-C ended the training at step 3: to go on, give the newest checkpoint as ckpt_path "
        f"(--ckpt_path {tmp_path / 'step=3.ckpt'})"
    ]


def test_other_ends_say_nothing_of_signals(tmp_path: Path, said: list[str]) -> None:
    class Leaves(Callback):
        def on_train_start(self, *_: Any) -> None:
            raise SystemExit(3)

    with pytest.raises(SystemExit):
        fit(tmp_path, once(), Leaves())
    assert said == []
