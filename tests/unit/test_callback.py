import copy
import inspect
import json
import math
import re
import warnings
from collections.abc import Callable
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
from toy import (
    ResumableBatches,
    Sequences,
    ToyLM,
    ZeroProbe,
    adamw,
    at,
    grouped,
    loader,
    momentum_sgd,
    tiny_gpt2,
    tiny_llama,
    trainer,
)

from thanos_lightning import SparsitySchedule, ThanosPruningCallback
from thanos_lightning.collect.collector import Collector
from thanos_lightning.enforcement import ZeroViolationError
from thanos_lightning.plan.allocation import Allocation
from thanos_lightning.ranks.masks import LayerMask
from thanos_lightning.ranks.talk import PruningError
from thanos_lightning.solver import NM


@pytest.fixture(autouse=True)
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The solver's own tests check shapes; here that would take a third of the time."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


LABELLED = list(loader(8))
UNLABELLED = [{name: value for name, value in batch.items() if name != "labels"} for batch in LABELLED]
HALF: dict[str, Any] = {"pattern": "unstructured", "sparsity": 0.5}
TWO_WINDOWS = 4 * (6 * 32**2 + 48**2) / 2**30  # GiB of up to 7 layers, 6 of 32 inputs and one of 48


def pruning(pattern: str = "2:4", sparsity: float | None = None, **kwargs: Any) -> ThanosPruningCallback:
    settings: dict[str, Any] = {"schedule": SparsitySchedule(2, 6, 2)}
    if "batches" not in kwargs:
        settings["steps"] = 2
    return ThanosPruningCallback(pattern, sparsity, **grouped(**{**settings, **kwargs}))


def masks(callback: ThanosPruningCallback) -> dict[str, LayerMask]:
    return {name: LayerMask.from_state(state) for name, state in callback.state_dict()["masks"].items()}


def zeros_of(callback: ThanosPruningCallback) -> list[float]:
    """The sparsity of each layer."""
    return [1.0 - int(mask.keep.count_nonzero()) / mask.keep.numel() for mask in masks(callback).values()]


def fit(root: Path, *callbacks: Callback, steps: int = 8, start: Path | None = None, **settings: Any) -> ToyLM:
    """Train on batches that go on where they were, and save the end as end.ckpt."""
    module = ToyLM()
    fitted = trainer(root, *callbacks, max_steps=steps, **settings)
    fitted.fit(module, ResumableBatches(256), ckpt_path=start)
    fitted.save_checkpoint(root / "end.ckpt")
    return module


def saved_state(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)["callbacks"]["ThanosPruningCallback"]


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> list[tuple[set[int], dict[str, Tensor]]]:
    """Of each window when it is pruned: the numbers of tokens that its statistics hold, and its output weights."""
    import thanos_lightning.fit.run as room

    seen: list[tuple[set[int], dict[str, Tensor]]] = []
    real = room.prune_window

    def prune_window(window: Any, targets: Any, moments: Any, *args: Any, **kwargs: Any) -> Any:
        tokens = {accumulator.num_tokens for accumulator in moments.accumulators.values()}
        seen.append((tokens, {name: weights.clone() for name, weights in moments.output_weights.items()}))
        return real(window, targets, moments, *args, **kwargs)

    monkeypatch.setattr(room, "prune_window", prune_window)
    return seen


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("make_optimizer", [adamw, momentum_sgd])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_zeros_hold_after_every_step(
    tmp_path: Path, precision: str, make_optimizer: Callable[[Any], Any], accumulate: int
) -> None:
    callback, module = pruning(), ToyLM(make_optimizer=make_optimizer)
    probe, settings = ZeroProbe(callback), {"accumulate_grad_batches": accumulate, "gradient_clip_val": 0.5}
    fitted = trainer(tmp_path, callback, probe, max_steps=16, precision=precision, **settings)
    fitted.fit(module, loader(4 * 16 * accumulate))
    tensors = 14 * (2 if make_optimizer is momentum_sgd else 3)
    assert probe.checked >= 10 * accumulate * tensors
    assert probe.sparsities[0] == pytest.approx(0.4375)
    assert probe.sparsities[-1] == 0.5
    for name, mask in masks(callback).items():
        assert mask.pattern == NM(2, 4)
        weight = dict(module.named_parameters())[name]
        assert weight.unflatten(1, (-1, 4)).ne(0).sum(-1).max() == 2
    assert module.losses[-1] < module.losses[0]
    assert not any(optimizer._optimizer_step_post_hooks for optimizer in fitted.optimizers)


