from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model, inject_adapter_in_model
from peft.tuners import lora
from torch import nn
from toy import tiny_llama

from thanos_lightning.layers.lora import adapters_of, mask_adapters
from thanos_lightning.layers.targets import find_targets, matches, uncalled_layers
from thanos_lightning.plan.options import TargetOverride, assign_patterns
from thanos_lightning.solver import NM, Unstructured


def test_layers_of_llama_are_in_order_without_the_head() -> None:
    layers = find_targets(tiny_llama())
    attention, mlp = ([f"{part}_proj" for part in parts.split()] for parts in ("q k v o", "gate up down"))
    names = [*(f"self_attn.{name}" for name in attention), *(f"mlp.{name}" for name in mlp)]
    assert list(layers) == [f"model.layers.{block}.{name}" for block in range(2) for name in names]
    assert find_targets(tiny_llama(), ignore=["lm_head", "*norm", "embed_tokens"]).keys() == layers.keys()
    down = layers["model.layers.1.mlp.down_proj"]
    assert (down.rows, down.cols, down.transposed) == (32, 48, False)
    assert down.parameter_name in dict(tiny_llama().named_parameters())
    assert "lm_head" in find_targets(tiny_llama(tie_word_embeddings=False), ignore=[])  # a head of its own can be


MATCHING = "* mlp.up_proj *.up_proj up_proj model.layers.[0-3].* re:model.layers.0.mlp.(up|gate)_proj re:.*up_proj"
OTHER = "lm_head up_pro model.layers.[4-9].* re:up_proj"


def test_expressions() -> None:
    for expressions, expected in ((MATCHING, True), (OTHER, False)):
        for expression in expressions.split():
            assert matches("model.layers.0.mlp.up_proj", expression) is expected, expression


def test_all_layers_that_can_not_be_pruned_are_said_at_once() -> None:
    model = nn.Sequential(nn.Linear(8, 10), *(nn.Linear(10, 10) for _ in range(6)))
    with pytest.raises(ValueError, match=r"6 of 7 .* pattern \(1, 2, 3, … \(6 in all\)\). L.* 1: .*10.* Or add them"):
        assign_patterns(find_targets(model), NM(2, 4))
    for layer in model[4:]:
        nn.utils.parametrizations.weight_norm(layer)
    with pytest.raises(ValueError, match=r"3 target\(s\) have a weight that is computed.*: 4, 5, 6. Remove it"):
        find_targets(model)


class WithTeacher(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.teacher = tiny_llama().requires_grad_(False)
        self.model = tiny_llama()


def test_a_frozen_teacher_is_pruned_if_it_is_named() -> None:
    assert all(name.startswith("model.") for name in find_targets(WithTeacher(), ignore=["lm_head", "teacher.*"]))
    assert any(name.startswith("teacher.") for name in find_targets(WithTeacher(), ["teacher.*", "*"]))
    assert len(find_targets(tiny_llama().requires_grad_(False))) == 14  # nothing beside it is trained


def adapted(**config: Any) -> nn.Module:
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["up_proj", "k_proj"], **config))
    mask_adapters(model)
    return model


def test_an_adapted_layer_keeps_its_name_and_its_adapter_is_no_target() -> None:
    layers = find_targets(adapted(), ["*.mlp.*"])
    name = "base_model.model.model.layers.0.mlp.up_proj"
    assert list(layers)[:3] == [name.replace("up_", part) for part in ("gate_", "up_", "down_")]
    assert layers[name].parameter_name == f"{name}.base_layer.weight"
    (one,) = adapters_of(layers[name])
    assert (one.up.name, one.down.cols, one.scale) == (f"{name}.lora_B.default", 32, 4.0)
    assert len(layers) == 6
    assert len(find_targets(adapted())) == 14


def ia3() -> nn.Module:
    return get_peft_model(tiny_llama(), IA3Config(target_modules=["up_proj"], feedforward_modules=["up_proj"]))


@pytest.mark.parametrize("make", [partial(adapted, use_dora=True), ia3])
def test_adapters_elsewhere_are_none_of_our_business(make: Callable[[], nn.Module]) -> None:
    assert len(find_targets(make(), ["*.mlp.down_proj"])) == 2


def merged() -> nn.Module:
    model = adapted()
    model.merge_adapter()
    return model


def test_an_adapter_that_is_not_active_is_refused() -> None:
    model = adapted()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["up_proj"]))
    with pytest.raises(ValueError, match=r"up_proj has inactive ones beside it \(other\).*delete_adapter"):
        find_targets(model)
    model.delete_adapter("other")
    assert len(find_targets(model)) == 14


def adapted_anew() -> nn.Module:
    model = adapted()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["up_proj"], use_dora=True))
    model.delete_adapter("default")
    model.set_adapter("other")
    return model


