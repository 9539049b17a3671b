"""Lightning's own callbacks beside the pruning: averages, early stopping, the best checkpoint."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
)
from torch import Tensor
from toy import ToyLM, at, grouped, loader, trainer

from thanos_lightning import CPUDeepSpeed, SparsitySchedule, ThanosPruningCallback
from thanos_lightning.checkpoints.verify import verify_checkpoint
from thanos_lightning.fit.other_callbacks import check_companions
from thanos_lightning.solver import NM


def pruning(**kwargs: Any) -> ThanosPruningCallback:
    return ThanosPruningCallback("2:4", **grouped(**{"schedule": SparsitySchedule(2, 6, 2), "steps": 2, **kwargs}))


class Scripted(ToyLM):
    """Its validation metric is what a test says, a number for each validation."""

    def __init__(self, metrics: list[float]) -> None:
        super().__init__()
        self.metrics = metrics
        self.validations = 0

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.log("val/scripted", self.metrics[min(self.validations, len(self.metrics) - 1)])
            self.validations += 1


def fit(module: LightningModule, root: Path, *callbacks: Any, resume: Path | None = None, **kwargs: Any) -> Trainer:
    settings = {"max_steps": 16, "check_val_every_n_epoch": None, "val_check_interval": 1, "enable_checkpointing": True}
    made = trainer(root, *callbacks, **{**settings, **kwargs})
    made.fit(module, loader(64), loader(4), ckpt_path=resume)
    return made


class Steps(Callback):
    """Keeps the weights that each step ends with."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.weights.append({name: weight.detach().clone() for name, weight in pl_module.named_parameters()})


@pytest.mark.parametrize("order", [0, 1])
def test_averages_have_the_zeros_and_begin_anew_at_events(tmp_path: Path, order: int) -> None:
    average: Any = EMAWeightAveraging(decay=0.5)
    callback, checked = pruning(), []

    def look(_: Trainer, pl_module: LightningModule, *__: Any) -> None:
        averaged, weights = (dict(one.named_parameters()) for one in (average._average_model.module, pl_module))
        for name in callback.state_dict()["masks"]:
            assert torch.equal(averaged[name] == 0, weights[name] == 0), name
            checked.append(name)

    callbacks = [average, callback] if order else [callback, average]
    made = fit(ToyLM(), tmp_path, *callbacks, at("on_train_batch_end", look), max_steps=12)
    made.save_checkpoint(tmp_path / "last.ckpt")
    assert len(checked) >= 8 * 14
    # the average is what the module has at the end, and what is on disk
    report = verify_checkpoint(tmp_path / "last.ckpt")
    assert all(tensor.ok for tensor in report)
    assert [tensor.pattern for tensor in report] == ["2:4"] * 14


def test_an_average_after_the_last_event_has_nothing_of_before(tmp_path: Path) -> None:
    average, steps = EMAWeightAveraging(decay=0.5), Steps()
    module = ToyLM()
    fit(module, tmp_path, pruning(), average, steps, max_steps=8)
    # the last event is after step 6, and its result is what the average begins with
    sixth, seventh, eighth = (weights["model.model.layers.0.mlp.up_proj.weight"] for weights in steps.weights[5:8])
    found = module.model.model.layers[0].mlp.up_proj.weight.detach()
    torch.testing.assert_close(found, 0.25 * sixth + 0.25 * seventh + 0.5 * eighth)


def test_averages_of_sharded_weights_and_stochastic_ones_are_refused(tmp_path: Path) -> None:
    sharded = trainer(tmp_path, EMAWeightAveraging(), strategy=CPUDeepSpeed(stage=2))
    with pytest.raises(MisconfigurationException, match="EMAWeightAveraging needs all weights on each rank"):
        check_companions(sharded, pruning())
    for order in (0, 1):
        callbacks = [pruning(), StochasticWeightAveraging(1e-3)]
        with pytest.raises(MisconfigurationException, match="StochasticWeightAveraging writes averages"):
            fit(ToyLM(), tmp_path, *(callbacks[::-1] if order else callbacks), max_epochs=2)


