import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import state_of
from lightning.pytorch import LightningModule
from require import only
from tiny_mixtures import MIXTURES, tiny_mixture
from torch import Tensor
from toy import ToyLM, adamw, grouped, loader, trainer
from transformers import AutoModelForCausalLM, PreTrainedModel

from thanos_lightning import (
    SparsitySchedule,
    TargetOverride,
    ThanosPruningCallback,
    export_checkpoint,
    verify_checkpoint,
)
from thanos_lightning.checkpoints.export import NonconformingError
from thanos_lightning.checkpoints.lazy import part_of, whole_of
from thanos_lightning.checkpoints.verify import smaller_shapes
from thanos_lightning.cli import main
from thanos_lightning.solver import NM

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*names no tokenizer.*", "ignore:only .* of the model's weights", "ignore:the schedule's last event"
)
IDS = torch.arange(48).view(3, 16)
OWN = "num_local_experts", "num_experts", "n_routed_experts"  # what configurations call the number of experts


def trained(root: Path, family: str = "mixtral", **options: Any) -> tuple[Path, LightningModule]:
    settings = {"pattern": "experts", "sparsity": 0.5, "schedule": SparsitySchedule(at=[2, 4]), "steps": 2}
    running = trainer(root, ThanosPruningCallback(**grouped(**{**settings, **options})), max_steps=6)
    running.fit(module := ToyLM(tiny_mixture(family)), loader())
    running.save_checkpoint(root / "trained.ckpt")
    return root / "trained.ckpt", module


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model.eval()(input_ids=IDS).logits
    return logits


@pytest.mark.parametrize("family", only(["mixtral", "gpt-oss"], [*MIXTURES]))
def test_the_exported_model_has_fewer_experts_and_computes_the_same(tmp_path: Path, family: str) -> None:
    checkpoint, module = trained(tmp_path, family)
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


def test_other_patterns_are_checked_beside_it(tmp_path: Path) -> None:
    checkpoint, module = trained(tmp_path, overrides=[TargetOverride(["*.self_attn.*"], "2:4")])
    export_checkpoint(checkpoint, tmp_path / "out")
    reports = verify_checkpoint(tmp_path / "out", NM(2, 4), targets=["*.self_attn.*"])
    assert sum(report.pattern == "2:4" and report.ok for report in reports) == 8
    assert all(report.ok for report in reports)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits_of(loaded), logits_of(module.model))


@pytest.mark.rest
def test_zeros_of_experts_that_stay_keep_their_masks(tmp_path: Path) -> None:
    (tmp_path / "sparse").mkdir()
    checkpoint, _ = trained(tmp_path / "sparse", pattern="2:4", sparsity=None, targets=["*.experts.*"])
    export_checkpoint(checkpoint, tmp_path / "sparse" / "out")
    running = trainer(
        tmp_path,
        ThanosPruningCallback("experts", 0.5, **grouped(schedule=SparsitySchedule(at=[2]), steps=2)),
        max_steps=4,
    )
    module = ToyLM(AutoModelForCausalLM.from_pretrained(tmp_path / "sparse" / "out").train())
    with pytest.warns(UserWarning, match="are pruned already"):
        running.fit(module, loader())
    running.save_checkpoint(tmp_path / "both.ckpt")
    reports = export_checkpoint(tmp_path / "both.ckpt", tmp_path / "out")
    held = [report for report in reports if report.pattern == "unstructured"]
    assert len(held) == 2 * 4 * 3
    assert all(report.zeros >= report.numel / 2 for report in held)
    assert all(report.ok for report in verify_checkpoint(tmp_path / "out", NM(2, 4), targets=["*.experts.*"]))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits_of(loaded), logits_of(module.model))


def test_a_shape_can_t_be_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, _ = trained(tmp_path)
    with pytest.raises(ValueError, match="would send tokens to experts that were dropped: leave --keep-shape out"):
        export_checkpoint(checkpoint, tmp_path / "out", keep_shape=True)
    assert main(["export", str(checkpoint), str(tmp_path / "out")]) == 0
    assert "8 experts became 4" in capsys.readouterr().out


def test_what_came_back_is_not_exported(tmp_path: Path) -> None:
    checkpoint, _ = trained(tmp_path)
    content = torch.load(checkpoint, weights_only=True)
    name = next(iter(state_of(content)["masks"]))
    part_of(content["state_dict"][whole_of(name)], name).fill_(1.0)
    torch.save(content, checkpoint)
    with pytest.raises(NonconformingError, match="pruned entries are not 0"):
        export_checkpoint(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_record_says_what_the_number_of_experts_was(tmp_path: Path) -> None:
    checkpoint, _ = trained(tmp_path, "qwen3")
    export_checkpoint(checkpoint, tmp_path / "out")
    record = json.loads((tmp_path / "out" / "sparsity.json").read_text())["tensors"]
    assert record["model.layers.0.mlp.gate.weight"]["dense_shape"] == [8, 16]
    assert record["model.layers.0.mlp.gate.weight"]["shape"] == [4, 16]
    assert record["model.layers.1.mlp.experts.3.down_proj.weight"]["pattern"] == "experts"
    assert "model.layers.1.mlp.experts.4.down_proj.weight" not in record
    assert "8 experts became 4" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.rest
@pytest.mark.parametrize("keeps", [False, True])
def test_adapters_of_other_layers_go_on(tmp_path: Path, keeps: bool) -> None:
    peft = pytest.importorskip("peft")
    model = tiny_mixture()
    model = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q_proj"]), model)
    module = ToyLM(model, lambda parameters: adamw([one for one in parameters if one.requires_grad]))
    pruning = ThanosPruningCallback(
        "experts",
        0.5,
        overrides=[TargetOverride(["*.self_attn.*"], "2:4")],
        **grouped(schedule=SparsitySchedule(at=[2]), steps=2),
    )
    running = trainer(tmp_path, pruning, max_steps=5)
    running.fit(module, loader())
    running.save_checkpoint(tmp_path / "trained.ckpt")
    export_checkpoint(tmp_path / "trained.ckpt", tmp_path / "out", keep_adapter=keeps)
    assert all(report.ok for report in verify_checkpoint(tmp_path / "out"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.num_local_experts == 4
    if not keeps:
        assert (logits_of(loaded) - logits_of(module.model)).abs().max() < 1e-5
