"""Adapters that keep zeros, against the weight that they stand for: W + M ∘ (scale · B A), in float64."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from thanos_lightning.layers import masked_lora
from thanos_lightning.layers.lora import MaskedAdapter, mask_adapters, tuner_layers
from thanos_lightning.solver import zeros
from thanos_lightning.solver.zeros import effective


class Layer(nn.Module):
    def __init__(self, rows: int, cols: int, seed: int = 0, *, transposed: bool = False, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layer = Conv1D(rows, cols) if transposed else nn.Linear(cols, rows, bias=bias)
        self.layer.weight.data *= torch.rand_like(self.layer.weight) < 0.5

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def masked(rows: int, cols: int, rank: int, seed: int = 0, *, of_layer: Any = None, **config: Any) -> Any:
    settings = {"lora_alpha": 3, "target_modules": ["layer"], "init_lora_weights": False, **config}
    model = get_peft_model(Layer(rows, cols, seed, **(of_layer or {})), LoraConfig(r=rank, **settings))
    mask_adapters(model)
    return model


def layer_of(model: Any) -> Any:
    return next(iter(tuner_layers(model).values()))


def merged_weight(layer: Any, *names: str) -> Tensor:
    """(in, out) where the layer has it so."""
    weight = layer.get_base_layer().weight
    added = sum(layer.scaling[name] * layer.lora_B[name].weight @ layer.lora_A[name].weight for name in names)
    return weight + (weight != 0) * (added.T if isinstance(layer.get_base_layer(), Conv1D) else added)


def computed(layer: Any, x: Tensor, *names: str) -> Tensor:
    return nn.functional.linear(x, merged_weight(layer, *names), layer.get_base_layer().bias)


@given(
    rows=st.integers(1, 9), cols=st.integers(1, 9), rank=st.integers(1, 4), seed=st.integers(0, 99), conv=st.booleans(),
    trains=st.booleans(),
)  # fmt: skip
def test_outputs_and_gradients_are_those_of_the_merged_weight(
    rows: int, cols: int, rank: int, seed: int, conv: bool, trains: bool
) -> None:
    model = masked(rows, cols, rank, seed, of_layer={"transposed": conv}).double()
    layer = layer_of(model)
    assert isinstance(layer, MaskedAdapter)
    x = torch.randn(2, 3, cols, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 3, rows, dtype=torch.float64)
    learnt = [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    if trains:  # the base, too
        learnt += [one.requires_grad_(True) for one in layer.get_base_layer().parameters()]
    output = model(x)
    found = torch.autograd.grad(output, learnt, upstream)
    weight = merged_weight(layer, "default")
    expected = nn.functional.linear(x, weight.T if conv else weight, layer.get_base_layer().bias)
    torch.testing.assert_close(output, expected)
    for own, reference in zip(found, torch.autograd.grad(expected, learnt, upstream), strict=True):
        torch.testing.assert_close(own, reference)


def test_several_adapters_are_added_and_inactive_ones_are_not() -> None:
    model = masked(5, 7, 2)
    model.add_adapter("other", LoraConfig(r=3, target_modules=["layer"], init_lora_weights=False))
    layer, x = layer_of(model), torch.randn(4, 7)
    for active in (["default"], ["other"], ["default", "other"]):
        layer.set_adapter(active)
        torch.testing.assert_close(model(x), computed(layer, x, *active))
    with model.disable_adapter():
        torch.testing.assert_close(model(x), layer.get_base_layer()(x))


def test_dropout_is_of_what_the_adapter_adds() -> None:
    model = masked(5, 7, 2, lora_dropout=0.5)
    layer, x = layer_of(model), torch.randn(4, 7)
    torch.manual_seed(1)
    output = model(x)
    torch.manual_seed(1)
    dropped = nn.functional.dropout(x, 0.5)
    base = layer.get_base_layer()
    added = merged_weight(layer, "default") - base.weight
    torch.testing.assert_close(output, base(x) + dropped @ added.T)
    model.eval()
    torch.testing.assert_close(model(x), computed(layer, x, "default"))


@pytest.mark.parametrize("safe", [False, True])
def test_what_peft_merges_keeps_zeros_and_can_be_taken_out_again(safe: bool) -> None:
    model = masked(32, 64, 4)
    x = torch.randn(4, 64)
    output, layer = model(x), layer_of(model)
    before = layer.weight.detach().clone()
    model.merge_adapter(safe_merge=safe)
    torch.testing.assert_close(layer.weight == 0, before == 0)
    torch.testing.assert_close(model(x), output)
    model.unmerge_adapter()
    torch.testing.assert_close(layer.weight, before)
    assert bool((layer.weight[before == 0] == 0).all())


def test_autocast_multiplies_in_16_bits_by_the_weight_that_is_rounded_once() -> None:
    model = masked(32, 64, 4)
    layer, x = layer_of(model), torch.randn(4, 64)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x)
    weight = effective(layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight * 0.75).bfloat16()
    expected = nn.functional.linear(x.bfloat16(), weight, layer.get_base_layer().bias.bfloat16())
    assert torch.equal(output, expected)
    output.float().sum().backward()
    assert layer.lora_A["default"].weight.grad.dtype == torch.float32


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("recomputes", [False, True])
def test_the_effective_weight_is_made_once_forward_and_once_backward(
    recomputes: bool, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = masked(16, 16, 2, lora_dropout=dropout)
    model.add_adapter("other", LoraConfig(r=3, target_modules=["layer"], init_lora_weights=False, lora_dropout=dropout))
    layer_of(model).set_adapter(["default", "other"])
    each = 2 if dropout else 1  # dropout is each adapter's own
    made: list[torch.dtype] = []

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        found = effective(*args, **kwargs)
        made.append(found.dtype)
        return found

    gradients = []
    for checkpointed in (False, recomputes):
        monkeypatch.setattr(masked_lora, "effective", counted)
        made.clear()
        torch.manual_seed(1)
        x = torch.randn(4, 16, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            output = checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)
        forward = len(made)
        output.float().square().sum().backward()
        assert forward == each
        assert len(made) - forward == each
        assert set(made) == {torch.bfloat16}
        gradients.append(x.grad)
        assert not masked_lora._recomputed
    assert torch.equal(*gradients)


def test_large_weights_are_the_sums_of_their_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zeros, "_ENTRIES_AT_ONCE", 21)
    weight, down, up = torch.randn(10, 7) * (torch.rand(10, 7) < 0.5), torch.randn(2, 7), torch.randn(10, 2)
    whole = effective(weight, down, up, dtype=torch.bfloat16)
    expected = (weight != 0) * (weight.double() + up.double() @ down.double())
    torch.testing.assert_close(whole.double(), expected, rtol=2**-8, atol=0)
    assert torch.equal(whole == 0, weight == 0)


def test_a_copy_has_an_adapter_of_its_own() -> None:
    model = masked(5, 7, 2)
    x = torch.randn(4, 7)
    output = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), output)
        layer_of(other).lora_B["default"].weight.data.zero_()
        assert not torch.equal(other(x), output)
    assert torch.equal(model(x), output)


def test_what_is_not_plain_stays_as_it_is() -> None:
    for config in ({"use_dora": True}, {"lora_bias": True}):
        assert not isinstance(layer_of(masked(5, 7, 2, **config)), MaskedAdapter)


def test_adapters_by_sample_are_refused() -> None:
    model = masked(5, 7, 2)
    with pytest.raises(ValueError, match="masked adapters can't differ within a batch"):
        layer_of(model)(torch.randn(2, 7), adapter_names=["default", "__base__"])
