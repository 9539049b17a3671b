from __future__ import annotations

import pytest
import torch
from tiny_mixtures import MIXTURES, tiny_mixture
from torch import nn

from thanos_lightning.layers.experts import matrices_of, unknown_experts
from thanos_lightning.layers.targets import find_targets


@pytest.mark.parametrize("family", MIXTURES)
def test_matrices_without_gaps_are_all_of_the_parameters_and_none_twice(family: str) -> None:
    model = tiny_mixture(family)
    fused = {name: torch.zeros(p.shape, dtype=torch.int) for name, p in model.named_parameters() if p.ndim == 3}
    assert len(fused) == 4
    for name, layer in find_targets(model).items():
        assert not name.endswith((".router", ".gate"))
        if layer.part is not None:
            counts = fused[layer.parameter_name.partition("[")[0]]
            entries = layer.part_of(torch.arange(counts.numel()).view(counts.shape))
            assert entries.flatten().tolist() == list(range(layer.start, layer.start + layer.rows * layer.cols)), name
            assert layer.oriented(entries).shape == (layer.rows, layer.cols)
            layer.part_of(counts).add_(1)
    assert all(bool((counts == 1).all()) for counts in fused.values())


@pytest.mark.parametrize(
    ("family", "named"),
    [
        ("mixtral", "model.layers.1.mlp.experts.3.gate_proj model.layers.1.mlp.experts.gate_up_proj[3, 0:24]"),
        ("qwen3", "model.layers.0.mlp.experts.0.up_proj model.layers.0.mlp.experts.gate_up_proj[0, 12:24]"),
        ("gpt-oss", "model.layers.0.mlp.experts.2.gate_up_proj model.layers.0.mlp.experts.gate_up_proj[2]"),
        ("llama 4", "model.layers.0.feed_forward.experts.1.down_proj model.layers.0.feed_forward.experts.down_proj[1]"),
    ],
)
def test_names_tell_where_a_matrix_is(family: str, named: str) -> None:
    name, _, parameter = named.partition(" ")
    assert find_targets(tiny_mixture(family))[name].parameter_name == parameter


def test_experts_of_a_layout_that_is_not_known_are_none() -> None:
    stranger = nn.ParameterDict({"w1": torch.randn(4, 8, 8)})
    model = nn.ModuleDict({"experts": stranger, "conv": nn.Conv1d(2, 2, 3), "fc": nn.Linear(8, 8)})
    assert matrices_of(model["experts"]) == {}
    assert [name for name, _ in unknown_experts(model)] == ["experts"]
    assert list(find_targets(model)) == ["fc"]
    with pytest.raises(ValueError, match=r"means ParameterDict \(experts\), experts whose layout is not known"):
        find_targets(model, targets=["experts.*"])


def test_experts_that_two_modules_share_are_refused() -> None:
    model = tiny_mixture()
    first, second = (layer.mlp.experts for layer in model.model.layers)
    second.down_proj = first.down_proj
    with pytest.raises(ValueError, match=r"0\.mlp\.experts\.0\.down_proj and .*1\.mlp.* share one weight"):
        find_targets(model)
