from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from toy import ResumableBatches, ToyLM, adamw, grouped, loader, trainer

from thanos_lightning import SparsitySchedule, ThanosPruningCallback
from thanos_lightning.fit import run
from thanos_lightning.fit.memory import free_bytes
from thanos_lightning.plan.estimate import Estimate, estimate


def pruning(**options: Any) -> ThanosPruningCallback:
    settings = {"schedule": SparsitySchedule(at=[2, 4]), "batches": list(loader(12)), "block_steps": 0, **options}
    return ThanosPruningCallback("2:4", **grouped(**settings))


def windows(
    callback: ThanosPruningCallback, root: Path, free: int, *more: Callback, resume: Path | None = None
) -> list[list[str]]:
    """The layers of each window of a training that had so many bytes free."""
    found: list[list[str]] = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(run, "free_bytes", lambda *_: {"cpu": free})
        prune_window = run.prune_window

        def pruned(window: Any, *args: Any, **kwargs: Any) -> Any:
            found.append(list(window.patterns))
            return prune_window(window, *args, **kwargs)

        patched.setattr(run, "prune_window", pruned)
        torch.manual_seed(0)
        made = trainer(root, callback, *more, max_steps=6, enable_checkpointing=bool(more))
        made.fit(ToyLM(), ResumableBatches(64), ckpt_path=resume)
    return found


def needed(root: Path) -> int:
    """The bytes of an event in one window."""
    found: list[Estimate] = []

    def kept(*args: Any, **kwargs: Any) -> Estimate:
        found.append(estimate(*args, **kwargs))
        return found[-1]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("thanos_lightning.fit.announce.estimate", kept)
        assert len(windows(pruning(), root, free=2**40)) == 2
    return max(one.event for one in found[0].windows)


def test_windows_follow_the_memory_that_is_free(tmp_path: Path) -> None:
    most = needed(tmp_path)
    assert len(windows(pruning(), tmp_path, free=int(1.12 * most))) == 2
    callback = pruning()
    split = windows(callback, tmp_path, free=int(1.05 * most))  # a tenth stays free
    first = split[: len(split) // 2]
    assert len(split) > 2
    assert {name for window in split for name in window} == {name for window in first for name in window}
    assert callback.report.events[-1].sparsity == 0.5


def test_a_resumed_training_has_the_windows_that_it_began_with(tmp_path: Path) -> None:
    free = int(1.05 * needed(tmp_path))
    saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    whole = windows(pruning(), tmp_path, free, saving)
    rest = windows(pruning(), tmp_path, free=2**40, resume=tmp_path / "step=3.ckpt")
    assert rest == whole[len(whole) // 2 :]


@pytest.mark.parametrize(
    "options", [{}, {"memory_gib": 0.01}, {"batches": None, "steps": 2}], ids=["any", "given", "two steps, two windows"]
)
def test_what_can_not_fit_is_refused_before_the_training(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ToyLM()
    monkeypatch.setattr(run, "free_bytes", lambda *_: {"cpu": 2**14})
    with pytest.raises(MisconfigurationException, match=r"takes about 1 MiB on cpu in (the smallest|its) windows"):
        trainer(tmp_path, pruning(**options), max_steps=6).fit(module, loader())
    assert module.losses == []


@pytest.mark.parametrize(("steps", "counted"), [([0], 0), ([0, 4], 1)])
def test_before_the_first_step_there_is_no_optimizer_state(
    steps: list[int], counted: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[int] = []
    monkeypatch.setattr(run, "free_bytes", lambda *args: given.append(len(args[2])) or {"cpu": 2**40})
    trainer(tmp_path, pruning(schedule=SparsitySchedule(at=steps)), max_steps=1).fit(ToyLM(), loader())
    assert given == [counted]


def test_what_steps_will_take_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**30))
    module = torch.nn.Linear(1000, 1000, bias=False)
    optimizer, device = adamw(module.parameters()), torch.device("cpu")
    assert free_bytes(device, 4, [optimizer]) == {"cpu": 2**28 - 3 * 4_000_000}
    module(torch.ones(1, 1000)).sum().backward()
    optimizer.step()
    assert free_bytes(device, 1, [optimizer]) == {"cpu": 2**30 - 4_000_000}
