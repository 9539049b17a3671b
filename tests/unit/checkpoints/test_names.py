"""Under which names the files of a folder have what a model has."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import checkpoint_cases
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from tiny_mixtures import MIXTURES, tiny_mixture
from torch import nn
from toy import ToyLM, grouped, loader, tiny_llama, trainer
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    InklingConfig,
    InklingForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    Phi3Config,
)

from thanos_lightning import SparsitySchedule, ThanosPruningCallback
from thanos_lightning.checkpoints.export import export_checkpoint
from thanos_lightning.checkpoints.huggingface import SafetensorsFiles
from thanos_lightning.checkpoints.lazy import WithParts
from thanos_lightning.checkpoints.names import stored_names, why_not_exported
from thanos_lightning.checkpoints.verify import verify_checkpoint
from thanos_lightning.layers.targets import find_targets
from thanos_lightning.lm import CausalLM
from thanos_lightning.solver import parse_pattern

SIZES: dict[str, Any] = {**checkpoint_cases.SIZES, "num_hidden_layers": 1, "tie_word_embeddings": False}


@pytest.mark.parametrize("family", MIXTURES)
def test_each_matrix_is_found_in_the_files(family: str, tmp_path: Path) -> None:
    model = tiny_mixture(family)
    model.save_pretrained(tmp_path)
    check_names(model, tmp_path)
    assert why_not(model) is None


def check_names(model: Any, folder: Path) -> None:
    stored = SafetensorsFiles(folder)
    layers = {layer.parameter_name: layer for layer in find_targets(model, ignore=()).values()}
    names = {own: stored.stored_name(found) for own, found in stored_names(model, layers).items()}
    assert len(set(names.values())) == len(layers) > 0
    files = WithParts(stored)
    for own, layer in layers.items():
        assert torch.equal(files[names[own]], layer.part_of(layer.parameter))


@pytest.mark.parametrize("config", [GPTNeoXConfig, LlamaConfig, Phi3Config, Gemma2Config, OPTConfig, GPT2Config])
def test_each_layer_is_found_in_the_files(config: Any, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(config(**SIZES))
    model.save_pretrained(tmp_path)
    check_names(model, tmp_path)
    if config is GPTNeoXConfig:
        assert stored_names(model, ["lm_head.weight"]) == {"lm_head.weight": ["embed_out.weight"]}


def test_names_are_those_of_the_hub() -> None:
    experts, of = "model.layers.1.mlp.experts", "model.layers.1.block_sparse_moe.experts.3"
    up, down = f"{experts}.gate_up_proj[3, 24:48]", f"{experts}.down_proj[3]"
    assert stored_names(tiny_mixture(), [up, down]) == {up: [f"{of}.w3.weight"], down: [f"{of}.w2.weight"]}


def why_not(model: Any, ignore: Sequence[str] = ()) -> str | None:
    module = nn.ModuleDict({"model": model})
    return why_not_exported(module, find_targets(module, ignore=ignore))


def test_nothing_is_said_where_nothing_would_be_exported() -> None:
    assert why_not(nn.Linear(4, 4)) is None
    module = nn.ModuleDict({"model": AlteredLlama(LlamaConfig(**SIZES)), "own": nn.Linear(4, 4)})
    assert why_not_exported(module, find_targets(module, ["own"])) is None


class AlteredLlama(LlamaForCausalLM):
    pass


def test_what_an_export_will_refuse_is_known_before_it() -> None:
    assert "a model of the class AlteredLlama, which transformers" in (
        why_not(AlteredLlama(LlamaConfig(**SIZES))) or ""
    )
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.lm_head = nn.Linear(32, 5, bias=False)
    assert why_not(model) == (
        "model.lm_head.weight has the shape (5, 32), and (64, 32) in the LlamaForCausalLM that its configuration "
        "describes: change the configuration with the model"
    )


def test_rows_that_are_interleaved_on_disk_are_no_tensor() -> None:
    with torch.device("meta"):
        model = InklingForConditionalGeneration(InklingConfig(text_config={**SIZES, "num_hidden_layers": 3}))
    why = why_not(model, ["*vision*", "*audio*"]) or ""
    assert "is saved in a form in which model.language_model.layers.0.mlp" in why
    assert "is no tensor of its own: add such layers to ignore" in why
    assert why_not(model, ["*vision*", "*audio*", "*mlp*", "lm_head"]) is None


def pruning() -> ThanosPruningCallback:
    cheap = grouped(pattern="2:4", method="magnitude", admm_steps=0, refine_steps=0)
    return ThanosPruningCallback(**cheap, schedule=SparsitySchedule(at=[1]))


@pytest.mark.filterwarnings("ignore")
def test_a_head_of_gpt_neox_is_exported(tmp_path: Path) -> None:
    module = ToyLM(AutoModelForCausalLM.from_config(GPTNeoXConfig(**SIZES)))
    reports = export_checkpoint(checkpoint_cases.train(tmp_path, module, ignore=[]), tmp_path / "exported")
    assert reports[-1].name == "embed_out.weight"
    assert [report.sparsity for report in reports] == [0.5] * 5
    for asked in ({}, {"pattern": parse_pattern("2:4"), "ignore": []}):
        found = verify_checkpoint(tmp_path / "exported", **asked)
        assert [report.name for report in found if report.ok] == [report.name for report in reports]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert torch.equal(loaded.lm_head.weight, module.model.get_output_embeddings().weight)


def test_what_can_not_be_exported_is_refused_before_the_first_step(tmp_path: Path, tiny: str) -> None:
    def altered(model: Any) -> Any:
        model.model.layers[1].mlp = tiny_llama(intermediate_size=72).model.layers[0].mlp
        return model

    class Altered(CausalLM):
        def configure_model(self) -> None:
            super().configure_model()
            self.model = altered(self.model)

    with pytest.raises(MisconfigurationException, match=r"could not be exported: model[.]model[.]layers[.]1[.]mlp"):
        trainer(tmp_path, pruning(), max_steps=2).fit(Altered(tiny, lr_schedule="constant"), loader(8))
    for module in (ToyLM(altered(tiny_llama())), CausalLM(altered(tiny_llama()), lr_schedule="constant")):
        fitting = trainer(tmp_path, pruning(), max_steps=2)
        with pytest.warns(UserWarning, match=r"an export will refuse what is trained here: model[.]model[.]layers"):
            fitting.fit(module, loader(8))
        assert fitting.global_step == 2
