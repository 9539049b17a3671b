"""Experts on real ranks: those that go are zero wherever a strategy keeps them, and no router chooses them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import check_resuming, check_zeros, masks, only, results, trained
from toy import ResumableBatches
from transformers import AutoModelForCausalLM

from thanos_lightning import export_checkpoint, verify_checkpoint

EXPERTS: dict[str, Any] = {
    "model": "mixtral",
    "pattern": "experts",
    "sparsity": 0.5,
    "schedule": (0, 6, 3),
    "max_steps": 10,
    "watch": False,
    "save": [4, 10],
}
CASES: dict[str, dict[str, Any]] = {
    "ddp": {**EXPERTS, "strategy": "ddp"},
    "fsdp": {**EXPERTS, "strategy": "fsdp", "distributed": False},
    "zero2": {**EXPERTS, "strategy": "zero2", "precision": "bf16-mixed"},
    "zero3": {**EXPERTS, "strategy": "zero3"},
    "zero3, experts as leaves": {
        **EXPERTS,
        "strategy": "zero3",
        "zero": {"leaf_module": {"classes": ["MixtralSparseMoeBlock"]}},
    },
}


@pytest.mark.parametrize("case", only(["zero3", "fsdp"], CASES))
def test_a_model_with_fewer_experts_comes_out(tmp_path: Path, case: dict[str, Any]) -> None:
    folder = trained(**case)
    check_zeros(results(folder))
    kept = masks(folder)
    assert len(kept) == 2 * 4 * 3
    assert not any(keep.any() for keep in kept.values())
    checkpoint = folder / "step=10.ckpt"
    reports = verify_checkpoint(checkpoint)
    assert all(report.ok for report in reports)
    export_checkpoint(checkpoint, tmp_path / "small")
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    assert small.config.num_local_experts == 4


@pytest.mark.parametrize("case", only(["zero3", "fsdp"], CASES))
def test_a_training_computes_what_the_exported_model_computes(tmp_path: Path, case: dict[str, Any]) -> None:
    folder = trained(**case)
    export_checkpoint(folder / "step=4.ckpt", tmp_path / "small")
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert small.config.num_local_experts < 8
    following = ResumableBatches(216, batch_size=4).batches[::2][4]  # that rank 0 gets
    with torch.no_grad():
        expected = float(small(**following).loss)
    losses = dict(json.loads((folder / "pruning_report.json").read_text())["history"]["losses"])
    assert losses[5] == pytest.approx(expected, rel=1e-2 if "precision" in case else 1e-5)


@pytest.mark.rest
@pytest.mark.parametrize("name", ["fsdp", "zero3", "zero3, experts as leaves"])
def test_strategies_choose_alike(name: str) -> None:
    assert masks(trained(**CASES[name])).keys() == masks(trained(**CASES["ddp"])).keys()


@pytest.mark.parametrize("name", only(["zero3"], ["zero3", "fsdp", "ddp"]))
def test_a_resumed_run_is_the_run_that_was_never_stopped(name: str) -> None:
    check_resuming(4, **CASES[name])
