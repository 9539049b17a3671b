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


def window(module: ToyLM, *, gradients: bool = False, scans: bool = False) -> Window:
    patterns = dict.fromkeys(find_targets(module, "*", "lm_head"), Unstructured(0.5))
    return Window(Event(3, 1.0), patterns, 0, 3, is_last=True, scans=scans, gradients=gradients)


def trained(module: ToyLM, of: Window, batches: list[dict[str, Tensor]], **settings: Any) -> Collector:
    """What has collected in a training on the batches."""
    collecting = collector(module, **settings)
    collecting.open(of, module)
    for number, batch in enumerate(batches):
        collecting.begin(batch, number)
        loss = module(**batch).loss
        collecting.end()
        module(input_ids=batch["input_ids"] * 0)  # what runs after the training step is not counted
        loss.backward()
    return collecting


def moments(collected: Moments) -> Tensor:
    assert collected.accumulators is not None
    return collected.accumulators[LAYER].compute()


def test_training_batches_and_a_calibration_set_say_the_same(module: ToyLM, fitted: Trainer) -> None:
    collecting = trained(module, window(module), BATCHES)
    found = collecting.take(window(module), fitted, module)
    assert found.seconds > 0
    assert found.output_weights == {}
    assert collecting.statistics is None
    told = collector(module, batches=BATCHES).take(window(module), fitted, module)
    torch.testing.assert_close(moments(told), moments(found))


def test_what_waits_for_an_event_does_not_outlive_the_training(module: ToyLM, fitted: Trainer) -> None:
    scan = window(module, gradients=True, scans=True)
    collecting = trained(module, scan, BATCHES)
    assert collecting.take(scan, fitted, module).stay
    collecting.stop()
    with pytest.raises(PruningError, match="step 3 is due, but its statistics were not collected"):
        collecting.take(window(module, gradients=True), fitted, module)


@pytest.mark.parametrize("keeps", [True, False])
def test_an_event_takes_what_its_scan_was_told_by_the_training(module: ToyLM, fitted: Trainer, keeps: bool) -> None:
    scan = window(module, gradients=True, scans=True)
    collecting = trained(module, scan, BATCHES, memory_gib=None if keeps else 1.0)
    of_inputs = 0.0 if collecting.statistics is None else collecting.statistics.stopwatch.seconds()
    looked = collecting.take(scan, fitted, module)
    assert looked.seconds > of_inputs > 0
    if keeps:
        pruned = collecting.take(window(module, gradients=True), fitted, module)
        assert torch.equal(moments(looked), moments(pruned))
        torch.testing.assert_close(pruned.output_weights, looked.output_weights, rtol=0, atol=0)
        assert pruned.seconds == 0  # they are told of once
    # of weights that are others by now
    with pytest.raises(PruningError, match="its statistics were not collected"):
        collecting.take(window(module, gradients=True), fitted, module)


def test_an_event_takes_what_its_scan_was_told_of_a_calibration_set(module: ToyLM, fitted: Trainer) -> None:
    for budget in (None, 1.0):  # of which not all may be held at once
        collecting = collector(module, batches=BATCHES, memory_gib=budget)
        windows = [window(module, gradients=True, scans=number == 0) for number in range(3)]
        looked, pruned, later = (collecting.take(one, fitted, module).accumulators or {} for one in windows)
        assert (pruned[LAYER] is looked[LAYER]) == (budget is None)
        assert later[LAYER] is not pruned[LAYER]


def test_padding_does_not_count(module: ToyLM, fitted: Trainer) -> None:
    padded = list(loader(8, padding=6))
    for key, number in (("attention_mask", 8 * 10), (None, 8 * 16)):
        collecting = trained(module, window(module), padded, attention_mask_key=key)
        accumulators = collecting.take(window(module), fitted, module).accumulators
        assert accumulators is not None
        assert accumulators[LAYER].num_tokens == number
    with pytest.warns(UserWarning, match="the batches have no 'mask', so every token counts") as caught:
        trained(module, window(module), padded, attention_mask_key="mask")
    assert sum("the batches have no 'mask'" in str(one.message) for one in caught) == 1


class Scored(ToyLM):
    """Reads embeddings, and no scores."""

    def forward(self, **batch: Tensor) -> Any:
        return self.model(inputs_embeds=batch["embeddings"], labels=batch["labels"])


@pytest.mark.parametrize("of_training", [True, False])
def test_nan_in_data_is_named_with_its_batch(fitted: Trainer, of_training: bool) -> None:
    module = Scored()
    batches = [
        {
            "embeddings": module.model.get_input_embeddings()(batch["input_ids"]).detach(),
            "labels": batch["labels"],
            "scores": torch.full((2, 1), torch.nan),
        }
        for batch in BATCHES
    ]

    def take() -> Moments:
        collecting = collector(module, batches=None if of_training else batches)
        if of_training:
            collecting.open(window(module), module)
            for number, batch in enumerate(batches):
                collecting.begin(batch, number)
                module(**batch)
                collecting.end()
        return collecting.take(window(module), fitted, module)

    assert moments(take()).isfinite().all()  # no layer reads the scores
    batches[2]["embeddings"][0, 3, 0] = torch.nan
    kind = "training" if of_training else "calibration"
    told = (
        rf"^{kind} batch 0 holds NaN in batch\['scores'\], {kind} batch 2 holds NaN in batch\['embeddings'\], "
        "and so do the inputs of layer"
    )
    with pytest.raises(PruningError, match=told):
        take()
