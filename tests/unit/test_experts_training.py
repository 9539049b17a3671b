"""Trainings of mixtures of experts whose experts are pruned."""

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from require import only
from tiny_mixtures import MIXTURES, tiny_mixture
from toy import ResumableBatches, ToyLM, grouped, loader, trainer

from thanos_lightning import SparsitySchedule, ThanosPruningCallback, export_checkpoint, verify_checkpoint
from thanos_lightning.solver import NM

DURING: dict[str, Any] = {"schedule": SparsitySchedule(at=[4, 8]), "steps": 2}


def fit(
    tmp_path: Path, model: Any, *, max_steps: int = 12, **options: Any
) -> tuple[ToyLM, ThanosPruningCallback, Path]:
    pruning = ThanosPruningCallback(**grouped(verify_every_n_steps=1, **{"pattern": "2:4", **options}))
    module = ToyLM(model)
    fitted = trainer(tmp_path, pruning, max_steps=max_steps)
    fitted.fit(module, ResumableBatches(64, batch_size=4))
    fitted.save_checkpoint(tmp_path / "last.ckpt")
    return module, pruning, tmp_path / "last.ckpt"


@pytest.mark.parametrize("family", only(["mixtral", "gpt-oss"], [*MIXTURES]))
def test_experts_are_pruned_trained_and_exported(family: str, tmp_path: Path) -> None:
    module, pruning, checkpoint = fit(tmp_path, tiny_mixture(family), **DURING)
    reports = pruning.report.events[-1].layers
    experts = [report for report in reports if ".experts." in report.name]
    assert len(experts) == len([name for name in pruning._run.layers if ".experts." in name]) > 0
    assert {report.sparsity for report in reports} == {0.5}
    assert all(math.isfinite(report.relative_loss) for report in experts)
    assert all(report.ok for report in verify_checkpoint(checkpoint))
    assert all(report.ok for report in verify_checkpoint(checkpoint, NM(2, 4)))
    folder = tmp_path / "exported"
    with pytest.warns(UserWarning, match="no tokenizer"):
        export_checkpoint(checkpoint, folder)
    found = verify_checkpoint(folder, NM(2, 4))
    assert len(found) == len(reports)
    assert all(report.ok and report.zeros == report.numel // 2 for report in found)
    model = type(module.model).from_pretrained(folder).eval()
    batch = next(iter(loader(4)))["input_ids"]
    with torch.no_grad():
        assert torch.equal(model(input_ids=batch).logits, module.model.eval()(input_ids=batch).logits)


def test_a_zero_that_comes_back_in_an_expert_is_named(tmp_path: Path) -> None:
    _, _, checkpoint = fit(tmp_path, tiny_mixture(num_hidden_layers=1), max_steps=9, **DURING)
    content = torch.load(checkpoint, weights_only=False)
    content["state_dict"]["model.model.layers.0.mlp.experts.down_proj"][2] += 1
    for state in content["optimizer_states"][0]["state"].values():
        if state["exp_avg"].shape == (8, 16, 24):
            state["exp_avg"][3] += 1
    torch.save(content, checkpoint)
    broken = {report.name: str(report.problems) for report in verify_checkpoint(checkpoint) if not report.ok}
    assert list(broken) == [f"model.model.layers.0.mlp.experts.down_proj[{number}]" for number in (2, 3)]
    assert ["of its moment exp_avg are" in problems for problems in broken.values()] == [False, True]


def test_experts_that_no_token_reaches_are_pruned_by_what_the_others_saw(tmp_path: Path) -> None:
    model = tiny_mixture("gpt-oss", number=4, num_hidden_layers=1)
    with torch.no_grad():
        model.model.layers[0].mlp.router.bias[3] = -1e4
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*no token has reached")
        _, pruning, checkpoint = fit(tmp_path, model, pattern="unstructured", sparsity=0.5, max_steps=9, **DURING)
    reports = {report.name: report for report in pruning.report.events[0].layers}
    seen = [reports[f"model.model.layers.0.mlp.experts.{expert}.down_proj"] for expert in range(4)]
    assert seen[3].tokens == 0
    assert math.isfinite(seen[3].relative_loss)
    assert 0 < seen[3].sparsity < 1
    assert sum(report.tokens for report in seen) == 2 * 2 * 64  # two experts for each token of two batches
    assert reports["model.model.layers.0.self_attn.q_proj"].tokens == 2 * 64
    assert all(report.ok for report in verify_checkpoint(checkpoint))


@pytest.mark.rest
def test_blocks_of_experts_are_trained_to_give_what_they_gave(tmp_path: Path) -> None:
    batches = list(loader(64, batch_size=8))
    options: dict[str, Any] = {"schedule": SparsitySchedule(at=[0]), "batches": batches, "block_steps": 32}
    _, pruning, checkpoint = fit(tmp_path, tiny_mixture(), **options)
    blocks = pruning.report.events[0].blocks
    assert len(blocks) == 2
    assert all(block.error < 0.9 * block.error_solved for block in blocks)
    assert all(report.ok for report in verify_checkpoint(checkpoint))