@pytest.mark.parametrize("method", ["thanos", "sparsegpt", "wanda", "magnitude"])
@pytest.mark.parametrize(
    ("pattern", "sparsity"), [("unstructured", 0.6), ("structured", 0.25), ("4:8", None), ("1:4", None)]
)
def test_every_pattern_and_method_on_conv1d(tmp_path: Path, pattern: str, sparsity: float | None, method: Any) -> None:
    outliers = 0.125 if pattern in ("structured", "4:8") else None
    callback = pruning(pattern, sparsity, outlier_fraction=outliers, method=method)
    probe = ZeroProbe(callback)
    trainer(tmp_path, callback, probe, max_steps=8).fit(ToyLM(tiny_gpt2()), loader(32))
    assert probe.checked
    found = masks(callback).values()
    assert all(mask.transposed and mask.pattern.violations(mask.keep) == 0 for mask in found)
    assert zeros_of(callback) == pytest.approx([mask.pattern.sparsity for mask in found], abs=0.05)


@pytest.mark.parametrize(
    ("hook", "value"), [("on_train_batch_end", 1e-30), ("on_train_batch_end", -0.0), ("on_train_end", 1.0)]
)
def test_a_zero_that_comes_back_is_an_error(tmp_path: Path, hook: str, value: float) -> None:
    def refill(trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        weight = pl_module.model.model.layers[1].mlp.up_proj.weight
        if trainer.global_step == 9:
            weight.data[weight == 0] = value

    callbacks = [at(hook, refill), pruning(verify_every_n_steps=3)]
    if hook == "on_train_end":  # when the callback has looked for the last time in the training
        callbacks.reverse()
    with pytest.raises(ZeroViolationError, match=r"768 of 768 .*layers\.1\.mlp\.up_proj\.weight \(weight\)"):
        trainer(tmp_path, *callbacks, max_steps=9).fit(ToyLM(), loader(64))


@pytest.mark.parametrize(("kind", "moment"), [(torch.optim.Adamax, "exp_inf"), (torch.optim.Rprop, "step_size")])
def test_an_optimizer_that_moves_moments_without_a_gradient_is_refused_at_once(
    tmp_path: Path, kind: type[torch.optim.Optimizer], moment: str
) -> None:
    module, callback = ToyLM(make_optimizer=kind), pruning(schedule=SparsitySchedule(2, 2, 1))
    words = rf"\({moment}\).* or {kind.__name__} moves moments whose gradients are 0"
    with pytest.raises(ZeroViolationError, match=words):
        trainer(tmp_path, callback, max_steps=12).fit(module, loader(64))
    assert callback.state_dict()["optimizer_steps"] == 3


@pytest.mark.parametrize("fused", [False, True])
def test_fp16_steps_that_are_skipped_do_not_count(tmp_path: Path, fused: bool) -> None:
    callback, scaler = pruning(schedule=SparsitySchedule(2, 2, 1)), torch.amp.GradScaler("cpu", init_scale=2.0**60)
    probe, plugin = ZeroProbe(callback), MixedPrecision("16-mixed", "cpu", scaler)
    module = ToyLM(make_optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, fused=fused))
    fitted = trainer(tmp_path, callback, probe, max_steps=60, plugins=[plugin])
    fitted.fit(module, loader(512))
    (stepped,) = {int(state["step"]) for state in fitted.optimizers[0].state.values()}
    assert 0 < stepped < 55, "no step was skipped: the test shows nothing"
    assert callback.state_dict()["optimizer_steps"] == stepped
    assert probe.checked
    assert module.losses[-1] < module.losses[0]


def test_a_token_counts_once_in_the_steps_before_the_event(tmp_path: Path, windows: list[Any]) -> None:
    """Not as padding, in a validation, in a recomputed forward, or in what others run after the training step."""
    events: list[int] = []

    def sample(_: Trainer, pl_module: LightningModule, *__: Any) -> None:
        events.append(len(callback.report.events))
        pl_module(input_ids=torch.zeros(1, 5, dtype=torch.long))

    model = tiny_llama()
    model.gradient_checkpointing_enable()
    callback, sampling = pruning(schedule=SparsitySchedule(4, 4, 1)), at("on_train_batch_end", sample)
    validating = {"num_sanity_val_steps": 2, "val_check_interval": 1, "check_val_every_n_epoch": None}
    fitted = trainer(tmp_path, sampling, callback, max_steps=5, accumulate_grad_batches=3, **validating)
    fitted.fit(ToyLM(model), loader(96, padding=4), loader(8))
    assert [tokens for tokens, _ in windows] == [{2 * 3 * 4 * 12}]
    assert callback.report.events[0].step == 4
    assert events == [0] * 4 * 3 + [1] * 3


