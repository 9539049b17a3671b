from __future__ import annotations

import pytest
import torch
from torch import nn
from toy import tiny_gpt2, tiny_llama

from thanos_lightning.models.targets import find_targets, matches, refuse_compiled, uncalled_layers
from thanos_lightning.plan.overrides import TargetOverride, assign_patterns
from thanos_lightning.solver import NM, Unstructured


def test_llama_layers_in_order_without_the_head() -> None:
    layers = find_targets(tiny_llama())
    assert list(layers)[:7] == [
        f"model.layers.0.{name}"
        for name in (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        )
    ]
    assert len(layers) == 14
    down = layers["model.layers.1.mlp.down_proj"]
    assert (down.rows, down.cols, down.transposed) == (32, 48, False)
    assert down.parameter_name in dict(tiny_llama().named_parameters())


def test_conv1d_is_oriented() -> None:
    model = tiny_gpt2()
    layer = find_targets(model)["transformer.h.0.attn.c_attn"]
    assert (layer.rows, layer.cols, layer.transposed) == (96, 32, True)
    assert layer.oriented(layer.parameter).shape == (96, 32)
    inputs = torch.randn(3, 32)
    module = layer.modules[0]
    torch.testing.assert_close(module(inputs), inputs @ layer.oriented(layer.parameter).T + module.bias)


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("lm_head", False),
        ("*", True),
        ("mlp.up_proj", True),
        ("*.up_proj", True),
        ("up_proj", True),
        ("up_pro", False),
        ("model.layers.[0-3].*", True),
        ("model.layers.[4-9].*", False),
        ("re:model.layers.0.mlp.(up|gate)_proj", True),
        ("re:up_proj", False),
        ("re:.*up_proj", True),
    ],
)
def test_expressions(expression: str, expected: bool) -> None:
    assert matches("model.layers.0.mlp.up_proj", expression) is expected


def test_a_lone_string_is_one_expression() -> None:
    assert len(find_targets(tiny_llama(), "mlp.*")) == 6  # type: ignore[arg-type]


def test_every_target_must_match() -> None:
    with pytest.raises(ValueError, match=r"'\*\.qproj' matches no prunable layer.*q_proj"):
        find_targets(tiny_llama(), ["*.up_proj", "*.qproj"])


def test_ignoring_all_is_an_error() -> None:
    with pytest.raises(ValueError, match="leave no layer to prune"):
        find_targets(tiny_llama(), ignore=["*"])


def test_bad_expressions() -> None:
    with pytest.raises(ValueError, match="not a regular expression"):
        find_targets(tiny_llama(), ["re:("])
    with pytest.raises(ValueError, match="targets holds 3"):
        find_targets(tiny_llama(), [3])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("lm_haed", r"ignore 'lm_haed' matches no layer \(did you mean 'lm_head'\?\)"),
        ("*.qproj", r"did you mean 'q_proj'\?"),
        ("xyz", r"ignore 'xyz' matches no layer: correct it or leave it out. The model has: model\.layers"),
        ("model.layers.0", r"none of the layers inside of it, which would be pruned: write 'model\.layers\.0\.\*'"),
    ],
)
def test_what_is_to_be_ignored_must_be_there(expression: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        find_targets(tiny_llama(), ignore=["lm_head", expression])
    find_targets(tiny_llama(), ignore=["lm_head", "*norm", "embed_tokens"])  # dense in any case
    find_targets(nn.Sequential(nn.Linear(4, 4)), ignore=["lm_head"])  # the default, which not all models have


def test_all_layers_that_can_not_be_pruned_are_said_at_once() -> None:
    model = nn.Sequential(*(nn.Linear(10, 10) for _ in range(6)))
    with pytest.raises(
        ValueError, match=r"6 of 6 layers can't take their pattern \(0, 1, 2, … \(6 in all\)\). Layer 0:"
    ):
        assign_patterns(find_targets(model), NM(2, 4))
    for layer in model[3:]:
        nn.utils.parametrizations.weight_norm(layer)
    with pytest.raises(ValueError, match=r"3 target\(s\) have a weight that is computed.*: 3, 4, 5. Remove it"):
        find_targets(model)
    twins = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    twins[2].weight, twins[3].weight = twins[0].weight, twins[1].weight
    with pytest.raises(
        ValueError, match="layer 0 shares its weight with 2, layer 1 shares its weight with 3, which are"
    ):
        find_targets(twins, ["0", "1"])


def test_a_tied_head_is_not_pruned_by_accident() -> None:
    with pytest.raises(ValueError, match=r"lm_head shares its weight with model.embed_tokens.*Add 'lm_head' to ignore"):
        find_targets(tiny_llama(), ignore=[])
    assert "lm_head" in find_targets(tiny_llama(tie_word_embeddings=False), ignore=[])


def test_layers_with_one_weight_are_one_target() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    (layer,) = find_targets(model).values()
    assert layer.name == "0"
    assert layer.modules == (model[0], model[2])


def test_a_shared_weight_with_an_ignored_layer_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match="layer 0 shares its weight with 1"):
        find_targets(model, ignore=["1"])


