from __future__ import annotations

from dataclasses import replace

import pytest
from peft import LoraConfig, inject_adapter_in_model
from tiny_mixtures import tiny_mixture
from torch import nn
from toy import tiny_gpt2, tiny_llama

from thanos_lightning import mask_adapters
from thanos_lightning.layers.census import take_census
from thanos_lightning.layers.targets import find_targets


def test_weights_are_counted_once_by_what_they_are() -> None:
    model = tiny_llama()
    census = take_census(model, find_targets(model))
    assert census.model_weights == model.num_parameters()
    assert (census.num_targets, census.num_prunable, census.prunable) == (14, 15, "Linear")
    assert census.target_weights + sum(census.dense.values()) == census.model_weights
    assert list(census.dense) == ["embeddings", "norms", "lm_head"]
    assert census.dense["lm_head"] == 0
    assert census.share == pytest.approx(census.target_weights / census.model_weights)
    other = tiny_gpt2()
    census = take_census(other, find_targets(other))
    assert census.prunable == "Conv1D and Linear"
    assert {"embeddings", "biases", "norms"} <= set(census.dense)


def test_what_cannot_be_pruned_is_named() -> None:
    parts = {"conv": nn.Conv2d(3, 8, 3), "norm": nn.BatchNorm2d(8), "attention": nn.MultiheadAttention(8, 2)}
    model = nn.ModuleDict({**parts, "fc": nn.Linear(8, 4)})
    census = take_census(model, find_targets(model, targets="fc"))
    assert census.num_prunable == 1
    assert census.dense["Conv2d"] == 216
    assert census.dense["MultiheadAttention's in_proj"] == 3 * 64 + 24
    assert census.shares().startswith("Conv2d (")


def test_fused_experts_are_named() -> None:
    model = tiny_mixture(num_hidden_layers=1)
    every = take_census(model, find_targets(model))
    assert every.target_weights == 8 * 3 * 16 * 24 + 16 * 16 * 2 + 16 * 8 * 2
    assert "fused experts" not in every.dense
    census = take_census(model, find_targets(model, ignore=["re:.*experts[.][1-7].*", "lm_head"]))
    assert census.share < 0.5
    assert census.shares().startswith("fused experts (66%)")
    assert census.dense["fused experts"] == 7 * 3 * 16 * 24
    assert census.model_weights == every.model_weights


def test_adapters_are_no_weights_of_the_model() -> None:
    model = tiny_llama()
    before = take_census(model, find_targets(model, ignore="lm_head"))
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), model)
    mask_adapters(model)
    census = take_census(model, find_targets(model, ignore="lm_head"))
    assert (census.num_adapted, census.num_targets) == (2, 14)
    assert census.adapters == 2 * 2 * (32 + 32)
    assert replace(census, adapters=0, num_adapted=0) == before
