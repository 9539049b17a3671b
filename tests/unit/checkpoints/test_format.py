from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from toy import ToyLM, tiny_gpt2, tiny_llama, trainer

from thanos_lightning.checkpoints.format import TrainerCheckpoint, training_note
from thanos_lightning.checkpoints.huggingface import SafetensorsFiles


def test_a_note_names_the_parameters_of_each_optimizer() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False))
    first, second = [module[1].weight, module[0].bias, None], [module[0].weight]
    note = training_note(module, [first, second], targets=["0"])
    assert note == {"format": 7, "optimizer_parameters": [["1.weight", "0.bias", None], ["0.weight"]]}


def test_a_note_describes_the_model_with_the_targets() -> None:
    module = ToyLM()
    module.model = nn.ModuleDict({"teacher": tiny_gpt2(), "student": tiny_llama()})  # type: ignore[assignment]
    targets = ["model.student.model.layers.0.mlp.up_proj"]
    note = training_note(module, [], targets)
    assert (note["model_prefix"], note["architecture"]) == ("model.student.", "LlamaForCausalLM")
    assert note["config"]["hidden_size"] == 32
    assert note["dtype"] == "float32"
    # the outermost of nested models: LlamaForCausalLM, not the LlamaModel inside
    assert training_note(tiny_llama(), [], ["model.layers.0.mlp.up_proj"])["model_prefix"] == ""


def test_a_checkpoint_is_read_without_running_code(tmp_path: Path) -> None:
    fitted = trainer(tmp_path, max_steps=1)
    fitted.fit(ToyLM(), torch.utils.data.DataLoader([{"input_ids": torch.arange(4), "labels": torch.arange(4)}]))
    fitted.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = TrainerCheckpoint.read(tmp_path / "a.ckpt")
    assert set(checkpoint.state_dict) == set(fitted.lightning_module.state_dict())
    assert checkpoint.masks is None
    with pytest.raises(ValueError, match="holds no state of a ThanosPruningCallback"):
        checkpoint.require_masks()
    (tmp_path / "b.ckpt").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="damaged or no trainer checkpoint"):
        TrainerCheckpoint.read(tmp_path / "b.ckpt")


def test_safetensors_are_read_by_name(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2, 3)}, tmp_path / "model.safetensors")
    files = SafetensorsFiles(tmp_path)
    assert list(files) == ["a"]
    assert files["a"].shape == (2, 3)
    assert "b" not in files
