from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from toy import ToyLM, loader, trainer

from thanos_lightning import CalibrationOptions
from thanos_lightning.collect.collector import Collector, Moments
from thanos_lightning.layers.targets import find_targets
from thanos_lightning.plan.schedule import Event
from thanos_lightning.plan.windows import Window
from thanos_lightning.ranks.access import ParameterAccess
from thanos_lightning.ranks.talk import PruningError
from thanos_lightning.solver import Unstructured

BATCHES = list(loader(12))
LAYER = "model.model.layers.1.mlp.down_proj"
pytestmark = pytest.mark.usefixtures("compiling")


@pytest.fixture
def module() -> ToyLM:
    return ToyLM()


@pytest.fixture
def fitted(tmp_path: Path, module: ToyLM) -> Trainer:
    """A Trainer that knows how to move a batch and to call the module."""
    made = trainer(tmp_path, max_steps=1)
    made.fit(module, loader(4))
    return made


def collector(module: ToyLM, **settings: Any) -> Collector:
    options = CalibrationOptions(**{"attention_mask_key": None, **settings})
    return Collector(find_targets(module, "*", "lm_head"), ParameterAccess(), options, {}, 0)


def window(module: ToyLM, *, scans: bool = False, gradients: bool = False) -> Window:
    patterns = dict.fromkeys(find_targets(module, "*", "lm_head"), Unstructured(0.5))
    return Window(Event(3, 1.0), patterns, 0, 3, is_last=True, scans=scans, gradients=gradients)


def train_on(module: ToyLM, collecting: Collector, batches: list[dict[str, Tensor]]) -> None:
    for batch in batches:
        collecting.begin(batch)
        loss = module(**batch).loss
        collecting.end()
        module(input_ids=batch["input_ids"] * 0)  # what runs after the training step is not counted
        loss.backward()


def moments(collected: Moments) -> Tensor:
    assert collected.accumulators is not None
    return collected.accumulators[LAYER].compute()


def test_training_batches_and_a_calibration_set_say_the_same(module: ToyLM, fitted: Trainer) -> None:
    collecting = collector(module)
    collecting.open(window(module), module)
    train_on(module, collecting, BATCHES)
    trained = collecting.take(window(module), fitted, module)
    assert trained.seconds > 0
    assert trained.output_weights == {}
    assert collecting.statistics is None
    told = collector(module, batches=BATCHES).take(window(module), fitted, module)
    torch.testing.assert_close(moments(told), moments(trained))


def test_what_waits_for_an_event_does_not_outlive_the_training(module: ToyLM, fitted: Trainer) -> None:
    collecting = collector(module)
    collecting.open(window(module, scans=True, gradients=True), module)
    train_on(module, collecting, BATCHES)
    assert collecting.take(window(module, scans=True, gradients=True), fitted, module).stay
    collecting.stop()
    with pytest.raises(PruningError, match="step 3 is due, but its statistics were not collected"):
        collecting.take(window(module, gradients=True), fitted, module)


@pytest.mark.parametrize("keeps", [True, False])
def test_an_event_takes_what_its_scan_was_told_by_the_training(module: ToyLM, fitted: Trainer, keeps: bool) -> None:
    collecting = collector(module, memory_gib=None if keeps else 1.0)
    collecting.open(window(module, scans=True, gradients=True), module)
    train_on(module, collecting, BATCHES)
    of_inputs = 0.0 if collecting.statistics is None else collecting.statistics.stopwatch.seconds()
    looked = collecting.take(window(module, scans=True, gradients=True), fitted, module)
    assert looked.seconds > of_inputs > 0
    if keeps:
        pruned = collecting.take(window(module, gradients=True), fitted, module)
        assert torch.equal(moments(looked), moments(pruned))
        assert all(torch.equal(one, pruned.output_weights[name]) for name, one in looked.output_weights.items())
        assert pruned.seconds == 0  # they are told of once
    # of weights that are others by now
    with pytest.raises(PruningError, match="its statistics were not collected"):
        collecting.take(window(module, gradients=True), fitted, module)


def test_padding_does_not_count(module: ToyLM, fitted: Trainer) -> None:
    padded = list(loader(8, padding=6))
    found = []
    for key in ("attention_mask", None):
        collecting = collector(module, attention_mask_key=key)
        collecting.open(window(module), module)
        train_on(module, collecting, padded)
        accumulators = collecting.take(window(module), fitted, module).accumulators
        assert accumulators is not None
        found.append(accumulators[LAYER].num_tokens)
    assert found == [8 * 10, 8 * 16]
    masked = collector(module, attention_mask_key="mask")
    masked.open(window(module), module)
    with pytest.warns(UserWarning, match="the batches have no 'mask', so every token counts") as caught:
        train_on(module, masked, padded)
    assert sum("the batches have no 'mask'" in str(one.message) for one in caught) == 1
