from __future__ import annotations

import copy
import inspect
import json
import math
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from toy import ResumableBatches, Sequences, ToyLM, adamw, grouped, loader, momentum_sgd, tiny_gpt2, tiny_llama, trainer

from thanos_lightning import SparsitySchedule, TargetOverride, ThanosPruningCallback
from thanos_lightning.calibration.collector import Collector
from thanos_lightning.plan.allocation import Allocation
from thanos_lightning.sharding.masks import LayerMask
from thanos_lightning.sharding.together import PruningError
from thanos_lightning.solver import NM, Unstructured
from thanos_lightning.training.enforcement import ZeroViolationError


@pytest.fixture(autouse=True)
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The solver's own tests check shapes; here that would take a third of the time."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


UNLABELLED = [{name: value for name, value in batch.items() if name != "labels"} for batch in loader(8)]


def pruning(pattern: str = "2:4", sparsity: float | None = None, **kwargs: Any) -> ThanosPruningCallback:
    settings: dict[str, Any] = {"schedule": SparsitySchedule(2, 6, 2)}
    if "batches" not in kwargs:
        settings["steps"] = 2
    return ThanosPruningCallback(pattern, sparsity, **grouped(**{**settings, **kwargs}))


def masks(callback: ThanosPruningCallback) -> dict[str, LayerMask]:
    return {name: LayerMask.from_state(state) for name, state in callback.state_dict()["masks"].items()}


class ZeroProbe(Callback):
    """After every batch, counts by its own means what is not exactly +0 under the masks: weights, moments, norm."""

    def __init__(self, callback: ThanosPruningCallback) -> None:
        self.callback = callback
        self.checked = 0
        self.sparsities: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        parameters = dict(pl_module.named_parameters())
        found = masks(self.callback)
        for name, mask in found.items():
            drop = ~(mask.keep.T if mask.transposed else mask.keep)
            tensors = [parameters[name].detach()]
            for optimizer in trainer.optimizers:
                state = optimizer.state.get(parameters[name], {})
                tensors += [value for value in state.values() if value.shape == drop.shape]
            for tensor in tensors:
                assert not torch.any(tensor[drop] != 0), name
                assert not torch.any(torch.signbit(tensor[drop])), name
                self.checked += 1
        if found:
            pruned = sum(int((~mask.keep).sum()) for mask in found.values())
            self.sparsities.append(pruned / sum(mask.keep.numel() for mask in found.values()))


# Zeros that hold


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("make_optimizer", [adamw, momentum_sgd])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_zeros_hold_after_every_step(
    tmp_path: Path, precision: str, make_optimizer: Callable[[Any], Any], accumulate: int
) -> None:
    callback = pruning()
    probe = ZeroProbe(callback)
    module = ToyLM(make_optimizer=make_optimizer)
    trainer(
        tmp_path,
        callback,
        probe,
        max_steps=16,
        precision=precision,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=0.5,
    ).fit(module, loader(4 * 16 * accumulate))
    tensors = 14 * (2 if make_optimizer is momentum_sgd else 3)
    assert probe.checked >= 10 * accumulate * tensors
    assert probe.sparsities[0] == pytest.approx(0.4375)
    assert probe.sparsities[-1] == 0.5
    for name, mask in masks(callback).items():
        assert mask.pattern == NM(2, 4)
        weight = dict(module.named_parameters())[name]
        assert weight.unflatten(1, (-1, 4)).ne(0).sum(-1).max() == 2
    assert module.losses[-1] < module.losses[0]


@pytest.mark.parametrize(
    ("pattern", "sparsity", "outliers"),
    [("unstructured", 0.6, None), ("structured", 0.25, 0.1), ("4:8", None, 0.125), ("1:4", None, None)],
)
@pytest.mark.parametrize("method", ["thanos", "sparsegpt", "wanda", "magnitude"])
def test_every_pattern_and_method_on_conv1d(
    tmp_path: Path, pattern: str, sparsity: float | None, outliers: float | None, method: Any
) -> None:
    callback = pruning(pattern, sparsity, outlier_fraction=outliers, method=method)
    probe = ZeroProbe(callback)
    trainer(tmp_path, callback, probe, max_steps=8).fit(ToyLM(tiny_gpt2()), loader(32))
    assert probe.checked
    for mask in masks(callback).values():
        assert mask.transposed
        assert mask.pattern.violations(mask.keep) == 0
        assert mask.sparsity == pytest.approx(mask.pattern.sparsity, abs=0.05)


def test_masks_are_nested(tmp_path: Path) -> None:
    class Keep(Callback):
        def __init__(self, callback: ThanosPruningCallback) -> None:
            self.callback = callback
            self.seen: list[dict[str, LayerMask]] = []

        def on_train_batch_end(self, *_: Any) -> None:
            self.seen.append(masks(self.callback))

    callback = pruning("unstructured", 0.7, schedule=SparsitySchedule(0, 8, 2), steps=1)
    keep = Keep(callback)
    trainer(tmp_path, callback, keep, max_steps=9).fit(ToyLM(), loader())
    events = 0
    for before, after in zip(keep.seen, keep.seen[1:], strict=False):
        for name, mask in before.items():
            assert not torch.any(after[name].keep & ~mask.keep)
            events += int((mask.keep & ~after[name].keep).any())
    assert events >= 3 * 14


def test_clipping_sees_the_sparse_norm(tmp_path: Path) -> None:
    class Clipping(ToyLM):
        checked = 0

        def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
            parameters = dict(self.named_parameters())
            for name, mask in masks(callback).items():
                assert not torch.any(parameters[name].grad[~mask.keep])
                self.checked += 1
            super().configure_gradient_clipping(optimizer, *args, **kwargs)

    callback = pruning()
    module = Clipping()
    trainer(tmp_path, callback, max_steps=10, gradient_clip_val=0.1).fit(module, loader(40))
    assert module.checked >= 14 * 4


@pytest.mark.parametrize("value", [1e-30, -0.0])
def test_a_zero_that_comes_back_is_an_error(tmp_path: Path, value: float) -> None:
    class Refill(Callback):
        def on_train_batch_end(
            self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            if batch_idx == 8:
                with torch.no_grad():
                    weight = pl_module.model.model.layers[1].mlp.up_proj.weight
                    weight[weight == 0] = value

    callback = pruning(verify_every_n_steps=3)
    with pytest.raises(ZeroViolationError, match=r"768 of 768 .*layers\.1\.mlp\.up_proj\.weight \(weight\)"):
        trainer(tmp_path, Refill(), callback, max_steps=12).fit(ToyLM(), loader(64))


def test_an_optimizer_that_moves_moments_without_a_gradient_is_refused_at_once(tmp_path: Path) -> None:
    module, callback = ToyLM(make_optimizer=torch.optim.Adamax), pruning(schedule=SparsitySchedule(2, 2, 1))
    with pytest.raises(ZeroViolationError, match=r"\(exp_inf\).* or Adamax moves moments whose gradients are 0"):
        trainer(tmp_path, callback, max_steps=12).fit(module, loader(64))
    assert callback.state_dict()["optimizer_steps"] == 3


def test_fp16_steps_that_are_skipped_do_not_count(tmp_path: Path) -> None:
    callback = pruning(schedule=SparsitySchedule(2, 2, 1))
    probe = ZeroProbe(callback)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    module = ToyLM()
    trainer(tmp_path, callback, probe, max_steps=60, plugins=[plugin]).fit(module, loader(512))
    skipped = 60 - callback.state_dict()["optimizer_steps"]
    assert skipped > 5, "no step was skipped: the test shows nothing"
    assert probe.checked
    assert module.losses[-1] < module.losses[0]


def test_a_write_after_the_training_is_found(tmp_path: Path) -> None:
    class Late(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            with torch.no_grad():
                pl_module.model.model.layers[0].mlp.up_proj.weight.fill_(1.0)

    with pytest.raises(ZeroViolationError, match="up_proj"):
        trainer(tmp_path, pruning(), Late(), max_steps=8).fit(ToyLM(), loader(64))


def test_fused_steps_that_are_skipped_do_not_count(tmp_path: Path) -> None:
    callback = pruning(schedule=SparsitySchedule(2, 2, 1))
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**60))
    module = ToyLM(make_optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, fused=True))
    fitted = trainer(tmp_path, callback, max_steps=60, plugins=[plugin])
    fitted.fit(module, loader(512))
    (stepped,) = {int(state["step"]) for state in fitted.optimizers[0].state.values()}
    assert 0 < stepped < 55, "no step was skipped: the test shows nothing"
    assert callback.state_dict()["optimizer_steps"] == stepped


