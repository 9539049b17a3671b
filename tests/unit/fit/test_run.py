"""SIGTERM and Ctrl-C before, in and after an event of a training that a script starts."""

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
from toy import ResumableBatches, ToyLM, at, loader, trainer

import thanos_lightning.event.window
from thanos_lightning import CalibrationOptions, SparsitySchedule, ThanosPruningCallback
from thanos_lightning.report.progress import Terminated


def signals(hook: str, when: Callable[[Trainer], bool] = bool, number: int = signal.SIGTERM) -> Callback:
    """Sends this process a signal in a hook, the first time that the condition is met (any Trainer is true)."""
    sent: list[int] = []

    def send(trainer: Trainer, *_: Any) -> None:
        if when(trainer) and not sent:
            sent.append(number)
            os.kill(os.getpid(), number)

    return at(hook, send)


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


def check_it_prunes_when_it_goes_on(root: Path, checkpoint: Path) -> None:
    pruning = once()
    fit(root, pruning, resume=checkpoint)
    assert [event.step for event in pruning.report.events] == [2]


def ended(by: str, step: int, checkpoint: Path) -> list[str]:
    mend = f"to go on, give the newest checkpoint as ckpt_path (--ckpt_path {checkpoint})"
    return [f"{by} ended the training at step {step}: {mend}"]


@pytest.mark.parametrize(
    ("hook", "when"),
    [
        ("on_validation_batch_start", bool),
        ("on_validation_batch_start", lambda made: made.fit_loop.epoch_loop.val_loop.batch_progress.is_last_batch),
        ("on_validation_end", bool),
        ("on_sanity_check_end", bool),
        ("on_train_start", bool),
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
        fit(tmp_path, signals(hook, when), pruning, num_sanity_val_steps=1)
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
    pruning, saving = callback(), ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    with pytest.raises(SIGTERMException):
        fit(tmp_path, signals("on_before_backward", lambda made: made.global_step == 1), pruning, saving)
    assert not pruning.report.events
    saved = tmp_path / "step=2.ckpt"
    assert said == ended("SIGTERM", 2, saved)
    resumed = callback()
    gone_on = fit(tmp_path / "resumed", resumed, resume=saved)
    assert [event.step for event in resumed.report.events] == [2]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, gone_on.state_dict()[name]), name


def test_sigterm_saves_on_exception(tmp_path: Path, said: list[str]) -> None:
    pruning, saving = once(), ModelCheckpoint(tmp_path, filename="{step}", save_on_exception=True, save_top_k=0)
    with pytest.raises(SIGTERMException):
        fit(tmp_path, signals("on_before_backward", lambda made: made.global_step == 1), pruning, saving)
    assert said[-1].endswith(f"(--ckpt_path {tmp_path / 'step=2.ckpt'})")
    check_it_prunes_when_it_goes_on(tmp_path, tmp_path / "step=2.ckpt")


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
    assert said == ended("SIGTERM" if number == signal.SIGTERM else "Ctrl-C", 2, tmp_path / "step=1.ckpt")
    monkeypatch.setattr(thanos_lightning.event.window, "prune_layer", solve)
    check_it_prunes_when_it_goes_on(tmp_path, tmp_path / "step=1.ckpt")


def test_ctrl_c_names_the_checkpoint_that_the_training_went_on_from(tmp_path: Path, said: list[str]) -> None:
    fit(tmp_path, once(), ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3))
    interrupting = signals("on_train_batch_start", number=signal.SIGINT)
    with pytest.raises(SystemExit):
        fit(tmp_path, once(), interrupting, resume=tmp_path / "step=3.ckpt")
    assert said == ended("Ctrl-C", 3, tmp_path / "step=3.ckpt")


def test_other_ends_say_nothing_of_signals(tmp_path: Path, said: list[str]) -> None:
    def leave(*_: Any) -> None:
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        fit(tmp_path, once(), at("on_train_start", leave))
    assert said == []