class WithTeacher(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.teacher = tiny_llama().requires_grad_(False)
        self.model = tiny_llama()


def test_a_frozen_teacher_is_not_pruned_by_accident() -> None:
    with pytest.raises(ValueError, match=r"layers of 'teacher' too, a model of which nothing is trained"):
        find_targets(WithTeacher())
    assert all(name.startswith("model.") for name in find_targets(WithTeacher(), ignore=["lm_head", "teacher.*"]))
    assert any(name.startswith("teacher.") for name in find_targets(WithTeacher(), ["teacher.*", "*"]))
    assert len(find_targets(tiny_llama().requires_grad_(False))) == 14  # nothing beside it is trained


class Adapted(nn.Module):
    """A layer as peft replaces it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(layer.in_features, 4)})


def test_adapters_and_what_they_adapt_are_not_pruned_by_accident() -> None:
    model = tiny_llama()
    model.model.layers[0].mlp.up_proj = Adapted(model.model.layers[0].mlp.up_proj)
    for ignore in (["lm_head"], ["lm_head", "*lora_*"]):
        with pytest.raises(
            ValueError, match=r"such as model.*up_proj\.base_layer, and merging.*merge before the training"
        ):
            find_targets(model, ignore=ignore)
    assert len(find_targets(model, ignore=["lm_head", "*lora_*", "*.base_layer"])) == 13
    with pytest.warns(UserWarning, match=r"1 target\(s\) have LoRA adapters \(model\.layers\.0\.mlp\.up_proj\.base"):
        assert len(find_targets(model, ["*.up_proj.*"], ignore=["*lora_*"])) == 1


def test_what_attention_reads_without_a_call_is_left_out() -> None:
    model = nn.TransformerEncoderLayer(8, nhead=2, dim_feedforward=16)
    assert list(find_targets(model)) == ["linear1", "linear2"]
    assert uncalled_layers(model) == ["self_attn.out_proj"]
    assert uncalled_layers(model, ["linear*"]) == uncalled_layers(model, ignore=["self_attn.*"]) == []
    with pytest.raises(ValueError, match=r"target '\*\.out_proj' means only what torch's MultiheadAttention reads"):
        find_targets(model, ["linear1", "*.out_proj"])


def test_compiled_modules_are_refused_where_a_model_is_taken_apart() -> None:
    model = tiny_llama()
    model.model.layers[0].compile()
    with pytest.raises(ValueError, match=r"model\.layers\.0' is compiled"):
        refuse_compiled(model)
    with pytest.raises(ValueError, match="compiled"):
        refuse_compiled(nn.Sequential(torch.compile(nn.Linear(4, 4))))  # type: ignore[arg-type]


def test_computed_and_quantised_weights_are_refused() -> None:
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match="computed, not stored"):
        find_targets(normed)
    quantised = nn.Sequential(nn.Linear(4, 4))
    quantised[0].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="quantised"):
        find_targets(quantised)


def test_overrides() -> None:
    layers = find_targets(tiny_llama())
    patterns = assign_patterns(
        layers,
        NM(2, 4),
        [TargetOverride(["mlp.*"], "unstructured", 0.7), TargetOverride(["layers.1.mlp.up_proj"], "4:8")],
    )
    assert patterns["model.layers.0.self_attn.q_proj"] == NM(2, 4)
    assert patterns["model.layers.0.mlp.up_proj"] == Unstructured(0.7)
    assert patterns["model.layers.1.mlp.up_proj"] == NM(4, 8)
    with pytest.raises(ValueError, match="override target 'mpl' matches none"):
        assign_patterns(layers, NM(2, 4), [TargetOverride(["mpl"], "4:8")])


def test_a_width_that_m_does_not_divide_names_the_layer() -> None:
    layers = find_targets(nn.Sequential(nn.Linear(8, 8), nn.Linear(10, 8)))
    with pytest.raises(ValueError, match=r"layer 1: .*10.*Or add '1' to ignore"):
        assign_patterns(layers, NM(2, 4))