class OutputGradientsOfEachBatch(Callback):
    """Sums of the squared gradients at the outputs of all Linear layers, by autograd, of a copy of the model."""

    def __init__(self) -> None:
        self.batches: list[dict[str, Tensor]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        model = copy.deepcopy(pl_module.model).requires_grad_(True)
        outputs: dict[str, Tensor] = {}
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and name != "lm_head":
                module.register_forward_hook(lambda _, __, out, name=name: outputs.__setitem__(f"model.{name}", out))
        gradients = torch.autograd.grad(model(**batch).loss, list(outputs.values()))
        squares = (gradient.flatten(end_dim=-2).square().sum(0) for gradient in gradients)
        self.batches.append(dict(zip(outputs, squares, strict=True)))


def test_errors_count_as_much_as_the_training_loss_feels_them(tmp_path: Path, windows: list[Any]) -> None:
    probe = OutputGradientsOfEachBatch()
    callback = pruning("unstructured", 0.5, schedule=SparsitySchedule(at=[3, 6]), allocation=Allocation("uniform"))
    trainer(tmp_path, callback, probe, max_steps=8).fit(ToyLM(), loader(64, padding=4), loader(8))
    assert len(windows) == 2
    for (_, weights), of_steps in zip(windows, ((1, 2), (4, 5)), strict=True):
        assert weights.keys() == {name.removesuffix(".weight") for name in masks(callback)}
        for layer, found in weights.items():
            total = sum(probe.batches[step][layer] for step in of_steps)
            torch.testing.assert_close(found, (total + 0.01 * total.mean()) / 2, rtol=1e-4, atol=1e-12)


def test_gradients_on_calibration_batches(tmp_path: Path, windows: list[Any]) -> None:
    module, given = ToyLM(), list(loader(36, padding=3))
    for name, parameter in module.named_parameters():
        parameter.requires_grad_("layers.1" in name)
    probe = OutputGradientsOfEachBatch()
    for batch in given[::4]:  # three of them, and all have inputs that count
        probe.on_train_batch_start(None, module, batch, 0)
    before = {name: parameter.clone() for name, parameter in module.named_parameters()}
    callback = pruning("unstructured", 0.5, schedule=SparsitySchedule(0, 0, 1), batches=given, targets="*layers*")

    def look(*_: Any) -> None:
        for name, parameter in module.named_parameters():
            assert parameter.grad is None
            assert name in masks(callback) or torch.equal(parameter, before[name])

    trainer(tmp_path, callback, at("on_train_batch_start", look), max_steps=1).fit(module, loader(64))
    ((_, found),) = windows
    assert len(found) == 14
    for layer, weights in found.items():
        total = sum(batch[layer] for batch in probe.batches)
        torch.testing.assert_close(weights, total + 0.01 * total.mean(), rtol=1e-4, atol=1e-12)


def test_calibration_batches_without_a_loss_are_said(tmp_path: Path) -> None:
    callback = pruning("unstructured", 0.5, schedule=SparsitySchedule(0, 0, 1), batches=UNLABELLED)
    with pytest.warns(UserWarning, match="the module returns no loss for a calibration batch: give the batches labels"):
        trainer(tmp_path, callback, max_steps=1).fit(ToyLM(), loader(64))


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
            gradients: dict[str, Any] = {name: parameter.grad for name, parameter in self.named_parameters()}
            for name, mask in masks(self.callback).items():
                if gradients[name] is not None:
                    self.dense_gradients += int(gradients[name][~mask.keep].count_nonzero())
            self.clip_gradients(optimizer, 0.1, "norm")
            optimizer.step()
        self.losses.append(loss.item())


@pytest.mark.parametrize(
    ("module", "batches", "words"),
    [
        (ToyLM, DataLoader(UNLABELLED, batch_size=None), r"returns no loss \(CausalLMOutputWithPast\): give the batch"),
        (ToyLM, [{0: torch.ones(2, 8)}], r"a calibration batch is a dict, on which forward\(\*\*batch\) of ToyLM fail"),
        (Manual, [(torch.ones(2, 8),)], "is a tuple, which goes through training_step, but under man"),
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


def test_frozen_layers_are_pruned_and_count_their_outputs_alike(tmp_path: Path) -> None:
    module = ToyLM()
    for name, parameter in module.named_parameters():
        parameter.requires_grad_("layers.1" in name)
    callback = pruning("unstructured", 0.5, targets="*layers*", schedule=SparsitySchedule(3, 3, 1))
    probe = ZeroProbe(callback)
    with pytest.warns(UserWarning, match=r"no gradient has reached the outputs of 7 layer\(s\), such as model.model"):
        trainer(tmp_path, callback, probe, max_steps=5).fit(module, loader(64))
    assert probe.checked == 3 * 7 * (1 + 3)
    assert all(("layers.0" in name) == (number < 7) for number, name in enumerate(masks(callback)))
    assert set(zeros_of(callback)[:7]) == {0.5}
    assert len(set(zeros_of(callback)[7:])) > 1  # these are allocated


@pytest.mark.parametrize(
    ("options", "settings", "steps"),
    [
        ({"schedule": None, "batches": LABELLED}, {}, [0]),
        ({"schedule": None}, {}, [2, 4, 6, 8]),
        ({"batches": "datamodule"}, {}, [4, 6]),
        ({"schedule": SparsitySchedule(0.1, 0.5, 0.1)}, {"fast_dev_run": 2}, [2]),
        ({"schedule": SparsitySchedule(100, 200, 50)}, {"fast_dev_run": 2}, [2]),
        (
            {"schedule": SparsitySchedule(0.2, 0.6, 0.2)},  # of five batches an epoch, by which Lightning steps thrice
            {"max_steps": -1, "max_epochs": 5, "limit_train_batches": 5, "accumulate_grad_batches": 2},
            [6, 9],
        ),
    ],
)
def test_events_are_at_optimizer_steps(
    tmp_path: Path, options: dict[str, Any], settings: dict[str, Any], steps: list[int]
) -> None:
    callback, module = pruning(**options), ToyLM()
    module.calibration_dataloader = lambda: loader(8)  # type: ignore[assignment]
    probe = ZeroProbe(callback)
    fitted = trainer(tmp_path, callback, probe, **{"max_steps": 20, **settings})
    fitted.fit(module, loader(80), loader(8))
    assert [event.step for event in callback.report.events] == steps
    assert callback.state_dict()["optimizer_steps"] == fitted.global_step
    assert {mask.pattern for mask in masks(callback).values()} == {NM(2, 4)}
    assert probe.checked


def test_windows_are_collected_after_the_ones_before_are_pruned(tmp_path: Path) -> None:
    pruned: list[int] = []
    callback = pruning(schedule=SparsitySchedule(6, 6, 1), steps=2, memory_gib=TWO_WINDOWS)
    look = at("on_train_batch_end", lambda *_: pruned.append(len(masks(callback))))
    trainer(tmp_path, callback, look, max_steps=8).fit(ToyLM(), loader(64))
    assert pruned == [0, 0, 0, 7, 7, 14, 14, 14]
    assert [len(event.layers) for event in callback.report.events] == [14]


def test_manual_optimization_with_two_optimizers(tmp_path: Path) -> None:
    callback, module = pruning(), Manual()
    probe, module.callback = ZeroProbe(callback), callback
    trainer(tmp_path, callback, probe, max_steps=32).fit(module, loader(64))
    assert callback.state_dict()["optimizer_steps"] == 16
    assert probe.checked >= 10 * 14 * 2
    assert module.dense_gradients == 0
    assert module.losses[-1] < module.losses[0]


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


def test_report_metrics_and_summary(tmp_path: Path) -> None:
    callback, logger = pruning(monitor="val/loss"), CSVLogger(tmp_path)
    others = ModelCheckpoint(tmp_path, monitor="val/loss", save_top_k=-1), EarlyStopping("val/loss", patience=0)
    seldom = {"check_val_every_n_epoch": None, "val_check_interval": 100}
    settings = {"max_steps": 12, "logger": logger, "log_every_n_steps": 1, "enable_checkpointing": True, **seldom}
    trainer(tmp_path, callback, *others, **settings).fit(ToyLM(), loader(64), loader(8))
    assert list(tmp_path.glob("*.ckpt")) == [], "the callback's own validations saved a checkpoint"
    report = json.loads((tmp_path / "pruning_report.json").read_text())
    assert [event["step"] for event in report["events"]] == [4, 6]
    assert report["events"][1]["target"] == 0.5
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


@pytest.mark.parametrize(("step", "batches"), [(0, list(loader(12))), (4, None)])
def test_the_measured_values_are_those_of_the_weights(tmp_path: Path, step: int, batches: Any) -> None:
    """Dense is measured before the first write, pruned after the last one: by an independent evaluation."""
    module = ToyLM()

    class Evaluates(Callback):
        def __init__(self) -> None:
            self.values: list[float] = []  # at the beginning and after each step

        @torch.no_grad()
        def on_train_batch_end(self, *_: Any) -> None:
            module.eval()
            self.values.append(sum(module(**batch).loss.item() for batch in LABELLED) / 2)
            module.train()

        on_train_start = on_train_batch_end

    before, after = Evaluates(), Evaluates()
    callback = pruning(monitor="val/loss", schedule=SparsitySchedule(step, step, 1), batches=batches)
    trainer(tmp_path, before, callback, after, max_steps=6).fit(module, loader(64), loader(8))
    summary = callback.report.summary
    assert summary.dense == pytest.approx(before.values[step], rel=1e-5)
    assert summary.pruned == pytest.approx(after.values[step], rel=1e-5)
    assert summary.recovered == pytest.approx(after.values[6], rel=1e-5)
    assert summary.dense != pytest.approx(summary.pruned, rel=1e-4)


@pytest.mark.parametrize(
    ("options", "precision", "stops"),
    [
        # windows of three steps end at 5 and 9: 4 and 8 lie inside, 1, 2 and 6 before an event, 5, 9 and 10 after
        ({**HALF, "schedule": SparsitySchedule(1, 9, 4), "steps": 3}, "32-true", [1, 2, 4, 5, 6, 8, 9, 10]),
        ({"schedule": SparsitySchedule(9, 9, 1), "steps": 4, "memory_gib": TWO_WINDOWS}, "32-true", [6]),
        ({}, "bf16-true", [3, 8]),
        # a scan is at 6, its event waits for 8
        ({**HALF, "schedule": SparsitySchedule(6, 8, 2)}, "32-true", [3, 5, 7]),
    ],
    ids=["two events", "windows of one event", "bf16", "a scan"],
)
def test_a_resumed_training_is_bit_identical(
    tmp_path: Path, options: dict[str, Any], precision: str, stops: list[int]
) -> None:
    def run(*callbacks: Callback, start: int | None = None) -> tuple[ToyLM, ThanosPruningCallback]:
        callback, module = pruning(**options), ToyLM(tiny_llama(seed=99 if start else 0))
        settings = {"max_steps": 12, "precision": precision, "enable_checkpointing": bool(callbacks)}
        fitted = trainer(tmp_path, callback, *callbacks, **settings)
        fitted.fit(module, ResumableBatches(), ckpt_path=start and tmp_path / f"step={start}.ckpt")
        return module, callback

    straight, one = run()
    run(ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1))
    for stop in stops:
        resumed, other = run(start=stop)
        for (name, a), b in zip(straight.named_parameters(), resumed.parameters(), strict=True):
            assert torch.equal(a, b), (stop, name)
        assert resumed.losses == straight.losses[stop:]
        assert [event.step for event in other.report.events] == [event.step for event in one.report.events]
        for name, mask in masks(one).items():
            assert torch.equal(mask.keep, masks(other)[name].keep), (stop, name)


@pytest.mark.parametrize(
    ("schedule", "ends", "steps"),
    [(SparsitySchedule(at=[3, 7]), (5, 10), [3, 7]), (SparsitySchedule(0.0, 0.4, 0.2), (10, 20), [2, 4])],
    ids=["in a window", "fractions stay where they were"],
)
def test_a_second_fit_of_the_same_trainer_goes_on(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, schedule: SparsitySchedule, ends: tuple[int, int], steps: Any
) -> None:
    callback = pruning(schedule=schedule, steps=3)
    probe, module = ZeroProbe(callback), ToyLM()
    fitted = trainer(tmp_path, callback, probe, max_steps=ends[0])
    fitted.fit(module, ResumableBatches(128))
    assert (callback.state_dict()["collected"] is not None) == (ends[0] < steps[-1])
    fitted.fit_loop.epoch_loop.max_steps = ends[1]
    fitted.fit(module, ResumableBatches(128))
    assert len(module.losses) == ends[1]
    assert [event.step for event in callback.report.events] == steps
    assert probe.checked
    assert not [warning for warning in recwarn if "max_steps was" in str(warning.message)]


def test_a_new_callback_keeps_the_zeros_that_it_finds(tmp_path: Path) -> None:
    module = ToyLM()
    trainer(tmp_path, pruning(schedule=SparsitySchedule(1, 1, 1)), max_steps=1).fit(module, loader(64))
    before = {name: parameter == 0 for name, parameter in module.named_parameters()}
    callback = pruning(schedule=SparsitySchedule(at=[3, 6]))  # which asks for fewer zeros at first
    probe = ZeroProbe(callback)
    with pytest.warns(UserWarning, match=r"14 target\(s\) are pruned already, such as model.*q_proj with 50\.0% zeros"):
        trainer(tmp_path, callback, probe, max_steps=8).fit(module, loader(64))
    assert len(before) > 14
    assert all((parameter == 0)[before[name]].all() for name, parameter in module.named_parameters())
    assert probe.checked >= 8 * 14
    assert set(zeros_of(callback)) == {0.5}


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
    fit(tmp_path, pruning())
    again = fit(tmp_path / "again", pruning(), start=tmp_path / "end.ckpt")
    assert again.losses == []
    assert len(saved_state(tmp_path / "again/end.ckpt")["masks"]) == 14


def test_a_dense_checkpoint_does_not_go_on_with_a_callback_whose_steps_are_over(tmp_path: Path) -> None:
    fit(tmp_path, steps=10)
    with pytest.raises(MisconfigurationException, match=r"needs the steps from 4 on, but the training.*step 10"):
        fit(tmp_path, pruning(schedule=SparsitySchedule(6, 6, 1)), steps=20, start=tmp_path / "end.ckpt")


@pytest.mark.parametrize(
    ("arguments", "max_steps", "words"),
    [
        ({}, 40, r"than the checkpoint did: max_steps was 20 and is 40. Resume with"),
        ({"schedule": SparsitySchedule(2, 10, 4)}, 40, "these arguments differ .* and apply from now on: schedule"),
        (
            {"schedule": SparsitySchedule(2, 14, 4), "damping": 0.1},
            40,
            r"schedule was .*=0.1, .* and is .*=2.*\). Resume",
        ),
        ({"pattern": "1:4"}, 20, r"did: pattern was '2:4' and is '1:4'. Resume"),
        ({"targets": ["*.mlp.*"]}, 20, r"q_proj.weight, which is no target now: targets was .* and is \['\*.mlp.\*'\]"),
    ],
)
def test_a_plan_may_change_ahead_but_not_behind(
    tmp_path: Path, arguments: dict[str, Any], max_steps: int, words: str
) -> None:
    saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=8, save_top_k=-1)
    schedule = SparsitySchedule(0.1, 0.5, 0.2)
    fit(tmp_path, pruning(schedule=schedule), saving, steps=20, enable_checkpointing=True)
    again = pruning(**{"schedule": schedule, **arguments})
    is_taken = words.startswith("these arguments")
    with pytest.warns(match=words) if is_taken else pytest.raises(MisconfigurationException, match=words):
        fit(tmp_path, again, steps=max_steps, start=tmp_path / "step=8.ckpt")


def test_other_arguments_are_taken_at_a_resume_and_said(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    class Subclass(ThanosPruningCallback):
        """With a signature of its own."""

        def __init__(self, damping: float = 0.01, **others: Any) -> None:
            super().__init__(schedule=SparsitySchedule(4, 4, 1), **grouped(damping=damping, steps=2, **others))

    fit(tmp_path, Subclass(), steps=6)
    arguments = saved_state(tmp_path / "end.ckpt")["arguments"]
    every, of_the_pattern = set(inspect.signature(ThanosPruningCallback).parameters), {"sparsity", "outlier_fraction"}
    assert {name.split(".")[0] for name in arguments} == every - of_the_pattern
    assert {"solver.damping", "calibration.steps"} <= set(arguments)

    def said(callback: ThanosPruningCallback) -> list[str]:
        recwarn.clear()
        fit(tmp_path / "again", callback, start=tmp_path / "end.ckpt")
        return [str(warning.message) for warning in recwarn if "these arguments" in str(warning.message)]

    assert said(Subclass()) == []
    (message,) = said(Subclass(damping=0.1, verify_every_n_steps=0, method="sparsegpt"))
    assert message.endswith(
        "apply from now on: solver.method was 'thanos' and is 'sparsegpt'; solver.damping was 0.01 and is 0.1; "
        "verify_every_n_steps was 100 and is 0"
    )


@pytest.mark.parametrize(
    ("arguments", "settings", "words"),
    [
        ({"pattern": "4:9"}, {}, "14 of 14 layers can't take their pattern .* Layer model.model.*q_proj: .*9"),
        ({"schedule": SparsitySchedule(0.1, 0.5, 0.1)}, {"max_steps": -1}, "set the Trainer's max_steps"),
        ({"schedule": SparsitySchedule(0, 0, 1)}, {}, "before the first optimizer step has no training batches"),
        ({"batches": "datamodule"}, {}, "neither the datamodule nor the LightningModule"),
        ({"monitor": "val/loss"}, {}, "no validation"),
        ({"memory_gib": 1e-9}, {}, "more than memory_gib"),
        ({"allocation": Allocation()}, {}, "2:4 in all rows of all layers leaves nothing to allocate"),
        (
            {**HALF, "sparsity": 0.97, "allocation": Allocation()},
            {},
            "0.97 leaves nothing to allocate, .* beyond 0.95:",
        ),
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


# whose length isn't known before it is asked for a batch
Silent = type("Silent", (IterableDataset,), {"__iter__": lambda _: iter(())})


@pytest.mark.parametrize(
    ("options", "padding", "activation", "words"),
    [
        ({"batches": Silent()}, 0, nn.SiLU(), "gave no batch"),
        ({}, 16, nn.SiLU(), "no token was counted at all"),
        ({"schedule": SparsitySchedule(1, 1, 1)}, 0, nn.Softplus(beta=math.nan), r"layer model\.model\.layers\."),
    ],
)
def test_no_layer_is_pruned_where_statistics_are_empty_or_broken(
    tmp_path: Path, options: dict[str, Any], padding: int, activation: nn.Module, words: str
) -> None:
    class OfAllTokens(ToyLM):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            return self(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss

    module = OfAllTokens()
    module.model.model.layers[1].mlp.act_fn = activation
    with pytest.raises(PruningError, match=words):
        trainer(tmp_path, pruning(**options), max_steps=8).fit(module, loader(64, padding=padding))
    assert all(one.weight.count_nonzero() == one.weight.numel() for one in module.modules() if type(one) is nn.Linear)


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
    what = [re.findall(r"calling its layer\) are (.*?)[,:]", text)[0] for text in said]
    assert what == ["left as they are until the next event", "pruned by magnitude"]
    assert all("6 layer(s)" in text and "extra.0, extra.1, extra.2, extra.3, extra.4, …" in text for text in said)
    first, last = callback.report.events
    assert not [layer for layer in first.layers if layer.name.startswith("extra")]
    assert [math.isnan(layer.relative_loss) for layer in last.layers].count(True) == 6
    assert math.isfinite(last.relative_loss)
    for weight, layer in zip(before, module.extra, strict=True):
        kept = layer.weight != 0
        assert torch.equal(layer.weight[kept], weight[kept])
        assert kept.float().mean() == 0.5
        size = 4 if pattern[0] == "2:4" else 64
        for values, chosen in zip(weight.abs().view(-1, size), kept.view(-1, size), strict=True):
            assert values[chosen].min() >= values[~chosen].max()


def _scan_test_module() -> ToyLM:
    """A model whose layers lose unequally much: the inputs of some are nearly of rank one."""
    module = ToyLM(tiny_llama(num_hidden_layers=3))
    module.model.model.layers[1].input_layernorm.weight.data[4:] = 1e-2
    return module


@pytest.mark.parametrize(
    ("options", "alike"),
    [
        ({}, False),
        ({"allocation": Allocation("uniform")}, True),
        ({"output_weights": "uniform"}, True),  # relative losses say too little
        ({"method": "sparsegpt"}, True),
        ({"schedule": SparsitySchedule(1, 1, 1)}, False),
        ({"schedule": SparsitySchedule(8, 8, 1), "memory_gib": 4.5e-5}, False),  # three windows of a step
        ({"schedule": SparsitySchedule(0, 0, 1), "batches": LABELLED}, False),
        ({"schedule": SparsitySchedule(0, 0, 1), "batches": UNLABELLED}, True),
        ({"schedule": SparsitySchedule(at=[2, 4, 6]), "allocation": Allocation()}, False),
        ({"schedule": SparsitySchedule(at=[0, 2, 6]), "allocation": Allocation(), "batches": LABELLED}, False),
    ],
)
def test_unstructured_layers_are_allocated_where_it_can_be_told_and_meet_the_budget(
    tmp_path: Path, options: dict[str, Any], alike: bool
) -> None:
    callback = pruning("unstructured", 0.5, **{"schedule": SparsitySchedule(4, 8, 4), **options})
    probe = ZeroProbe(callback)
    trainer(tmp_path, callback, probe, max_steps=10).fit(_scan_test_module(), loader(48))
    found, scanned = masks(callback), callback.state_dict()["sensitivities"]
    assert sum(int((~mask.keep).sum()) - mask.keep.numel() // 2 for mask in found.values()) == 0
    assert probe.checked
    sparsities = zeros_of(callback)
    if alike:
        assert set(sparsities) == {0.5}
    else:
        assert 0.05 < max(sparsities) - min(sparsities) <= 0.3 + 1e-2
        assert len(scanned) == len(found)
        assert all(min(scan[kind].values()) > 0 for scan in scanned.values() for kind in ("losses", "weighted_losses"))


def test_a_checkpoint_of_the_validation_before_a_scan_goes_on(tmp_path: Path) -> None:
    def save(fitted: Trainer, _: LightningModule) -> None:
        path = tmp_path / f"{fitted.global_step}.ckpt"
        if not path.exists():  # at the event's step, the dense model
            fitted.save_checkpoint(path)

    whole, again = (pruning(**HALF, schedule=SparsitySchedule(4, 4, 1), monitor="val/loss") for _ in range(2))
    fitted = trainer(tmp_path, whole, at("on_validation_end", save), max_steps=6)
    fitted.fit(ToyLM(), ResumableBatches(64), loader(8))
    trainer(tmp_path, again, max_steps=6).fit(ToyLM(), ResumableBatches(64), loader(8), ckpt_path=tmp_path / "4.ckpt")
    assert len(set(zeros_of(whole))) > 1
    assert all(torch.equal(mask.keep, masks(again)[name].keep) for name, mask in masks(whole).items())


@pytest.mark.parametrize(
    ("arguments", "unit"),
    [({"pattern": "2:4", "outlier_fraction": 0.25}, 48 / 2), ({"pattern": "structured", "sparsity": 0.25}, 48)],
    ids=["dense rows", "columns"],
)
def test_rows_and_columns_are_allocated_unless_layers_are_to_be_alike(
    tmp_path: Path, arguments: dict[str, Any], unit: float
) -> None:
    found = []
    for allocation in (None, Allocation("loss"), Allocation("uniform")):
        callback = pruning(**arguments, allocation=allocation)
        trainer(tmp_path, callback, max_steps=8).fit(_scan_test_module(), loader(48))
        found.append({name: mask.pattern for name, mask in masks(callback).items()})
        pattern, keeps = callback.options.pattern, [mask.keep for mask in masks(callback).values()]
        assert all(mask.pattern.violations(mask.keep) == 0 for mask in masks(callback).values())
        too_many = sum(int((~keep).sum()) - pattern.num_pruned(*keep.shape) for keep in keeps)
        assert abs(too_many) <= unit / 2  # half of a row or a column
    assert found[0] == found[1]
    assert len(set(found[0].values())) > 1
    assert set(found[2].values()) == {pattern}


def test_a_scan_respects_the_memory_and_is_the_same_in_windows(tmp_path: Path) -> None:
    found = []
    for budget in (None, 2.5 * 4 * 48 * 48 / 2**30):
        options = {"schedule": SparsitySchedule(4, 4, 1), "memory_gib": budget, "batches": LABELLED}
        callback = pruning("unstructured", 0.5, allocation=Allocation(), **options)
        trainer(tmp_path, callback, max_steps=5).fit(_scan_test_module(), loader(48))
        found.append(callback.state_dict()["sensitivities"])
        windows = [window for window in callback._run.windows if window.scans]
        assert len(windows) == (1 if budget is None else pytest.approx(8, abs=4))
    assert found[0] == found[1]
