"""What only a real GPU tells: kernels, precisions, memory, strategies. `pytest -m cuda`; skipped where there is none.

THANOS_CUDA=dry runs them on the CPU, where what they say of a GPU is not asserted: to see that they run at all.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy, Strategy
from toy import ResumableBatches, ToyLM, at, grouped, loader, tiny_llama, trainer

from thanos_lightning import CPUDeepSpeed, SparsitySchedule, ThanosPruningCallback
from thanos_lightning.checkpoints.verify import verify_checkpoint
from thanos_lightning.fit import announce, run
from thanos_lightning.lm import CausalLM, Distillation
from thanos_lightning.plan.estimate import Estimate
from thanos_lightning.solver import HessianAccumulator, Pattern, PrunedLayer, parse_pattern, prune

DRY = os.environ.get("THANOS_CUDA") == "dry"
ON_GPU = torch.cuda.is_available() and not DRY
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
WIDTH = 4096 if ON_GPU else 64

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not (ON_GPU or DRY), reason="needs a GPU, and runs by: pytest -m cuda"),
]
PATTERNS = {"unstructured": 0.5, "2:4": None, "structured": 0.25}


def pruning(pattern: str = "2:4", **options: Any) -> ThanosPruningCallback:
    settings: dict[str, Any] = {"schedule": SparsitySchedule(2, 6, 2), "verify_every_n_steps": 1}
    return ThanosPruningCallback(pattern, PATTERNS[pattern], **grouped(**{**settings, **options}))


def on_device(root: Path, *callbacks: Callback, **settings: Any) -> Trainer:
    return trainer(root, *callbacks, **{"accelerator": "gpu" if ON_GPU else "cpu", "max_steps": 8, **settings})


def fit(root: Path, *callbacks: Callback, **settings: Any) -> ToyLM:
    torch.manual_seed(0)
    module = ToyLM()
    on_device(root, *callbacks, **settings).fit(module, loader(64, padding=3))
    return module


def zeros(module: ToyLM) -> float:
    weights = [parameter for name, parameter in module.named_parameters() if "proj" in name]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_deterministic_kernels(pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        one, other = (fit(tmp_path, pruning(pattern), deterministic=True) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    for first, second in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(first, second)


def test_what_others_allow_changes_no_result() -> None:
    before, pruned = torch.backends.cuda.matmul.allow_tf32, []
    try:
        for allowed in (False, True):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            pruned.append(of_layer(parse_pattern("2:4"), DEVICE))
            assert torch.backends.cuda.matmul.allow_tf32 == allowed
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert torch.equal(pruned[0].mask, pruned[1].mask)
    torch.testing.assert_close(pruned[0].weight, pruned[1].weight, rtol=0, atol=0)


def of_layer(pattern: Pattern, device: torch.device) -> Any:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2 * WIDTH, WIDTH, generator=generator) @ torch.randn(WIDTH, WIDTH, generator=generator)
    weight = torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5
    accumulator = HessianAccumulator(WIDTH, device=device)
    accumulator.update((inputs / WIDTH**0.5).to(device))
    return prune(weight.to(device), accumulator.compute(), pattern, admm_steps=4, refine_steps=4)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_wide_layer_is_pruned_as_on_the_cpu(pattern: str) -> None:
    parsed = parse_pattern(pattern, PATTERNS[pattern])
    there, here = of_layer(parsed, DEVICE), of_layer(parsed, torch.device("cpu"))
    assert (there.mask.cpu() == here.mask).float().mean() > 0.999
    assert there.relative_loss == pytest.approx(here.relative_loss, rel=1e-3)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_low_precision(precision: str, tmp_path: Path) -> None:
    module = fit(tmp_path, pruning(), precision=precision)
    assert zeros(module) == 0.5
    assert module.losses[-1] < module.losses[0]


def test_half_precision_with_steps_that_overflow(tmp_path: Path) -> None:
    callback = pruning("unstructured")
    module = fit(tmp_path, callback, precision="16-mixed" if ON_GPU else "bf16-mixed", max_steps=16)
    assert zeros(module) == pytest.approx(0.5, abs=1e-3)


def test_gradients_are_those_of_the_loss_under_a_scaler(tmp_path: Path) -> None:
    sparsities = []
    for precision in ("16-mixed" if ON_GPU else "bf16-mixed", "32-true"):
        callback = pruning("unstructured", schedule=SparsitySchedule(3, 3, 1))
        fit(tmp_path, callback, precision=precision)
        sparsities.append({layer.name: layer.sparsity for layer in callback.report.events[0].layers})
    for name, sparsity in sparsities[0].items():
        assert sparsity == pytest.approx(sparsities[1][name], abs=0.05)


def test_the_fused_optimizer_is_masked(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "model")
    lm = CausalLM(str(tmp_path / "model"), lr_schedule="constant", distillation=Distillation())
    callback = pruning()
    fitted = on_device(tmp_path, callback)
    fitted.fit(lm, loader(64))
    assert fitted.optimizers[0].defaults["fused"] is True
    assert callback.report.events[-1].sparsity == 0.5


def sharded(kind: str) -> Strategy:
    if kind == "fsdp":
        return ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1, save_distributed_checkpoint=False)
    strategy = DeepSpeedStrategy(stage=3) if ON_GPU else CPUDeepSpeed(stage=3)
    strategy.config |= {"zero_force_ds_cpu_optimizer": False}
    return strategy


class Sharded(ToyLM):
    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            for block in (*self.model.model.layers, self.model):
                fully_shard(block, mesh=self.device_mesh["data_parallel"])


@pytest.mark.parametrize("kind", ["zero3", "fsdp"])
def test_a_sharding_strategy(kind: str, tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, filename="end", every_n_train_steps=8)
    fitted = on_device(tmp_path, pruning(), saving, strategy=sharded(kind), enable_checkpointing=True)
    fitted.fit(Sharded(), loader(64))
    reports = verify_checkpoint(tmp_path / "end.ckpt")
    assert len(reports) == 14
    assert all(report.ok and report.sparsity == 0.5 for report in reports)


def test_a_resumed_training_is_the_one_that_was_never_stopped(tmp_path: Path) -> None:
    ended = []
    for path in (None, tmp_path / "step=5.ckpt"):
        torch.manual_seed(0)
        module = ToyLM()
        saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        fitted = on_device(tmp_path, pruning("unstructured"), saving, enable_checkpointing=True)
        fitted.fit(module, ResumableBatches(64), ckpt_path=path)
        ended.append(list(module.parameters()))
    for one, other in zip(*ended, strict=True):
        assert torch.equal(one, other)


def warn_of_waits(trainer: Trainer, *_: Any) -> None:
    """Let torch warn of each wait for the GPU from the third step after the last event on."""
    if ON_GPU and trainer.global_step >= 4:
        torch.cuda.set_sync_debug_mode("warn")


def test_no_step_outside_of_windows_waits_for_the_gpu(tmp_path: Path) -> None:
    callback = pruning(schedule=SparsitySchedule(2, 2, 1), verify_every_n_steps=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            fit(tmp_path, callback, at("on_train_batch_end", warn_of_waits), max_steps=7)
        finally:
            if ON_GPU:
                torch.cuda.set_sync_debug_mode("default")
    ours = {
        f"{warning.filename}:{warning.lineno}"
        for warning in caught
        if "synchronizing" in str(warning.message) and "thanos_lightning" in warning.filename
    }
    # the end of the training verifies
    assert {place for place in ours if "enforcement.py" not in place} == set()


class Peaks(Callback):
    """The most memory that training steps take."""

    trained = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if ON_GPU:
            torch.cuda.reset_peak_memory_stats()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if ON_GPU:
            self.trained = max(self.trained, torch.cuda.max_memory_allocated())
            torch.cuda.reset_peak_memory_stats()


class Measured(ToyLM):
    calibrated = 0

    def __init__(self) -> None:
        super().__init__(
            tiny_llama(hidden_size=512, intermediate_size=1024, num_hidden_layers=8) if ON_GPU else tiny_llama()
        )
        self.model.gradient_checkpointing_enable()

    def calibration_step(self, batch: Any) -> Any:
        if ON_GPU:
            self.calibrated = max(self.calibrated, torch.cuda.max_memory_allocated())
            torch.cuda.reset_peak_memory_stats()
        return self(**batch)


def test_a_calibration_takes_no_more_memory_than_a_training_step_and_its_sums(tmp_path: Path) -> None:
    module, peaks = Measured(), Peaks()
    batches = list(loader(16, batch_size=16, length=64))
    callback = pruning("unstructured", batches=batches * 8, schedule=SparsitySchedule(3, 3, 1))
    on_device(tmp_path, peaks, callback, max_steps=5).fit(module, loader(256, batch_size=16, length=64))
    if ON_GPU:
        sums = sum(4 * layer.shape[1] ** 2 + 4 * layer.shape[0] for layer in callback.report.events[0].layers)
        assert 0 < module.calibrated <= 1.2 * (peaks.trained + sums)


def test_an_event_takes_the_memory_that_was_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Estimate] = []
    held, peaks = [], []
    estimate, prune_window = announce.estimate, run.prune_window

    def kept(*args: Any, **kwargs: Any) -> Estimate:
        told.append(estimate(*args, **kwargs))
        return told[-1]

    def measured(*args: Any, **kwargs: Any) -> Any:
        reports = prune_window(*args, **kwargs)
        if ON_GPU:
            peaks.append(torch.cuda.max_memory_allocated())
        return reports

    def begin(trainer: Trainer, *_: Any) -> None:
        """Note what is held where no window is open, and let the peak begin anew before the event."""
        if ON_GPU and trainer.global_step == 1:
            held.append(torch.cuda.memory_allocated())
            torch.cuda.reset_peak_memory_stats()

    monkeypatch.setattr(announce, "estimate", kept)
    monkeypatch.setattr(run, "prune_window", measured)
    module = ToyLM(tiny_llama(hidden_size=1024, intermediate_size=2816, num_attention_heads=16) if ON_GPU else None)
    callback = pruning(schedule=SparsitySchedule(3, 3, 1), steps=1)
    on_device(tmp_path, at("on_train_batch_end", begin), callback, max_steps=4).fit(module, loader(64))
    assert told[0].event > told[0].moments > 0
    if ON_GPU:
        assert peaks[0] - held[0] == pytest.approx(told[0].event, rel=0.2)


def test_seconds_are_those_of_finished_work(tmp_path: Path) -> None:
    callback = pruning(schedule=SparsitySchedule(3, 3, 1))
    fit(tmp_path, callback)
    event = callback.report.events[0]
    assert sum(layer.seconds for layer in event.layers) <= 1.05 * event.solving_seconds
    assert event.seconds <= callback.report.summary.training_seconds


def test_a_model_whose_channels_are_reordered_computes_what_it_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unpruned(weight: torch.Tensor, *_: Any) -> PrunedLayer:
        return PrunedLayer(weight.clone(), torch.ones_like(weight, dtype=torch.bool), 0.0, 0.0)

    monkeypatch.setattr("thanos_lightning.event.window.prune_layer", unpruned)
    batches = list(loader(16))
    model = tiny_llama().eval()
    weight = model.model.layers[1].mlp.down_proj.weight.detach().clone()
    before = model(batches[0]["input_ids"]).logits
    callback = pruning(batches=batches, block_steps=0, schedule=SparsitySchedule(at=[0]))
    fitted = on_device(tmp_path, callback, max_steps=1)
    fitted.fit(ToyLM(model, lambda parameters: torch.optim.SGD(parameters, lr=0.0)), loader())
    model.cpu().eval()
    torch.testing.assert_close(model(batches[0]["input_ids"]).logits, before, rtol=1e-3, atol=1e-3)
    assert not torch.equal(model.model.layers[1].mlp.down_proj.weight, weight)