def test_another_pruning_callback_is_refused(tmp_path: Path) -> None:
    other = ModelPruning("l1_unstructured", amount=0.5)
    with pytest.raises(MisconfigurationException, match="ModelPruning puts masks of its own on the weights"):
        fit(ToyLM(), tmp_path, pruning(), other, max_steps=8)
    with pytest.raises(MisconfigurationException, match="more than one ThanosPruningCallback: keep one"):
        fit(ToyLM(), tmp_path, pruning(), pruning(), max_steps=8)


def test_a_trainer_of_the_other_package_is_refused() -> None:
    class Other:
        """Of a package that need not be installed."""

    Other.__module__ = "pytorch_lightning.trainer.trainer"
    with pytest.raises(MisconfigurationException, match=r"Trainer is one of pytorch_lightning: import Trainer and"):
        pruning().setup(Other(), ToyLM(), "fit")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("metrics", "saving", "settings", "saved"),
    [
        # before the last event, at step 6, the metric is better than it will ever be again
        ([1.0, 0.9, 0.8, 0.7, 0.6, 9.0, 8.0, 5.0, 6.0, 7.0], {}, {}, {8: 5.0}),
        ([9.0, 9.0, 9.0, 9.0, 9.0, 1.0, 2.0, 4.0, 3.0, 0.0], {"mode": "max", "save_top_k": 2}, {}, {8: 4.0, 9: 3.0}),
        # Lightning validates after the save of a step: the first with the metric of step 8 is that of step 9
        ([1.0, 5.0, 6.0], {"every_n_train_steps": 1}, {"max_steps": 14, "val_check_interval": 4}, {9: 5.0}),
    ],
    ids=["a minimum", "several of a maximum", "at optimizer steps"],
)
def test_the_best_checkpoint_is_neither_dense_nor_scored_by_a_validation_of_the_dense_model(
    tmp_path: Path, metrics: list[float], saving: Any, settings: Any, saved: dict[int, float]
) -> None:
    best = ModelCheckpoint(tmp_path, "{step}", monitor="val/scripted", **saving)
    fit(Scripted(metrics), tmp_path, pruning(), best, **{"max_steps": 10, **settings})
    scores = {Path(path).name: float(score) for path, score in best.best_k_models.items()}
    assert scores == {f"step={step}.ckpt": score for step, score in saved.items()}
    assert {path.name for path in tmp_path.glob("*.ckpt")} == scores.keys()
    assert float(best.best_model_score) == next(iter(saved.values()))
    assert all(tensor.ok for tensor in verify_checkpoint(best.best_model_path, pattern=NM(2, 4)))


def test_nor_by_the_loss_of_the_step_before_it_was_pruned(tmp_path: Path) -> None:
    class Worsening(ToyLM):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.log("train/scripted", 1.0 if batch_idx < 6 else 10.0 - batch_idx / 2)
            return loss

    best = ModelCheckpoint(tmp_path, "{step}", monitor="train/scripted", every_n_train_steps=1)
    fit(Worsening(), tmp_path, pruning(), best, max_steps=9)
    assert Path(best.best_model_path).name == "step=9.ckpt"
    assert float(best.best_model_score) == 6.0


@pytest.mark.parametrize(
    ("stop", "whole", "rest", "saving", "interval", "score"),
    [
        # scored too early: the last event is at step 6, and the next validation at step 8
        (7, [1.0], [5.0, 6.0], {"every_n_train_steps": 1}, 4, 5.0),
        (8, [1.0] * 6 + [5.0, 6.0], [9.0, 8.0], {}, 1, 1.0),
    ],
)
def test_a_resumed_training_forgets_and_keeps_what_the_first_would_have(
    tmp_path: Path, stop: int, whole: list[float], rest: list[float], saving: Any, interval: int, score: float
) -> None:
    for resume, metrics in ((None, whole), (tmp_path / f"step={stop}.ckpt", rest)):
        best = ModelCheckpoint(tmp_path, "best-{step}", monitor="val/scripted", **saving)
        every = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
        callbacks = (pruning(), best, every)
        fit(Scripted(metrics), tmp_path, *callbacks, resume=resume, max_steps=12, val_check_interval=interval)
    assert float(best.best_model_score) == score


