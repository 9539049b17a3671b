"""Under which names the files of a folder have what a model has."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import checkpoint_cases
import pytest
import torch
import transformers as t
from lightning.fabric.utilities.exceptions import MisconfigurationException
from tiny_mixtures import MIXTURES, tiny_mixture
from torch import nn
from toy import ToyLM, grouped, loader, tiny_llama, trainer

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
DENSE = (t.GPTNeoXConfig, t.LlamaConfig, t.Phi3Config, t.Gemma2Config, t.OPTConfig, t.GPT2Config)


@pytest.mark.parametrize("family", [*MIXTURES, *DENSE])
def test_each_matrix_is_found_in_the_files(family: Any, tmp_path: Path) -> None:
    model = tiny_mixture(family) if family in MIXTURES else t.AutoModelForCausalLM.from_config(family(**SIZES))
    model.save_pretrained(tmp_path)
    stored = SafetensorsFiles(tmp_path)
    layers = {layer.parameter_name: layer for layer in find_targets(model, ignore=()).values()}
    names = {own: stored.stored_name(found) for own, found in stored_names(model, layers).items()}
    assert len(set(names.values())) == len(layers) > 0
    files = WithParts(stored)
    for own, layer in layers.items():
        assert torch.equal(files[names[own]], layer.part_of(layer.parameter))
    assert why_not(model) is None
    if family is t.GPTNeoXConfig:
        assert stored_names(model, ["lm_head.weight"]) == {"lm_head.weight": ["embed_out.weight"]}


def why_not(model: Any, ignore: Sequence[str] = ()) -> str | None:
    module = nn.ModuleDict({"model": model})
    return why_not_exported(module, find_targets(module, ignore=ignore))


class AlteredLlama(t.LlamaForCausalLM):
    pass


def test_what_an_export_will_refuse_is_known_before_it() -> None:
    module = nn.ModuleDict({"model": AlteredLlama(t.LlamaConfig(**SIZES)), "own": nn.Linear(4, 4)})
    assert "a model of the class AlteredLlama, which transformers" in (why_not(module["model"]) or "")
    # and nothing is said where nothing would be exported
    assert why_not_exported(module, find_targets(module, ["own"])) is None
    assert why_not(nn.Linear(4, 4)) is None
    model = t.LlamaForCausalLM(t.LlamaConfig(**SIZES))
    model.lm_head = nn.Linear(32, 5, bias=False)
    assert why_not(model) == (
        "model.lm_head.weight has the shape (5, 32), and (64, 32) in the LlamaForCausalLM that its configuration "
        "describes: change the configuration with the model"
    )


def test_rows_that_are_interleaved_on_disk_are_no_tensor() -> None:
    with torch.device("meta"):
        model = t.InklingForConditionalGeneration(t.InklingConfig(text_config={**SIZES, "num_hidden_layers": 3}))
    why = why_not(model, ["*vision*", "*audio*"]) or ""
    assert "is saved in a form in which model.language_model.layers.0.mlp" in why
    assert "is no tensor of its own: add such layers to ignore" in why
    assert why_not(model, ["*vision*", "*audio*", "*mlp*", "lm_head"]) is None


def pruning() -> ThanosPruningCallback:
    cheap = grouped(pattern="2:4", method="magnitude", admm_steps=0, refine_steps=0)
    return ThanosPruningCallback(**cheap, schedule=SparsitySchedule(at=[1]))


@pytest.mark.filterwarnings("ignore")
def test_a_head_of_gpt_neox_is_exported(tmp_path: Path) -> None:
    module = ToyLM(t.AutoModelForCausalLM.from_config(t.GPTNeoXConfig(**SIZES)))
    export_checkpoint(checkpoint_cases.train(tmp_path, module, ignore=[]), tmp_path / "exported")
    for asked in ({}, {"pattern": parse_pattern("2:4"), "ignore": []}):
        found = verify_checkpoint(tmp_path / "exported", **asked)
        assert [(report.sparsity, report.ok) for report in found] == [(0.5, True)] * 5
        assert found[-1].name == "embed_out.weight"
    loaded = t.AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
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
