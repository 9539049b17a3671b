"""Whole trainings on an accelerator: none mixes devices, they end as on the CPU, the host waits as seldom as told."""

import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from pretend import copies, launches, pretend_trainer, waits
from tiny_mixtures import tiny_mixture
from torch import Tensor
from toy import ResumableBatches, ToyLM, at, grouped, loader, tiny_files, tiny_llama, trainer

from thanos_lightning import SparsitySchedule, ThanosPruningCallback
from thanos_lightning.cli import main
from thanos_lightning.event import window as prune
from thanos_lightning.layers.lora import write_merged
from thanos_lightning.lm import CausalLM, Distillation

LAYERS = 14
WAITS_PER_LAYER = 25  # of an event to 2:4 by the default solver
HALF: dict[str, Any] = {"pattern": "unstructured", "sparsity": 0.5}
PADDED = {"number": 64, "padding": 3}
AT_5: dict[str, Any] = {"schedule": SparsitySchedule(5, 5, 1), "steps": 2}


def fit(make: Any, root: Path, callback: ThanosPruningCallback, *more: Callback, **settings: Any) -> ToyLM:
    torch.manual_seed(0)
    module = ToyLM()
    make(root, callback, *more, **{"max_steps": 8, **settings}).fit(module, loader(**PADDED))
    return module


def pruning(pattern: str = "2:4", sparsity: float | None = None, **options: Any) -> ThanosPruningCallback:
    settings: dict[str, Any] = {"schedule": SparsitySchedule(2, 6, 2), "verify_every_n_steps": 1}
    return ThanosPruningCallback(pattern, sparsity, **grouped(**{**settings, **options}))


def calibrated(**options: Any) -> dict[str, Any]:
    return {"batches": list(loader(12, padding=3)), "schedule": SparsitySchedule(2, 2, 1), **options}


FITS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gradual": ({}, {"accumulate_grad_batches": 2, "gradient_clip_val": 1.0}),
    "a calibration set, allocated": (calibrated(pattern="unstructured", sparsity=0.6), {}),
    "channels in another order": (calibrated(schedule=SparsitySchedule(at=[0])), {}),
    "in windows, allocated": (
        {"pattern": "unstructured", "sparsity": 0.6, "memory_gib": 3e-5, "schedule": SparsitySchedule(6, 6, 1)},
        {},
    ),
    "a calibration set": (calibrated(pattern="2:4"), {}),
    "columns": ({"pattern": "structured", "sparsity": 0.3, "outlier_fraction": 0.1}, {}),
    "channels": ({"pattern": "channels", "sparsity": 0.25, "multiple_of": 4}, {}),
    "a calibration set, channels": (calibrated(pattern="channels", sparsity=0.25, multiple_of=4), {}),
    "bf16": ({}, {"precision": "bf16-true"}),
}


@pytest.mark.parametrize("name", FITS)
def test_a_training_ends_as_on_the_cpu(name: str, tmp_path: Path) -> None:
    options, settings = FITS[name]
    expected, callback = pruning(**options), pruning(**options)
    on_cpu = fit(trainer, tmp_path, expected, **settings)
    there = fit(pretend_trainer, tmp_path, callback, **settings)
    is_low = settings.get("precision") == "bf16-true"
    assert there.losses == pytest.approx(on_cpu.losses, rel=3e-2 if is_low else 1e-3)
    alike = total = 0
    for (name, one), other in zip(on_cpu.named_parameters(), there.parameters(), strict=True):
        if "proj" in name:
            alike += int(((one == 0) == (other.cpu() == 0)).sum())
            total += one.numel()
    assert alike >= (0.97 if is_low else 0.99) * total
    for one, other in zip(expected.report.events, callback.report.events, strict=True):
        assert other.sparsity == pytest.approx(one.sparsity, abs=1e-3)
        assert other.relative_loss == pytest.approx(one.relative_loss, rel=0.2 if is_low else 2e-2)


