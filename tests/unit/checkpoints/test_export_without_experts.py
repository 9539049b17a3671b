import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import change_checkpoint, state_of, train
from require import only
from tiny_mixtures import MIXTURES, tiny_mixture
from torch import Tensor
from toy import ToyLM, adamw
from transformers import AutoModelForCausalLM, PreTrainedModel

from thanos_lightning import TargetOverride, export_checkpoint
from thanos_lightning.checkpoints.export import NonconformingError
from thanos_lightning.checkpoints.lazy import part_of, whole_of
from thanos_lightning.checkpoints.verify import smaller_shapes, verify_checkpoint
from thanos_lightning.solver import NM

pytestmark = pytest.mark.filterwarnings("ignore:.*names no tokenizer.*")
IDS = torch.arange(48).view(3, 16)
EXPERTS: dict[str, Any] = {"pattern": "experts", "sparsity": 0.5, "steps": 1}
EXPERTS |= {"method": "thanos", "admm_steps": 8, "refine_steps": 2}
OWN = "num_local_experts", "num_experts", "n_routed_experts"  # what configurations call the number of experts


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model.eval()(input_ids=IDS).logits
    return logits


@pytest.mark.parametrize("family", only(["mixtral", "gpt-oss"], [*MIXTURES]))
def test_the_exported_model_has_fewer_experts_and_computes_the_same(tmp_path: Path, family: str) -> None:
    checkpoint = train(tmp_path, module := ToyLM(tiny_mixture(family)), **EXPERTS)
    assert all(report.ok and report.zeros == report.numel for report in verify_checkpoint(checkpoint))
    reports = export_checkpoint(checkpoint, tmp_path / "out")
    again = verify_checkpoint(tmp_path / "out")
    assert all(report.ok for report in (*reports, *again))
    assert [report.name for report in again] == [report.name for report in reports]
    assert smaller_shapes(again) == "8 experts became 4"
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits_of(loaded), logits_of(module.model))
    config = loaded.config.to_dict()
    assert {config[name] for name in OWN if name in config} == {4}
    assert sum(p.numel() for p in loaded.parameters()) < 0.7 * sum(p.numel() for p in module.parameters())
    assert "8 experts became 4" in (tmp_path / "out" / "README.md").read_text()
    record = json.loads((tmp_path / "out" / "sparsity.json").read_text())["tensors"]
    assert ([8, 16], [4, 16]) in [(one.get("dense_shape"), one["shape"]) for one in record.values()]
    assert {one["pattern"] for one in record.values()} == {"experts"}
    assert not [name for name in record if ".experts.4." in name]


def test_other_patterns_are_checked_beside_it(tmp_path: Path) -> None:
    module = ToyLM(tiny_mixture())
    checkpoint = train(tmp_path, module, **EXPERTS, overrides=[TargetOverride(["*.self_attn.*"], "2:4")])
    export_checkpoint(checkpoint, tmp_path / "out")
    reports = verify_checkpoint(tmp_path / "out", NM(2, 4), targets=["*.self_attn.*"])
    assert sum(report.pattern == "2:4" and report.ok for report in reports) == 8
    assert all(report.ok for report in reports)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits_of(loaded), logits_of(module.model))


@pytest.mark.rest
def test_zeros_of_experts_that_stay_keep_their_masks(tmp_path: Path) -> None:
    checkpoint = train(tmp_path, ToyLM(tiny_mixture()), targets=["*.experts.*"])
    export_checkpoint(checkpoint, tmp_path / "sparse")
    module = ToyLM(AutoModelForCausalLM.from_pretrained(tmp_path / "sparse").train())
    reports = export_checkpoint(train(tmp_path, module, **EXPERTS), tmp_path / "out")
    held = [report for report in reports if report.pattern == "unstructured"]
    assert len(held) == 2 * 4 * 3
    assert all(report.zeros >= report.numel / 2 for report in held)
    assert all(report.ok for report in verify_checkpoint(tmp_path / "out", NM(2, 4), targets=["*.experts.*"]))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits_of(loaded), logits_of(module.model))


def test_a_shape_can_t_be_kept(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="would send tokens to experts that were dropped: leave --keep-shape out"):
        export_checkpoint(train(tmp_path, ToyLM(tiny_mixture()), **EXPERTS), tmp_path / "out", keep_shape=True)


def test_what_came_back_is_not_exported(tmp_path: Path) -> None:
    def fill(content: dict[str, Any]) -> None:
        name = next(iter(state_of(content)["masks"]))
        part_of(content["state_dict"][whole_of(name)], name).fill_(1.0)

    change_checkpoint(checkpoint := train(tmp_path, ToyLM(tiny_mixture()), **EXPERTS), checkpoint, fill)
    with pytest.raises(NonconformingError, match="pruned entries are not 0"):
        export_checkpoint(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.rest
@pytest.mark.parametrize("keeps", [False, True])
def test_adapters_of_other_layers_go_on(tmp_path: Path, keeps: bool) -> None:
    peft = pytest.importorskip("peft")
    model = tiny_mixture()
    model = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q_proj"]), model)
    module = ToyLM(model, lambda parameters: adamw([one for one in parameters if one.requires_grad]))
    checkpoint = train(tmp_path, module, **EXPERTS, overrides=[TargetOverride(["*.self_attn.*"], "2:4")])
    export_checkpoint(checkpoint, tmp_path / "out", keep_adapter=keeps)
    assert all(report.ok for report in verify_checkpoint(tmp_path / "out"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.num_local_experts == 4
    if not keeps:
        assert (logits_of(loaded) - logits_of(module.model)).abs().max() < 1e-5