def test_no_validation_since_the_last_event_is_said(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, monitor="val/scripted")
    with pytest.warns(UserWarning, match="has scored no checkpoint since the last pruning event at optimizer step 6"):
        fit(Scripted([1.0]), tmp_path, pruning(), best, max_steps=9, val_check_interval=5)


@pytest.mark.parametrize("first", [True, False])
def test_early_stopping_counts_from_the_last_event(tmp_path: Path, first: bool) -> None:
    # it gets worse from the start on: without the callback, training would end at the second validation
    metrics = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 5.9, 5.8, 5.85, 5.86, 5.87]
    stopping = EarlyStopping("val/scripted", patience=2)
    callback = pruning()
    made = fit(Scripted(metrics), tmp_path, *([stopping, callback] if first else [callback, stopping]))
    assert made.global_step == 10
    assert stopping.stopped_epoch == 0
    assert float(stopping.best_score) == pytest.approx(5.8)
    assert len(callback.report.events) == 2
    assert stopping in made.callbacks
    assert isinstance(made.callbacks[-1], ModelCheckpoint)


def test_early_stopping_comes_back_after_an_error(tmp_path: Path) -> None:
    def fail(made: Any, *_: Any) -> None:
        assert stopping not in made.callbacks
        raise RuntimeError("broken")

    stopping = EarlyStopping("val/scripted")
    made = trainer(tmp_path, stopping, pruning(), at("on_before_backward", fail), max_steps=9)
    with pytest.raises(RuntimeError, match="broken"):
        made.fit(Scripted([1.0]), loader(64), loader(4))
    assert stopping in made.callbacks


def test_all_of_them_together(tmp_path: Path) -> None:
    metrics = [0.1] * 5 + [5.0, 4.0, 3.0, 3.5, 3.6, 3.7]
    stopping, best = EarlyStopping("val/scripted", patience=2), ModelCheckpoint(tmp_path, "{step}", "val/scripted")
    average, callback = EMAWeightAveraging(decay=0.9), pruning(monitor="val/scripted")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for others in (
            "You're using the WeightAv",
            "The '.*_dataloader' does not",
            "Trying to infer the",
            ".*treespec",
        ):
            warnings.filterwarnings("ignore", others)
        made = fit(Scripted(metrics), tmp_path, stopping, average, callback, best)
    assert made.global_step < 16
    assert all(tensor.ok for tensor in verify_checkpoint(best.best_model_path, pattern=NM(2, 4)))
    assert float(best.best_model_score) == float(stopping.best_score) == 3.0
    assert callback.report.summary.recovered is not None


def test_survivors_decay_as_they_would_without_a_mask(tmp_path: Path) -> None:
    """Where the gradient is zero, a step of AdamW multiplies each weight that is kept by 1 - lr·decay."""

    class Still(ToyLM):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * 0.0

    def decaying(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.5)

    steps = Steps()
    fit(Still(make_optimizer=decaying), tmp_path, pruning(), steps, max_steps=8)
    for before, after in ((0, 1), (6, 7)):
        for name, weight in steps.weights[before].items():
            torch.testing.assert_close(steps.weights[after][name], weight * (1 - 0.1 * 0.5))


@pytest.mark.parametrize(("stop", "is_said"), [(8, True), (9, False)])
def test_a_training_that_ends_with_its_last_event_is_said(
    tmp_path: Path, stop: int, is_said: bool, recwarn: pytest.WarningsRecorder
) -> None:
    def end(made: Trainer, *_: Any) -> None:
        made.should_stop = made.global_step >= stop

    schedule = SparsitySchedule(2, 8, 3)
    fit(ToyLM(), tmp_path, pruning(schedule=schedule), at("on_train_batch_end", end), max_steps=20)
    said = [str(warning.message) for warning in recwarn if "no step was left" in str(warning.message)]
    assert len(said) == is_said
    assert all("with its last event, at optimizer step 8" in message for message in said)