# Steps


def test_steps_are_optimizer_steps(tmp_path: Path) -> None:
    class Batches(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if masks(callback) and not hasattr(self, "first"):
                self.first = batch_idx

    callback = pruning(schedule=SparsitySchedule(4, 4, 1))
    batches = Batches()
    trainer(tmp_path, callback, batches, max_steps=6, accumulate_grad_batches=3).fit(ToyLM(), loader(96))
    assert batches.first == 4 * 3 - 1
    assert callback.report.events[0].step == 4


def test_statistics_cover_the_steps_before_the_event(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = spy_tokens(monkeypatch)
    callback = pruning(schedule=SparsitySchedule(4, 4, 1), steps=2)
    module = ToyLM()
    trainer(tmp_path, callback, max_steps=5, accumulate_grad_batches=3).fit(module, loader(96, padding=4))
    assert tokens == [{2 * 3 * 4 * 12}]


def spy_tokens(monkeypatch: pytest.MonkeyPatch) -> list[set[int]]:
    """The numbers of tokens that each window's statistics hold when it is pruned."""
    import thanos_lightning.events.run as room

    seen: list[set[int]] = []
    real = room.prune_window

    def prune_window(window: Any, layers: Any, moments: Any, **kwargs: Any) -> Any:
        seen.append({accumulator.num_tokens for accumulator in moments.accumulators.values()})
        return real(window, layers, moments, **kwargs)

    monkeypatch.setattr(room, "prune_window", prune_window)
    return seen


def spy_output_weights(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """The output weights of each window."""
    import thanos_lightning.events.run as room

    seen: list[dict[str, torch.Tensor]] = []
    real = room.prune_window

    def prune_window(window: Any, layers: Any, moments: Any, **kwargs: Any) -> Any:
        seen.append({name: weights.clone() for name, weights in moments.output_weights.items()})
        return real(window, layers, moments, **kwargs)

    monkeypatch.setattr(room, "prune_window", prune_window)
    return seen


class OutputGradientsOfEachBatch(Callback):
    """Sums of the squared gradients at the outputs of all Linear layers, by autograd, of a copy of the model."""

    def __init__(self) -> None:
        self.batches: list[dict[str, torch.Tensor]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        model = copy.deepcopy(pl_module.model).requires_grad_(True)
        found: dict[str, torch.Tensor] = {}
        outputs: dict[str, torch.Tensor] = {}
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                module.register_forward_hook(lambda _, __, out, name=name: outputs.__setitem__(f"model.{name}", out))
        loss = model(**batch).loss
        for name, gradient in zip(outputs, torch.autograd.grad(loss, list(outputs.values())), strict=True):
            found[name] = gradient.flatten(end_dim=-2).square().sum(0)
        self.batches.append(found)


def test_errors_count_as_much_as_the_training_loss_feels_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = spy_output_weights(monkeypatch)
    probe = OutputGradientsOfEachBatch()
    callback = pruning("unstructured", 0.5, schedule=SparsitySchedule(at=[3, 6]), allocation=Allocation("uniform"))
    trainer(tmp_path, callback, probe, max_steps=8).fit(ToyLM(), loader(64, padding=4), loader(8))
    assert len(seen) == 2
    for weights, of_steps in zip(seen, ((1, 2), (4, 5)), strict=True):
        for name in masks(callback):
            layer = name.removesuffix(".weight")
            total = sum(probe.batches[step][layer] for step in of_steps)
            expected = (total + 0.01 * total.mean()) / 2
            torch.testing.assert_close(weights[layer], expected, rtol=1e-4, atol=1e-12)

    for options in ({"method": "sparsegpt"}, {"output_weights": "uniform"}):
        plain = pruning("unstructured", 0.5, schedule=SparsitySchedule(3, 3, 1), **options)
        trainer(tmp_path, plain, max_steps=4).fit(ToyLM(), loader(64))
        assert seen.pop() == {}
    pruning_rows = pruning("2:4", schedule=SparsitySchedule(3, 3, 1))  # of which none competes with another
    trainer(tmp_path, pruning_rows, max_steps=4).fit(ToyLM(), loader(64))
    assert seen.pop() == {}


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_on_calibration_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, frozen: bool) -> None:
    seen = spy_output_weights(monkeypatch)
    module, given = ToyLM(), list(loader(36, padding=3))
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(not frozen or "layers.1" in name)
    probe = OutputGradientsOfEachBatch()
    for batch in given[::4]:  # three of them, and all have inputs that count
        probe.on_train_batch_start(None, module, batch, 0)  # type: ignore[arg-type]
    before = {name: parameter.clone() for name, parameter in module.named_parameters()}
    callback = pruning("unstructured", 0.5, schedule=SparsitySchedule(0, 0, 1), batches=given, targets="*layers*")

    class StopBeforeStep(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            assert all(parameter.grad is None for parameter in pl_module.parameters())
            kept = {name: mask.keep for name, mask in masks(callback).items()}
            assert all(
                torch.equal(parameter, before[name])
                for name, parameter in pl_module.named_parameters()
                if name not in kept
            )

    trainer(tmp_path, callback, StopBeforeStep(), max_steps=1).fit(module, loader(64))
    assert len(seen) == 1
    for layer, weights in seen[0].items():
        total = sum(batch[layer] for batch in probe.batches)
        torch.testing.assert_close(weights, total + 0.01 * total.mean(), rtol=1e-4, atol=1e-12)
    assert len(seen[0]) == 14


def test_calibration_batches_without_a_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"schedule": SparsitySchedule(0, 0, 1), "batches": UNLABELLED}
    with pytest.warns(UserWarning, match="the module returns no loss for a calibration batch: give the batches labels"):
        trainer(tmp_path, pruning("unstructured", 0.5, **options), max_steps=1).fit(ToyLM(), loader(64))
    asked = pruning("unstructured", 0.5, output_weights="diagonal", **options)
    with pytest.raises(
        MisconfigurationException, match=r"returns no loss \(CausalLMOutputWithPast\): give the batches"
    ):
        trainer(tmp_path, asked, max_steps=1).fit(ToyLM(), loader(64))


class Manual(ToyLM):
    automatic_optimization = False

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        raise AssertionError("the training has begun")


class Broken(ToyLM):
    def forward(self, **batch: Tensor) -> Any:
        return self.model(batch["pixels"])


@pytest.mark.parametrize(
    ("module", "batches", "words"),
    [
        (ToyLM, UNLABELLED, r"returns no loss \(CausalLMOutputWithPast\): give the batches labels"),
        (
            ToyLM,
            DataLoader([{"input_ids": torch.arange(8)}] * 2, batch_size=2),
            r"returns no loss \(CausalLMOutputWithPast\): give the batches",
        ),
        (
            Broken,
            UNLABELLED,
            r"a calibration batch is a dict, on which forward\(\*\*batch\) of Broken fails \(KeyError",
        ),
        (
            Manual,
            [(torch.zeros(2, 8, dtype=torch.int64),)],
            "is a tuple, which goes through training_step, but under man",
        ),
    ],
)
def test_batches_that_a_later_event_would_refuse_are_refused_before_the_first_step(
    tmp_path: Path, module: type[ToyLM], batches: Any, words: str
) -> None:
    lm = module()
    asked = pruning("unstructured", 0.5, output_weights="diagonal", schedule=SparsitySchedule(at=[2]), batches=batches)
    with pytest.raises(MisconfigurationException, match=words):
        trainer(tmp_path, asked, max_steps=3).fit(lm, loader(64))
    assert lm.losses == []


def test_looking_at_a_batch_changes_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(batches: Any) -> ToyLM:
        torch.manual_seed(3)
        lm = ToyLM(tiny_llama(attention_dropout=0.5))
        callback = pruning(schedule=SparsitySchedule(at=[2]), batches=batches)
        trainer(tmp_path, callback, max_steps=4).fit(lm, DataLoader(Sequences(16), batch_size=4, shuffle=True))
        return lm

    def shuffled() -> Any:
        return DataLoader(Sequences(8), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(4))

    looked = trained(shuffled())
    monkeypatch.setattr(Collector, "try_batch", lambda *_, **__: None)
    assert looked.losses == trained(shuffled()).losses


def test_layers_that_no_gradient_reaches_count_their_outputs_alike(tmp_path: Path) -> None:
    module = ToyLM()
    for name, parameter in module.named_parameters():
        parameter.requires_grad_("layers.1" in name)
    callback = pruning("unstructured", 0.5, targets="*layers*", schedule=SparsitySchedule(3, 3, 1))
    with pytest.warns(UserWarning, match=r"no gradient has reached the outputs of 7 layer\(s\), such as model.model"):
        trainer(tmp_path, callback, max_steps=5).fit(module, loader(64))
    sparsities = {name: mask.sparsity for name, mask in masks(callback).items()}
    assert {sparsity for name, sparsity in sparsities.items() if "layers.0" in name} == {0.5}
    assert len({sparsity for name, sparsity in sparsities.items() if "layers.1" in name}) > 1  # these are allocated


def test_validation_and_checkpointing_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = spy_tokens(monkeypatch)
    model = tiny_llama()
    model.gradient_checkpointing_enable()
    callback = pruning(schedule=SparsitySchedule(3, 3, 1), steps=3)
    trainer(
        tmp_path, callback, max_steps=4, num_sanity_val_steps=2, val_check_interval=1, check_val_every_n_epoch=None
    ).fit(ToyLM(model), loader(), loader(8))
    assert tokens == [{3 * 4 * 16}]


def test_what_others_run_after_the_training_step_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Sample(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            with torch.no_grad():
                pl_module(input_ids=torch.zeros(1, 5, dtype=torch.long))

    tokens = spy_tokens(monkeypatch)
    callback = pruning(schedule=SparsitySchedule(3, 3, 1), steps=3)
    trainer(tmp_path, Sample(), callback, max_steps=4).fit(ToyLM(), loader(padding=4))
    assert tokens == [{3 * 4 * 12}]


def test_batches_without_a_mask_are_said(tmp_path: Path) -> None:
    batches = [{"input_ids": tokens, "labels": tokens} for tokens in Sequences(64).tokens.split(4)]
    with pytest.warns(UserWarning, match="no 'attention_mask', so every token counts") as caught:
        trainer(tmp_path, pruning(), max_steps=8).fit(ToyLM(), DataLoader(batches, batch_size=None))
    assert sum("every token counts" in str(warning.message) for warning in caught) == 1


@pytest.mark.parametrize("schedule", [SparsitySchedule(0.1, 0.5, 0.1), SparsitySchedule(100, 200, 50)])
def test_fast_dev_run_prunes_once(tmp_path: Path, schedule: SparsitySchedule) -> None:
    callback = pruning(schedule=schedule)
    trainer(tmp_path, callback, max_steps=50, fast_dev_run=2).fit(ToyLM(), loader(64), loader(8))
    assert [event.step for event in callback.report.events] == [2]


def test_steps_across_epochs_with_a_partial_accumulation(tmp_path: Path) -> None:
    """Five batches an epoch, accumulation 2: Lightning steps three times an epoch."""
    callback = pruning(schedule=SparsitySchedule(0.2, 0.6, 0.2))
    probe = ZeroProbe(callback)
    fitted = trainer(tmp_path, callback, probe, max_epochs=5, accumulate_grad_batches=2, limit_train_batches=5)
    fitted.fit(ToyLM(), loader(64))
    assert callback.state_dict()["optimizer_steps"] == fitted.global_step == 15
    assert [event.step for event in callback.report.events] == [6, 9]
    assert probe.checked


def test_hooks_exist_only_while_collecting(tmp_path: Path) -> None:
    class Hooks(Callback):
        def __init__(self) -> None:
            self.seen: list[bool] = []

        def on_train_batch_start(self, trainer: Any, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
            self.seen.append(any(module._forward_pre_hooks for module in pl_module.modules()))

    hooks = Hooks()
    callback = pruning(schedule=SparsitySchedule(4, 8, 4), steps=2)
    module = ToyLM()
    fitted = trainer(tmp_path, callback, hooks, max_steps=10)
    fitted.fit(module, loader(64))
    #                 0      1      2     3     4      5      6     7     8      9
    assert hooks.seen == [False] * 6 + [True] * 2 + [False] * 2
    assert not any(optimizer._optimizer_step_post_hooks for optimizer in fitted.optimizers)


def test_windows_are_collected_after_the_ones_before_are_pruned(tmp_path: Path) -> None:
    class Pruned(Callback):
        def __init__(self) -> None:
            self.seen: list[int] = []

        def on_train_batch_end(self, *_: Any) -> None:
            self.seen.append(len(masks(callback)))

    # two windows of up to 7 layers: 6 of 32 inputs and one of 48
    budget = 4 * (6 * 32**2 + 48**2) / 2**30
    callback = pruning(schedule=SparsitySchedule(6, 6, 1), steps=2, memory_gib=budget)
    pruned = Pruned()
    trainer(tmp_path, callback, pruned, max_steps=8).fit(ToyLM(), loader(64))
    assert pruned.seen == [0, 0, 0, 7, 7, 14, 14, 14]
    assert [len(event.layers) for event in callback.report.events] == [14]


# Optimizers and parameters


class Manual(ToyLM):
    """Two optimizers, stepped alternately, each with half of the layers, and clipping by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.dense_gradients = 0

    def configure_optimizers(self) -> Any:
        first, second = self.model.model.layers
        rest = [p for n, p in self.named_parameters() if ".layers." not in n]
        return adamw([*first.parameters(), *rest]), momentum_sgd(second.parameters())

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        for optimizer in self.optimizers():
            loss = self(**batch).loss
            optimizer.zero_grad()
            self.manual_backward(loss)
            parameters = dict(self.named_parameters())
            for name, mask in masks(self.callback).items():
                gradient = parameters[name].grad
                if gradient is not None:
                    self.dense_gradients += int(gradient[~mask.keep].count_nonzero())
            self.clip_gradients(optimizer, 0.1, "norm")
            optimizer.step()
        self.losses.append(loss.item())


def test_manual_optimization_with_two_optimizers(tmp_path: Path) -> None:
    callback = pruning(schedule=SparsitySchedule(2, 6, 2))
    probe = ZeroProbe(callback)
    module = Manual()
    module.callback = callback
    trainer(tmp_path, callback, probe, max_steps=32).fit(module, loader(64))
    assert callback.state_dict()["optimizer_steps"] == 16
    assert probe.checked >= 10 * 14 * 2
    assert module.dense_gradients == 0
    assert module.losses[-1] < module.losses[0]


def test_fractions_under_manual_optimization_are_refused(tmp_path: Path) -> None:
    module = Manual()
    with pytest.raises(MisconfigurationException, match="under manual optimization the number"):
        trainer(tmp_path, pruning(schedule=SparsitySchedule(0.1, 0.5, 0.1)), max_steps=32).fit(module, loader())


def test_frozen_parameters_are_pruned_and_stay(tmp_path: Path) -> None:
    model = tiny_llama()
    model.model.layers[0].requires_grad_(False)
    module = ToyLM(model, lambda parameters: adamw([p for p in parameters if p.requires_grad]))
    callback = pruning()
    probe = ZeroProbe(callback)
    trainer(tmp_path, callback, probe, max_steps=10).fit(module, loader(64))
    weight = model.model.layers[0].mlp.up_proj.weight
    assert weight.unflatten(1, (-1, 4)).ne(0).sum(-1).max() == 2
    assert probe.checked


def test_the_rows_of_a_gradual_pattern(tmp_path: Path) -> None:
    by_rows = pruning()
    trainer(tmp_path, by_rows, max_steps=8).fit(ToyLM(), loader(64))
    first, last = by_rows.report.events
    assert {layer.sparsity for layer in first.layers} == {0.4375}
    assert {layer.sparsity for layer in last.layers} == {0.5}


def test_overrides(tmp_path: Path) -> None:
    callback = pruning(overrides=[TargetOverride(["*.down_proj"], "unstructured", 0.75)])
    trainer(tmp_path, callback, max_steps=8).fit(ToyLM(), loader(64))
    found = masks(callback)
    assert found["model.model.layers.0.mlp.down_proj.weight"].pattern == Unstructured(0.75)
    assert found["model.model.layers.0.mlp.down_proj.weight"].sparsity == 0.75
    assert found["model.model.layers.0.mlp.up_proj.weight"].pattern == NM(2, 4)


def test_a_calibration_set_instead_of_training_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = spy_tokens(monkeypatch)
    callback = pruning(schedule=SparsitySchedule(0, 0, 1), batches=loader(12))
    module = ToyLM()
    module.train()
    trainer(tmp_path, callback, max_steps=2).fit(module, loader())
    assert tokens == [{12 * 16}]
    assert callback.report.events[0].step == 0
    assert module.model.training


def test_an_event_before_the_first_step_is_measured(tmp_path: Path) -> None:
    callback = pruning(schedule=SparsitySchedule(0, 0, 1), batches=loader(12), monitor="val/loss")
    module = ToyLM()
    trainer(tmp_path, callback, max_steps=6).fit(module, loader(), loader(8))
    summary = callback.report.summary
    assert summary.dense is not None
    assert summary.recovered < summary.pruned
    assert len(module.losses) == 6


def test_a_calibration_set_from_the_module(tmp_path: Path) -> None:
    class WithSet(ToyLM):
        def calibration_dataloader(self) -> Any:
            return loader(8)

    callback = pruning(batches="datamodule")
    trainer(tmp_path, callback, max_steps=8).fit(WithSet(), loader(64))
    assert len(callback.report.events) == 2
    module = ToyLM()
    with pytest.raises(MisconfigurationException, match="neither the datamodule nor the LightningModule"):
        trainer(tmp_path, pruning(batches="datamodule"), max_steps=8).fit(module, loader(64))
    assert module.losses == []  # said before the training


@pytest.mark.filterwarnings("ignore:Total length of")
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "the training dataloader has no batch, so nothing was trained or pruned: give one that isn't empty"),
        ({"limit_train_batches": 0}, "limit_train_batches is 0, so nothing was trained or pruned"),
        ({"max_steps": 0}, "max_steps is 0, so nothing"),
        ({"max_steps": -1, "max_epochs": 0}, "max_epochs is 0, so nothing"),
    ],
)
def test_a_training_without_a_step_is_no_success(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    batches: DataLoader[Any] = loader(8) if settings else DataLoader([])  # type: ignore[arg-type]
    with pytest.raises(MisconfigurationException, match=words):
        trainer(tmp_path, pruning(), **{"max_steps": 8, **settings}).fit(ToyLM(), batches)


# What is left behind


def test_report_metrics_and_summary(tmp_path: Path) -> None:
    callback = pruning(monitor="val/loss")
    saved, stopping = (
        ModelCheckpoint(tmp_path, monitor="val/loss", save_top_k=-1),
        EarlyStopping("val/loss", patience=0),
    )
    logger = CSVLogger(tmp_path)
    trainer(
        tmp_path,
        callback,
        saved,
        stopping,
        max_steps=12,
        logger=logger,
        log_every_n_steps=1,
        check_val_every_n_epoch=None,
        val_check_interval=100,
        enable_checkpointing=True,
    ).fit(ToyLM(), loader(64), loader(8))
    assert list(tmp_path.glob("*.ckpt")) == [], "the callback's own validations saved a checkpoint"
    report = json.loads((tmp_path / "pruning_report.json").read_text())
    assert [event["step"] for event in report["events"]] == [4, 6]
    assert report["events"][1]["target"] == 0.5
    assert set(report["events"][0]["layers"][0]) >= {"name", "shape", "sparsity", "loss", "relative_loss", "seconds"}
    summary = report["summary"]
    assert summary["metric"] == "val/loss"
    assert 0 < summary["recovered"] < summary["pruned"]
    assert summary["dense"] > 0
    metrics = (Path(logger.log_dir) / "metrics.csv").read_text()
    header, *rows = (line.split(",") for line in metrics.splitlines())
    assert {"sparsity/total", "sparsity/target", "pruning/relative_loss", "pruning/step"} <= set(header)
    total = [float(row[header.index("sparsity/total")]) for row in rows if row[header.index("sparsity/total")]]
    assert total == sorted(total)
    assert total[-1] == 0.5


def test_a_report_that_can_not_be_written_ends_no_training(tmp_path: Path) -> None:
    (tmp_path / "pruning_report.json").mkdir()
    module = ToyLM()
    with pytest.warns(UserWarning, match="the report could not be written to"):
        trainer(tmp_path, pruning(), max_steps=8).fit(module, loader(64))
    assert len(module.losses) == 8


def test_the_measured_values_are_those_of_the_weights(tmp_path: Path) -> None:
    """Dense is measured before the first write, pruned after the last one: by an independent evaluation."""
    module = ToyLM()
    values: list[float] = []
    dense: list[float] = []

    class EvaluateFirst(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            if len(dense) < 4:
                evaluate.on_train_batch_end()
                dense.append(values.pop())

    class Evaluate(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            with torch.no_grad():
                module.eval()
                values.append(sum(module(**batch).loss.item() for batch in loader(8)) / 2)
                module.train()

    evaluate = Evaluate()
    callback = pruning(monitor="val/loss", schedule=SparsitySchedule(4, 4, 1))
    trainer(tmp_path, EvaluateFirst(), callback, evaluate, max_steps=6).fit(module, loader(64), loader(8))
    summary = callback.report.summary
    assert summary.pruned == pytest.approx(values[3], rel=1e-5)
    assert summary.recovered == pytest.approx(values[5], rel=1e-5)
    assert summary.dense == pytest.approx(dense[3], rel=1e-5)
    assert summary.dense != pytest.approx(values[3], rel=1e-4)


# State


def straight_and_resumed(
    tmp_path: Path, stop: int, build: Callable[[], ThanosPruningCallback], **kwargs: Any
) -> tuple[ToyLM, ToyLM, ThanosPruningCallback, ThanosPruningCallback]:
    """One run of 12 steps, and the same one killed after some steps and resumed from its last checkpoint."""

    class KilledError(Exception):
        pass

    class Kill(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == stop:
                raise KilledError

    straight, straight_pruning = ToyLM(), build()
    trainer(tmp_path / "straight", straight_pruning, max_steps=12, **kwargs).fit(straight, ResumableBatches())
    every_step = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    with pytest.raises(KilledError):
        trainer(tmp_path / "first", build(), Kill(), every_step, max_steps=12, enable_checkpointing=True, **kwargs).fit(
            ToyLM(), ResumableBatches()
        )
    resumed, resumed_pruning = ToyLM(tiny_llama(seed=99)), build()
    trainer(tmp_path / "resumed", resumed_pruning, max_steps=12, **kwargs).fit(
        resumed, ResumableBatches(), ckpt_path=tmp_path / f"step={stop}.ckpt"
    )
    return straight, resumed, straight_pruning, resumed_pruning


@pytest.mark.parametrize("stop", [1, 2, 4, 5, 6, 8, 9, 10])
def test_resumed_training_is_bit_identical(tmp_path: Path, stop: int) -> None:
    """Windows of three steps end at 5 and 9: 4 and 8 lie inside, 5 and 9 at, 1, 2 and 6 before an event, 10 after."""

    def build() -> ThanosPruningCallback:
        return pruning("unstructured", 0.6, schedule=SparsitySchedule(1, 9, 4), steps=3)

    straight, resumed, one, other = straight_and_resumed(tmp_path, stop, build)
    for (name, a), b in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert resumed.losses == straight.losses[stop:]
    assert [event.step for event in other.report.events] == [event.step for event in one.report.events] == [5, 9]
    for name, mask in masks(one).items():
        assert torch.equal(mask.keep, masks(other)[name].keep)


def test_resume_inside_windows_under_a_memory_budget(tmp_path: Path) -> None:
    budget = 4 * (6 * 32**2 + 48**2) / 2**30

    def build() -> ThanosPruningCallback:
        return pruning(schedule=SparsitySchedule(9, 9, 1), steps=4, memory_gib=budget)

    straight, resumed, _, _ = straight_and_resumed(tmp_path, 6, build)
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_state_is_plain_and_small(tmp_path: Path) -> None:
    callback = pruning()
    fitted = trainer(tmp_path, callback, max_steps=8)
    fitted.fit(ToyLM(), loader(64))
    fitted.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    state = checkpoint["callbacks"]["ThanosPruningCallback"]
    bits = sum(mask["bits"].numel() for mask in state["masks"].values())
    assert bits == sum(layer.rows * layer.cols for layer in callback._layers.values()) / 8
    assert checkpoint["thanos_lightning"]["model_prefix"] == "model."
    assert checkpoint["thanos_lightning"]["architecture"] == "LlamaForCausalLM"


def test_a_second_fit_of_the_same_trainer_goes_on(tmp_path: Path) -> None:
    callback = pruning(schedule=SparsitySchedule(at=[3, 7]), steps=3)
    fitted, module = trainer(tmp_path, callback, max_steps=5), ToyLM()
    with pytest.warns(UserWarning, match="final sparsity"):
        fitted.fit(module, ResumableBatches())
    assert len(callback.state_dict()["collected"]) == 1
    fitted.fit_loop.epoch_loop.max_steps = 10
    fitted.fit(module, ResumableBatches())
    assert [event.step for event in callback.report.events] == [3, 7]


def test_a_new_callback_keeps_the_zeros_that_it_finds(tmp_path: Path) -> None:
    module = ToyLM()
    trainer(tmp_path, pruning(schedule=SparsitySchedule(1, 1, 1)), max_steps=1).fit(module, loader(64))
    before = {name: parameter == 0 for name, parameter in module.named_parameters()}
    callback = pruning(schedule=SparsitySchedule(at=[3, 6]))  # which asks for fewer zeros at first
    fitted = trainer(tmp_path, callback, max_steps=8)
    fitted.callbacks.append(probe := ZeroProbe(callback))
    with pytest.warns(UserWarning, match=r"14 target\(s\) are pruned already, such as model.*q_proj with 50\.0% zeros"):
        fitted.fit(module, loader(64))
    assert len(before) > 14
    assert all((parameter == 0)[before[name]].all() for name, parameter in module.named_parameters())
    assert probe.checked >= 8 * 14
    assert {mask.sparsity for mask in masks(callback).values()} == {0.5}


def test_a_longer_second_fit_leaves_fractions_where_they_were(tmp_path: Path) -> None:
    callback = pruning(schedule=SparsitySchedule(0.0, 0.4, 0.2))
    fitted, module, probe = trainer(tmp_path, callback, max_steps=10), ToyLM(), ZeroProbe(callback)
    fitted.callbacks.append(probe)
    fitted.fit(module, ResumableBatches(128))
    fitted.fit_loop.epoch_loop.max_steps = 20
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*max_steps was")
        fitted.fit(module, ResumableBatches(128))
    assert len(module.losses) == 20
    assert [event.step for event in callback.report.events] == [2, 4]
    assert probe.checked >= 16


def test_a_callback_does_not_lose_its_masks_to_a_new_trainer(tmp_path: Path) -> None:
    callback, module = pruning(), ToyLM()
    first = trainer(tmp_path, callback, max_steps=8)
    first.fit(module, loader(64))
    first.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(MisconfigurationException, match="has pruned in another training"):
        trainer(tmp_path, callback, max_steps=8).fit(module, loader(64))
    probe = ZeroProbe(callback)
    trainer(tmp_path, callback, probe, max_steps=12).fit(module, loader(64), ckpt_path=tmp_path / "a.ckpt")
    assert probe.checked


def test_a_pruned_module_is_not_trained_without_the_callback_in_silence(tmp_path: Path) -> None:
    module, lost = ToyLM(), "without a ThanosPruningCallback: their zeros will be lost"
    for go_on in (pruning(), pruning(schedule=SparsitySchedule(2, 2, 1))):  # another one keeps them
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=f".*{lost}")
            trainer(tmp_path, go_on, max_steps=8).fit(module, loader(64))
    with pytest.warns(UserWarning, match=lost):
        trainer(tmp_path, max_steps=1).fit(module, loader(64))
    with warnings.catch_warnings():  # it is said once
        warnings.filterwarnings("error", message=f".*{lost}")
        trainer(tmp_path, max_steps=1).fit(module, loader(64))


def test_a_finished_training_can_be_resumed_with_nothing_left(tmp_path: Path) -> None:
    first = trainer(tmp_path, pruning(), max_steps=8)
    first.fit(ToyLM(), ResumableBatches())
    first.save_checkpoint(tmp_path / "a.ckpt")
    callback, module = pruning(), ToyLM()
    again = trainer(tmp_path, callback, max_steps=8)
    again.fit(module, ResumableBatches(), ckpt_path=tmp_path / "a.ckpt")
    assert module.losses == []
    again.save_checkpoint(tmp_path / "b.ckpt")
    saved = torch.load(tmp_path / "b.ckpt", weights_only=True)
    assert len(saved["callbacks"]["ThanosPruningCallback"]["masks"]) == 14


def test_a_dense_checkpoint_goes_on_with_the_callback_added(tmp_path: Path) -> None:
    first = trainer(tmp_path, max_steps=10)
    first.fit(ToyLM(), ResumableBatches())
    first.save_checkpoint(tmp_path / "dense.ckpt")
    callback = pruning(schedule=SparsitySchedule(12, 16, 2))
    trainer(tmp_path, callback, max_steps=20).fit(ToyLM(), ResumableBatches(128), ckpt_path=tmp_path / "dense.ckpt")
    assert [event.step for event in callback.report.events] == [14, 16]
    with pytest.raises(MisconfigurationException, match=r"needs the steps from 4 on, but the training.*step 10"):
        trainer(tmp_path, pruning(schedule=SparsitySchedule(6, 6, 1)), max_steps=20).fit(
            ToyLM(), ResumableBatches(128), ckpt_path=tmp_path / "dense.ckpt"
        )


@pytest.mark.parametrize(
    ("arguments", "max_steps", "words"),
    [
        ({}, 40, "not the first ones of this run: max_steps was 20 and is 40. Go on"),
        ({"schedule": SparsitySchedule(2, 10, 4)}, 40, None),
        (
            {"schedule": SparsitySchedule(2, 14, 4), "damping": 0.1},
            40,
            r"run: schedule was .*\(start_step=0.1, .*\) and is SparsitySchedule\(start_step=2.*\). Go on",
        ),
        ({"pattern": "1:4"}, 20, r"run: pattern was NM\(n=2, m=4.*\) and is NM\(n=1, m=4.*\). Go on"),
        ({"targets": ["*.mlp.*"]}, 20, r"q_proj.weight, which is no target now: targets was .* and is \['\*.mlp.\*'\]"),
    ],
)
def test_a_plan_may_change_ahead_but_not_behind(
    tmp_path: Path, arguments: dict[str, Any], max_steps: int, words: str | None
) -> None:
    saved = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=8, save_top_k=-1)
    first = pruning(schedule=SparsitySchedule(0.1, 0.5, 0.2))
    trainer(tmp_path, first, saved, max_steps=20, enable_checkpointing=True).fit(ToyLM(), ResumableBatches(128))
    again = pruning(**{"schedule": SparsitySchedule(0.1, 0.5, 0.2), **arguments})
    second = trainer(tmp_path, again, max_steps=max_steps)
    if words is None:
        with pytest.warns(UserWarning, match="other arguments of the callback count than before: schedule"):
            second.fit(ToyLM(), ResumableBatches(256), ckpt_path=tmp_path / "step=8.ckpt")
        return
    with pytest.raises(MisconfigurationException, match=words):
        second.fit(ToyLM(), ResumableBatches(256), ckpt_path=tmp_path / "step=8.ckpt")


def test_other_arguments_are_taken_at_a_resume_and_said(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    class Subclass(ThanosPruningCallback):
        """With a signature of its own."""

        def __init__(self, damping: float = 0.01, **kwargs: Any) -> None:
            options = grouped(damping=damping, steps=2, **kwargs)
            super().__init__(schedule=SparsitySchedule(4, 4, 1), **options)

    first = trainer(tmp_path, Subclass(), max_steps=6)
    first.fit(ToyLM(), ResumableBatches())
    first.save_checkpoint(tmp_path / "a.ckpt")
    arguments = torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"]["ThanosPruningCallback"]["arguments"]
    every = set(inspect.signature(ThanosPruningCallback).parameters)
    assert {name.split(".")[0] for name in arguments} == every - {
        "sparsity",
        "outlier_fraction",
    }  # which the pattern has
    assert {"solver.damping", "calibration.steps"} <= set(arguments)

    def said(callback: ThanosPruningCallback) -> list[str]:
        recwarn.clear()
        trainer(tmp_path, callback, max_steps=8).fit(ToyLM(), ResumableBatches(), ckpt_path=tmp_path / "a.ckpt")
        return [str(warning.message) for warning in recwarn if "other arguments" in str(warning.message)]

    assert said(Subclass()) == []
    (message,) = said(Subclass(damping=0.1, verify_every_n_steps=0, method="sparsegpt"))
    assert message.endswith(
        "count than before: solver.method was 'thanos' and is 'sparsegpt'; solver.damping was 0.01 and is 0.1; "
        "verify_every_n_steps was 100 and is 0"
    )


def test_the_export_note_is_of_the_pruned_model(tmp_path: Path) -> None:
    class Distilled(ToyLM):
        def __init__(self) -> None:
            super().__init__()
            del self.model
            self.teacher = tiny_gpt2().requires_grad_(False)  # registered first
            self.model = tiny_llama()

    fitted = trainer(tmp_path, pruning(ignore=["lm_head", "teacher.*"]), max_steps=8)
    fitted.fit(Distilled(), loader(64))
    fitted.save_checkpoint(tmp_path / "a.ckpt")
    note = torch.load(tmp_path / "a.ckpt", weights_only=True)["thanos_lightning"]
    assert (note["model_prefix"], note["architecture"]) == ("model.", "LlamaForCausalLM")


def test_masks_of_another_model_are_refused(tmp_path: Path) -> None:
    first = trainer(tmp_path, pruning(), max_steps=8)
    first.fit(ToyLM(), loader(64))
    first.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(MisconfigurationException, match=r"mask for .*down_proj.weight, which is no target"):
        trainer(tmp_path, pruning(ignore=["down_proj", "lm_head"]), max_steps=10).fit(
            ToyLM(), loader(64), ckpt_path=tmp_path / "a.ckpt"
        )
    with pytest.raises(MisconfigurationException, match=r"the 2 pruning.* are not the first ones"):
        trainer(tmp_path, pruning(schedule=SparsitySchedule(9, 9, 1)), max_steps=10).fit(
            ToyLM(), loader(64), ckpt_path=tmp_path / "a.ckpt"
        )


# Bad input


@pytest.mark.parametrize(
    ("arguments", "settings", "words"),
    [
        ({"targets": ["*.query"]}, {}, "'\\*.query' matches no prunable layer"),
        (
            {"pattern": "4:9"},
            {},
            "14 of 14 layers can't take their pattern .* Layer model.model.layers.0.self_attn.q_proj: .*9",
        ),
        ({"schedule": SparsitySchedule(50, 60, 10)}, {}, "first event is at optimizer step 60, but the training has 8"),
        ({"schedule": SparsitySchedule(0.1, 0.5, 0.1)}, {"max_steps": -1}, "set the Trainer's max_steps"),
        ({"schedule": SparsitySchedule(0, 0, 1)}, {}, "before the first optimizer step has no training batches"),
        ({"monitor": "val/loss"}, {}, "no validation"),
        ({"memory_gib": 1e-9}, {}, "more than memory_gib"),
        (
            {"pattern": "unstructured", "sparsity": 0.5, "memory_gib": 2.2e-5, "schedule": SparsitySchedule(10, 12, 1)},
            {"max_steps": 20},
            "step 12 needs statistics from",  # and not only when the layers have been looked at
        ),
        ({"overrides": [TargetOverride(["*.query"], "4:8")]}, {}, "override target"),
    ],
)
def test_what_does_not_fit_the_model_or_the_trainer_is_refused_before_training(
    tmp_path: Path, arguments: dict[str, Any], settings: dict[str, Any], words: str
) -> None:
    module = ToyLM()
    with pytest.raises((ValueError, MisconfigurationException), match=words):
        trainer(tmp_path, pruning(**arguments), **{"max_steps": 8, **settings}).fit(module, loader(64))
    assert module.losses == []
    assert not (tmp_path / "pruning_report.json").exists()


def test_a_metric_that_is_not_logged_is_named(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"monitor is 'val/ppl'.*It logs: .*val/loss"):
        trainer(tmp_path, pruning(monitor="val/ppl"), max_steps=8).fit(ToyLM(), loader(64), loader(8))


def dense_after(module: ToyLM, run: Callable[[], None], error: type[Exception], words: str) -> None:
    """The run fails with these words, and no layer has been pruned."""
    with pytest.raises(error, match=words):
        run()
    weights = [m.weight for m in module.model.modules() if isinstance(m, nn.Linear)]
    assert all(weight.count_nonzero() == weight.numel() for weight in weights)


class Silent(IterableDataset[Any]):
    """Whose length isn't known before it is asked for a batch."""

    def __iter__(self) -> Iterator[Any]:
        return iter(())


def test_empty_and_padded_and_broken_statistics(tmp_path: Path) -> None:
    module = ToyLM()
    dense_after(
        module,
        lambda: trainer(tmp_path, pruning(batches=Silent()), max_steps=8).fit(module, loader(64)),
        PruningError,
        "gave no batch",
    )
    module = ToyLM()
    padded = loader(64, padding=16)
    module.training_step = lambda batch, batch_idx: module(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss
    dense_after(
        module,
        lambda: trainer(tmp_path, pruning(), max_steps=8).fit(module, padded),
        PruningError,
        "no token was counted at all",
    )
    module = ToyLM()
    module.model.model.layers[1].mlp.act_fn = nn.Softplus(beta=float("nan"))
    dense_after(
        module,
        lambda: trainer(tmp_path, pruning(schedule=SparsitySchedule(1, 1, 1)), max_steps=8).fit(module, loader(64)),
        PruningError,
        r"layer model\.model\.layers\.",
    )


@pytest.mark.parametrize("pattern", [("2:4", None), ("unstructured", 0.5)], ids=str)
def test_layers_that_no_token_reaches_wait_for_a_later_event_and_then_go_by_magnitude(
    pattern: tuple[str, float | None], tmp_path: Path
) -> None:
    module = ToyLM()
    module.extra = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))
    before = [layer.weight.detach().clone() for layer in module.extra]
    callback = pruning(*pattern)
    with pytest.warns(UserWarning, match="that no token has reached") as warned:
        trainer(tmp_path, callback, max_steps=8).fit(module, loader(64))
    said = [str(one.message) for one in warned if "that no token has reached" in str(one.message)]
    assert [re.findall(r"calling its layer\) are (.*?)[,:]", text)[0] for text in said] == [
        "left as they are until the next event",
        "pruned by magnitude",
    ]
    assert all("6 layer(s)" in text and "extra.0, extra.1, extra.2, extra.3, extra.4, …" in text for text in said)
    first, last = callback.report.events
    assert not [layer for layer in first.layers if layer.name.startswith("extra")]
    assert [math.isnan(layer.relative_loss) for layer in last.layers].count(True) == 6
    assert math.isfinite(last.relative_loss)
    for weight, layer in zip(before, module.extra, strict=True):
        kept = layer.weight != 0
        assert torch.equal(layer.weight[kept], weight[kept])
        assert kept.float().mean() == 0.5
        groups = (
            (weight.abs().view(-1, 4), kept.view(-1, 4)) if pattern[0] == "2:4" else (weight.abs()[None], kept[None])
        )
        for values, chosen in zip(*groups, strict=True):
            assert values[chosen].min() >= values[~chosen].max()


@pytest.mark.parametrize(("options", "steps"), [({"batches": list(loader(8))}, [0]), ({}, [2, 4, 6, 8])])
def test_the_schedule_without_one(tmp_path: Path, options: dict[str, Any], steps: list[int]) -> None:
    callback = pruning(schedule=None, **options)
    trainer(tmp_path, callback, max_steps=20).fit(ToyLM(), loader(80))
    assert [event.step for event in callback.report.events] == steps
    assert {mask.pattern for mask in masks(callback).values()} == {NM(2, 4)}


def test_events_that_are_missed_are_said(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="final sparsity will not be reached"):
        trainer(tmp_path, pruning(schedule=SparsitySchedule(2, 20, 4)), max_steps=8).fit(ToyLM(), loader(64))


# How the sparsity rises, and where it goes


def _scan_test_module() -> ToyLM:
    """A model whose layers lose unequally much: the inputs of some are nearly of rank one."""
    module = ToyLM(tiny_llama(num_hidden_layers=3))
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "layers.1.input_layernorm" in name:
                parameter[4:] = 1e-2
    return module


@pytest.mark.parametrize("from_dataloader", [False, True])
def test_an_allocation_meets_the_budget_to_the_weight(tmp_path: Path, from_dataloader: bool) -> None:
    module = _scan_test_module()
    callback = pruning(
        "unstructured",
        0.5,
        allocation=Allocation(),
        schedule=SparsitySchedule(0, 8, 4),
        batches=list(loader(8)) if from_dataloader else None,
    )
    probe = ZeroProbe(callback)
    trainer(tmp_path, callback, probe, max_steps=10).fit(module, loader(48))
    found = masks(callback)
    assert sum(int((~mask.keep).sum()) for mask in found.values()) == sum(
        int(0.5 * mask.keep.numel()) for mask in found.values()
    )
    sparsities = [mask.sparsity for mask in found.values()]
    assert max(sparsities) - min(sparsities) > 0.05
    assert max(sparsities) - min(sparsities) <= 0.3 + 1e-2
    assert len(callback.report.events) == 2
    scanned = callback.state_dict()["sensitivities"]
    assert len(scanned) == len(found)
    for scan in scanned.values():
        assert min(scan["losses"].values()) > 0
        assert min(scan["weighted_losses"].values()) > 0


@pytest.mark.parametrize(
    ("options", "alike"),
    [
        ({}, False),
        ({"allocation": Allocation("uniform")}, True),
        ({"output_weights": "uniform"}, True),  # relative losses say too little
        ({"method": "sparsegpt"}, True),
        ({"schedule": SparsitySchedule(1, 1, 1)}, False),
        # no step to look at the layers before
        ({"schedule": SparsitySchedule(1, 1, 1), "memory_gib": 1.0}, True),
        ({"schedule": SparsitySchedule(8, 8, 1), "memory_gib": 4.5e-5}, False),  # three windows of a step
        ({"schedule": SparsitySchedule(4, 4, 1), "memory_gib": 4.5e-5}, True),
        ({"schedule": SparsitySchedule(0, 0, 1), "batches": list(loader(8))}, False),
        ({"schedule": SparsitySchedule(0, 0, 1), "batches": UNLABELLED}, True),
    ],
)
def test_unstructured_layers_are_allocated_where_it_can_be_told(
    tmp_path: Path, options: dict[str, Any], alike: bool
) -> None:
    callback = pruning("unstructured", 0.5, **{"schedule": SparsitySchedule(4, 8, 4), **options})
    trainer(tmp_path, callback, max_steps=10).fit(_scan_test_module(), loader(48))
    found = masks(callback)
    assert sum(int((~mask.keep).sum()) for mask in found.values()) == sum(
        int(0.5 * mask.keep.numel()) for mask in found.values()
    )
    assert ({mask.sparsity for mask in found.values()} == {0.5}) is alike


def test_a_checkpoint_of_the_validation_before_a_scan_goes_on(tmp_path: Path) -> None:
    class Saves(Callback):
        def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            path = tmp_path / f"{trainer.global_step}.ckpt"
            if not path.exists():  # at the event's step, the dense model
                trainer.save_checkpoint(path)

    def made() -> ThanosPruningCallback:
        return pruning("unstructured", 0.5, schedule=SparsitySchedule(4, 4, 1), monitor="val/loss")

    whole, again, validation = made(), made(), loader(8)
    trainer(tmp_path, whole, Saves(), max_steps=6).fit(ToyLM(), ResumableBatches(64), validation)
    trainer(tmp_path, again, max_steps=6).fit(ToyLM(), ResumableBatches(64), validation, ckpt_path=tmp_path / "4.ckpt")
    assert len({mask.sparsity for mask in masks(whole).values()}) > 1
    assert all(torch.equal(mask.keep, masks(again)[name].keep) for name, mask in masks(whole).items())


def test_a_training_that_goes_on_too_late_for_an_allocation_prunes_alike(tmp_path: Path) -> None:
    every = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer(tmp_path, every, max_steps=5, enable_checkpointing=True).fit(ToyLM(), ResumableBatches(64))
    ends = []
    for start in (5, 7):  # a checkpoint without a state; one inside the window that begins at 6
        callback = pruning(
            "unstructured", 0.5, schedule=SparsitySchedule(8, 8, 1), memory_gib=1.0
        )  # would look at steps 4 to 6
        again = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
        trainer(tmp_path, callback, again, max_steps=10, enable_checkpointing=True).fit(
            ToyLM(), ResumableBatches(64), ckpt_path=tmp_path / f"step={start}.ckpt"
        )
        ends.append({name: mask.keep for name, mask in masks(callback).items()})
        assert {mask.sparsity for mask in masks(callback).values()} == {0.5}
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize(
    ("schedule", "budget", "runs"),
    [
        (SparsitySchedule(0, 0, 1), None, 1),  # of the same weights
        (SparsitySchedule(at=[0, 4]), None, 2),
        (SparsitySchedule(0, 0, 1), 1.0, 2),  # what fits may not be kept beside what comes
    ],
)
def test_a_scan_and_the_event_at_its_step_share_a_calibration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schedule: SparsitySchedule, budget: float | None, runs: int
) -> None:
    import thanos_lightning.calibration.collector as room

    ran, real = [], room.count_dataloader
    monkeypatch.setattr(room, "count_dataloader", lambda *args, **kwargs: ran.append(1) or real(*args, **kwargs))
    found = []
    for shared in (True, False):
        callback = pruning(
            "unstructured", 0.5, allocation=Allocation(), schedule=schedule, batches=list(loader(8)), memory_gib=budget
        )
        if not shared:
            monkeypatch.setattr(room.Collector, "_kept", property(lambda _: None, lambda *_: None), raising=False)
        trainer(tmp_path, callback, max_steps=6).fit(_scan_test_module(), loader(48))
        found.append(masks(callback))
        if shared:
            assert len(ran) == runs
    assert all(torch.equal(mask.keep, found[1][name].keep) for name, mask in found[0].items())
    assert len({mask.sparsity for mask in found[0].values()}) > 1


@pytest.mark.parametrize("calibration", [None, list(loader(8))], ids=["training batches", "calibration set"])
def test_an_event_takes_what_the_scan_at_its_step_was_told(tmp_path: Path, calibration: list[Any] | None) -> None:
    schedule = SparsitySchedule(at=[2, 4, 6])
    callback = pruning("unstructured", 0.5, allocation=Allocation(), schedule=schedule, batches=calibration)
    trainer(tmp_path, callback, max_steps=8).fit(_scan_test_module(), loader(48))
    found = masks(callback)
    assert len(callback.report.events) > 1
    assert len({mask.sparsity for mask in found.values()}) > 1
    assert sum(int((~mask.keep).sum()) for mask in found.values()) == sum(
        int(0.5 * mask.keep.numel()) for mask in found.values()
    )


def test_an_allocation_of_n_m_gives_dense_rows_to_layers(tmp_path: Path) -> None:
    callback = pruning("2:4", outlier_fraction=0.25, allocation=Allocation("loss"))
    trainer(tmp_path, callback, max_steps=8).fit(_scan_test_module(), loader(48))
    found = masks(callback)
    assert all(isinstance(mask.pattern, NM) and mask.pattern.violations(mask.keep) == 0 for mask in found.values())
    fractions = {mask.pattern.outlier_fraction for mask in found.values()}
    assert len(fractions) > 1
    wanted = sum(NM(2, 4, 0.25).num_pruned(*mask.keep.shape) for mask in found.values())
    of_a_row = max(mask.keep.shape[1] for mask in found.values()) / 2
    assert abs(sum(int((~mask.keep).sum()) for mask in found.values()) - wanted) <= of_a_row / 2


@pytest.mark.parametrize(
    "arguments",
    [{"pattern": "2:4", "outlier_fraction": 0.25}, {"pattern": "structured", "sparsity": 0.25}],
    ids=["dense rows", "columns"],
)
def test_rows_and_columns_are_allocated_unless_layers_are_to_be_alike(
    tmp_path: Path, arguments: dict[str, Any]
) -> None:
    found = []
    for allocation in (None, Allocation("loss"), Allocation("uniform")):
        callback = pruning(**arguments, allocation=allocation)
        trainer(tmp_path, callback, max_steps=8).fit(_scan_test_module(), loader(48))
        found.append({name: mask.pattern for name, mask in masks(callback).items()})
    assert found[0] == found[1]
    assert len(set(found[0].values())) > 1
    assert set(found[2].values()) == {callback.options.pattern}


def test_a_scan_respects_the_memory_and_is_the_same_in_windows(tmp_path: Path) -> None:
    found = []
    for budget in (None, 2.5 * 4 * 48 * 48 / 2**30):
        callback = pruning(
            "unstructured",
            0.5,
            allocation=Allocation(),
            schedule=SparsitySchedule(4, 4, 1),
            memory_gib=budget,
            batches=list(loader(8)),
        )
        trainer(tmp_path, callback, max_steps=5).fit(_scan_test_module(), loader(48))
        found.append(callback.state_dict()["sensitivities"])
        windows = [window for window in callback._run.windows if window.scans]
        assert len(windows) == (1 if budget is None else pytest.approx(8, abs=4))
    assert found[0] == found[1]


@pytest.mark.parametrize("stop", [3, 5, 7])
def test_a_scan_survives_a_resume(tmp_path: Path, stop: int) -> None:
    ends = []
    for start in (None, stop):
        callback = pruning("unstructured", 0.5, allocation=Allocation(), schedule=SparsitySchedule(6, 8, 2))
        every = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
        module = _scan_test_module()
        trainer(tmp_path, callback, every, max_steps=10, enable_checkpointing=True).fit(
            module, ResumableBatches(48), ckpt_path=start and tmp_path / f"step={start}.ckpt"
        )
        ends.append({name: mask.keep for name, mask in masks(callback).items()})
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"method": "magnitude", "admm_steps": 0, "refine_steps": 0, "allocation": Allocation()},
            "method 'magnitude' reports no losses",
        ),
        ({"allocation": Allocation()}, "2:4 in all rows of all layers leaves nothing to allocate"),
        (
            {"pattern": "unstructured", "sparsity": 0.97, "allocation": Allocation()},
            "a sparsity of 0.97 leaves nothing to allocate, since no layer is looked at beyond 0.95: leave the allocat",
        ),
        (
            {"pattern": "structured", "sparsity": 0.88, "outlier_fraction": 0.1, "allocation": Allocation()},
            "a sparsity of 0.88 leaves nothing to allocate, since no layer is looked at beyond 0.855",
        ),
    ],
)
def test_what_can_not_be_allocated_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pruning(**arguments)


def test_a_scan_needs_a_step(tmp_path: Path) -> None:
    callback = pruning(
        "unstructured", 0.5, allocation=Allocation(), schedule=SparsitySchedule(at=[1, 3, 5]), memory_gib=1.0
    )
    message = r"at optimizer step 1, which leaves too few to look at .* with the event \(no calibration.memory_gib\)"
    with pytest.raises(MisconfigurationException, match=message):
        trainer(tmp_path, callback, max_steps=10).fit(ToyLM(), loader(48))
    trainer(tmp_path, callback, fast_dev_run=True).fit(ToyLM(), loader(48))
