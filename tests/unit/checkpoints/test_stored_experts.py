"""Where the files of a folder have the matrices of experts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_mixtures import MIXTURES, tiny_mixture

from thanos_lightning.checkpoints.experts import stored_names
from thanos_lightning.checkpoints.huggingface import SafetensorsFiles
from thanos_lightning.checkpoints.lazy import WithParts
from thanos_lightning.models.targets import find_targets


@pytest.mark.parametrize("family", MIXTURES)
def test_each_matrix_is_found_in_the_files(family: str, tmp_path: Path) -> None:
    model = tiny_mixture(family)
    model.save_pretrained(tmp_path)
    files, names = WithParts(SafetensorsFiles(tmp_path)), stored_names(model)
    layers = [layer for layer in find_targets(model).values() if layer.expert is not None]
    assert len(set(names.values())) == len(layers) > 0
    for layer in layers:
        name = names[layer.parameter_name]
        assert name in files
        assert torch.equal(files[name], layer.own(layer.parameter))


def test_names_are_those_of_the_hub() -> None:
    names = stored_names(tiny_mixture())
    of = "model.layers.1.block_sparse_moe.experts.3"
    assert names["model.layers.1.mlp.experts.gate_up_proj[3, 24:48]"] == f"{of}.w3.weight"
    assert names["model.layers.1.mlp.experts.down_proj[3]"] == f"{of}.w2.weight"