def test_a_layer_that_does_more_than_multiply_is_not_masked() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model = nn.ModuleDict({"up": Doubled(4, 4), "down": nn.Linear(4, 4)})
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["up", "down"], init_lora_weights=False), model)
    x = torch.randn(3, 4)
    before = model["up"](x)
    mask_adapters(model)
    assert torch.equal(model["up"](x), before)
    with pytest.raises(ValueError, match=r"adapter of up \(lora\.layer\.Linear\) .*or its layer more than multiply"):
        find_targets(model)
    assert list(find_targets(model, ["down"])) == ["down"]


def adapted_twins() -> nn.Module:
    model = nn.ModuleDict({"one": nn.Linear(4, 4), "two": nn.Linear(4, 4)})
    model["two"].weight = model["one"].weight
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["one", "two"]), model)
    mask_adapters(model)
    return model


@pytest.mark.parametrize("saved", ["lm_head", "down_proj"])
def test_copies_that_peft_trains_are_no_targets(saved: str) -> None:
    layers = find_targets(adapted(modules_to_save=[saved]))
    assert len(layers) == (14 if saved == "lm_head" else 12)
    assert not any("original_module" in name or "modules_to_save" in name for name in layers)


def four_bits() -> nn.Module:
    model = adapted()
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    layer.__class__ = lora.layer.Linear  # peft has a layer of its own for them
    layer.base_layer.__class__ = type("Linear4bit", (nn.Linear,), {"__module__": "bitsandbytes.nn.modules"})
    return model


def test_what_attention_reads_without_a_call_is_left_out() -> None:
    model = nn.TransformerEncoderLayer(8, nhead=2, dim_feedforward=16)
    assert list(find_targets(model)) == ["linear1", "linear2"]
    assert uncalled_layers(model) == ["self_attn.out_proj"]
    assert uncalled_layers(model, ["linear*"]) == uncalled_layers(model, ignore=["self_attn.*"]) == []


def quantised() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    return model


def twins() -> nn.Module:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    model[2].weight, model[3].weight = model[0].weight, model[1].weight
    return model


LORA = r".*take plain LoRA .*or add 'base_model.*_proj' to ignore"


@pytest.mark.parametrize(
    ("make", "targets", "ignore", "message"),
    [
        (tiny_llama, ["*.up_proj", "*.qproj"], [], r"'\*\.qproj' matches no prunable layer.*q_proj"),
        (tiny_llama, "*", ["*"], "leave no layer to prune"),
        (tiny_llama, "*", ["lm_haed"], r"ignore 'lm_haed' matches no layer \(did you mean 'lm_head'\?\)"),
        (tiny_llama, "*", ["*.qproj"], r"did you mean 'q_proj'\?"),
        (tiny_llama, "*", ["xyz"], r"'xyz' matches no layer: correct it or leave it out. The model has: model\.layers"),
        (tiny_llama, "*", ["model.layers.0"], r"inside of it, which would be pruned: write 'model\.layers\.0\.\*'"),
        (tiny_llama, "*", [], r"lm_head shares its weight with model.embed_tokens.*Add 'lm_head' to ignore"),
        (twins, ["0", "1"], [], "layer 0 shares its weight with 2, layer 1 shares its weight with 3, which are"),
        (twins, "*", ["2"], "layer 0 shares its weight with 2, which is"),
        (WithTeacher, "*", ["lm_head"], r"layers of 'teacher' too, a model of which nothing is trained"),
        (partial(nn.TransformerEncoderLayer, 8, 2), "*.out_proj", [], "no prunable .* not of nn.MultiheadAttention"),
        (quantised, "*", [], "quantised"),
        (partial(adapted, use_dora=True), "*", [], rf"k_proj \(.*Linear, DoraLinearVariant\) does more than add{LORA}"),
        (ia3, "*.up_proj", [], rf"up_proj \(ia3\.layer\.Linear\) does more than add{LORA}"),
        (adapted_anew, "*.up_proj", [], r"up_proj \(.*MaskedLora, DoraLinearVariant\) does more than add"),
        (merged, "*.k_proj", [], r"k_proj is merged already: call unmerge_adapter"),
        (adapted_twins, "*", [], "layers one, two share a weight and have adapters"),
        (four_bits, "*.mlp.*", [], r"up_proj is on a Linear4bit of bitsandbytes, which can't be pruned: load it in"),
    ],
)
def test_what_can_not_be_pruned_as_asked_is_refused(
    make: Callable[[], nn.Module], targets: str | list[str], ignore: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        find_targets(make(), targets, ignore)


def test_overrides() -> None:
    layers = find_targets(tiny_llama())
    overrides = [TargetOverride(["mlp.*"], "unstructured", 0.7), TargetOverride(["layers.1.mlp.up_proj"], "4:8")]
    patterns = assign_patterns(layers, NM(2, 4), overrides)
    assert patterns["model.layers.0.self_attn.q_proj"] == NM(2, 4)
    assert patterns["model.layers.0.mlp.up_proj"] == Unstructured(0.7)
    assert patterns["model.layers.1.mlp.up_proj"] == NM(4, 8)
    with pytest.raises(ValueError, match="override target 'mpl' matches none"):
        assign_patterns(layers, NM(2, 4), [TargetOverride(["mpl"], "4:8")])