def test_experts_are_dropped_as_on_the_cpu(tmp_path: Path) -> None:
    gone = []
    for make in (trainer, pretend_trainer):
        torch.manual_seed(0)
        module = ToyLM(tiny_mixture())
        module.model.set_experts_implementation("eager")  # the default counts integers, as no CPU does
        make(tmp_path, pruning("experts", 0.5, schedule=SparsitySchedule(2, 2, 1)), max_steps=4).fit(module, loader())
        experts = [one.detach().cpu() for name, one in module.named_parameters() if name.endswith("experts.down_proj")]
        gone.append([one.flatten(1).any(1).tolist() for one in experts])
    assert gone[0] == gone[1]
    assert all(one.count(False) == len(one) // 2 for one in gone[0])


def test_what_is_solved_waits_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waited = []

    def written(layer: Any, weight: Tensor, keep: Tensor, *rest: Any) -> Tensor:
        waited.append((weight.device.type, keep.device.type))
        return write_merged(layer, weight, keep, *rest)

    monkeypatch.setattr(prune, "write_merged", written)
    fit(pretend_trainer, tmp_path, pruning(**calibrated()))
    assert waited == [("cpu", "cpu")] * LAYERS


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision(precision: str, tmp_path: Path) -> None:
    scaler = torch.amp.GradScaler("pretend", init_scale=2.0**20) if precision == "16-mixed" else None
    callback, plugin = pruning("unstructured", 0.5), MixedPrecision(precision, "pretend", scaler)
    # the first steps overflow in 16 bits
    module = fit(pretend_trainer, tmp_path, callback, max_steps=12, plugins=[plugin])
    assert callback.report.events[-1].sparsity == pytest.approx(0.5, abs=1e-3)
    assert module.losses[-1] < module.losses[0]


def test_a_resumed_training_is_the_one_that_was_never_stopped(tmp_path: Path) -> None:
    ended = []
    for resumed in (False, True):
        torch.manual_seed(0)
        module, callback = ToyLM(), pruning("unstructured", 0.5)
        saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        fitted = pretend_trainer(tmp_path, callback, saving, max_steps=8, enable_checkpointing=True)
        path = tmp_path / "step=5.ckpt" if resumed else None  # inside a window
        fitted.fit(module, ResumableBatches(64), ckpt_path=path)
        ended.append([parameter.detach().cpu() for parameter in module.parameters()])
    torch.testing.assert_close(*ended, rtol=0, atol=0)


def of_steps(counting: Any, root: Path, max_steps: int = 9, **options: Any) -> list[Counter[str]]:
    """Of each step, what the package waited for, launched or copied."""
    each: list[Counter[str]] = []
    with counting() as counted:

        def note(*_: Any) -> None:
            each.append(Counter({line: number for line, number in counted.items() if line != "elsewhere"}))
            counted.clear()

        callback = pruning(**{"verify_every_n_steps": 0, **options})
        fit(pretend_trainer, root, callback, at("on_train_batch_end", note), max_steps=max_steps)
    return each


def test_a_step_masks_a_gradient_and_a_weight_of_each_layer(tmp_path: Path) -> None:
    for one in of_steps(launches, tmp_path, 8, schedule=SparsitySchedule(2, 2, 1))[3:]:
        masking = [number for line, number in one.items() if line.startswith("solver/zeros.py")]
        assert masking == [2 * LAYERS, 2 * LAYERS], one  # what makes bits of the masks, and what applies them
        assert sum(one.values()) - sum(masking) < LAYERS, one


@pytest.mark.parametrize(
    ("counting", "options", "most"),  # in a step of a window, and in the event
    [(waits, {}, (1, WAITS_PER_LAYER * LAYERS)), (waits, HALF, (1, math.inf)), (copies, {}, (math.inf, math.inf))],
    ids=["waits", "waits, unstructured", "copies"],
)
def test_the_host_waits_and_copies_in_windows_only(counting: Any, options: Any, most: Any, tmp_path: Path) -> None:
    by_step = [one.total() for one in of_steps(counting, tmp_path, **options, **AT_5)]
    # the first has what came before; inputs are counted in the steps to 4 and 5, of which the last prunes
    assert [*by_step[1:3], *by_step[5:]] == [0] * 6
    assert by_step[3] <= most[0]
    assert LAYERS <= by_step[4] <= most[1]


def test_verification_waits_once(tmp_path: Path) -> None:
    for one in of_steps(waits, tmp_path, 8, schedule=SparsitySchedule(2, 2, 1), verify_every_n_steps=1)[4:]:
        assert one.total() == 1, one


def test_the_commands_of_the_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["thanos-lightning"])
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    model, text = tiny_files(tmp_path)
    common = [
        *("--model", "CausalLM", "--model.model", model, "--data", "TextData", "--data.dataset", str(text)),
        *("--data.tokenizer", model, "--data.block_size", "16", "--data.batch_size", "4", "--data.max_val_blocks", "4"),
        *("--trainer.strategy", "{class_path: pretend.Pretending}", "--trainer.logger", "false"),
        *("--trainer.inference_mode", "false"),  # for which the accelerator has no tensors
    ]
    pruned = ["--trainer.callbacks+=ThanosPruningCallback", "--trainer.callbacks.calibration.batches=datamodule"]
    assert main(["fit", *common, *pruned, "--trainer.max_steps", "4"]) == 0
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    for command in ("validate", "test"):
        assert main([command, *common, "--ckpt_path", str(checkpoint)]) == 0
    assert main(["verify", str(checkpoint)]) == 0


def test_a_teacher_on_the_accelerator(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "model")
    logged = []
    for make in (trainer, pretend_trainer):
        torch.manual_seed(0)
        lm = CausalLM(str(tmp_path / "model"), lr_schedule="constant", distillation=Distillation())
        fitted = make(tmp_path, pruning(schedule=SparsitySchedule(2, 2, 1)), max_steps=6)
        fitted.fit(lm, loader(**PADDED))
        logged.append({name: float(value) for name, value in fitted.callback_metrics.items()})
    assert logged[0].keys() >= {"train/cross_entropy", "train/logits"}
    assert logged[1] == pytest.approx(logged[0], rel=2e-2)
