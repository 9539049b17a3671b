"""Real ranks over gloo that train mixtures of experts while the experts are pruned, or go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import (
    FP32_SUMS,
    OFFLOADED,
    agreement,
    check_clipped,
    check_resuming,
    check_zeros,
    masks,
    only,
    results,
    trained,
)
from toy import ResumableBatches
from transformers import AutoModelForCausalLM

from thanos_lightning import export_checkpoint, verify_checkpoint

MIXTRAL = {"model": "mixtral", "save": [5, 10]}  # 5: while inputs are counted
LEAF = {"zero": {"leaf_module": {"classes": ["transformers.models.mixtral.modeling_mixtral.MixtralSparseMoeBlock"]}}}
# a batch of one rank reaches other experts, and another number of them, than that of the other rank
SPARSELY = {**MIXTRAL, "model": "olmoe", "schedule": (0, 0, 1), "calibration_batches": 8}
CASES: dict[str, dict[str, Any]] = {
    "ddp": MIXTRAL,
    "zero0": {**MIXTRAL, "strategy": "zero0"},
    "zero0, bf16": {**MIXTRAL, "strategy": "zero0", "precision": "bf16-mixed"},
    "zero1": {**MIXTRAL, "strategy": "zero1"},
    "zero1, fp32 accumulation": {**MIXTRAL, **FP32_SUMS},
    "zero2": {**MIXTRAL, "strategy": "zero2"},
    "zero2, offloaded": {**MIXTRAL, "strategy": "zero2", "deepspeed": {"offload_optimizer": True}},
    "zero3": {**MIXTRAL, "strategy": "zero3"},
    "zero3, bf16": {**MIXTRAL, "strategy": "zero3", "precision": "bf16-mixed"},
    "zero3, leaf modules": {**MIXTRAL, "strategy": "zero3", **LEAF},
    "zero3, weights stay gathered": {
        **MIXTRAL, "strategy": "zero3", "zero": {"stage3_param_persistence_threshold": 100_000},
    },
    "zero3, offloaded": {**MIXTRAL, "strategy": "zero3", **OFFLOADED},
    "fsdp": {**MIXTRAL, "strategy": "fsdp", "distributed": False},
    "olmoe, ddp": SPARSELY,
    "olmoe, zero3": {**SPARSELY, "strategy": "zero3"},
    "gpt-oss, ddp": {**MIXTRAL, "model": "gpt-oss"},
    "gpt-oss, zero3": {**MIXTRAL, "model": "gpt-oss", "strategy": "zero3"},
    "gpt-oss, fsdp": {**MIXTRAL, "model": "gpt-oss", "strategy": "fsdp", "distributed": False},
}  # fmt: skip
MATRICES = {"mixtral": 8 * 3, "gpt-oss": 8 * 2, "olmoe": 64 * 3}  # of experts


@pytest.mark.parametrize("case", only(["zero3", "fsdp"], CASES))
def test_zeros_of_experts_hold_everywhere(case: dict[str, Any]) -> None:
    folder = trained(**case)
    layers = 2 * (4 + MATRICES[case["model"]])
    is_rounded = "bf16" in case.get("precision", "")
    check_zeros(results(folder), events=[0] if "schedule" in case else [3, 6, 7], collectives=[])
    check_clipped(results(folder), 2e-2 if is_rounded else 1e-4)
    for seen in results(folder):  # a parameter of experts counts once in a step
        assert min(seen["checked"].values()) >= 2 * (4 + 2) * 3
    found = masks(folder)
    assert len(found) == layers
    assert {float(keep.float().mean()) for keep in found.values()} == {0.5}
    reference = f"{case['model']}, ddp".removeprefix("mixtral, ")
    assert agreement(folder, trained(**CASES[reference])) > (0.8 if is_rounded else 0.98)


@pytest.mark.rest
@pytest.mark.parametrize("name", ["olmoe, ddp", "olmoe, zero3"])
def test_what_a_rank_tells_all_others_does_not_grow_with_experts(name: str) -> None:
    matrices = 2 * MATRICES["olmoe"]
    for rank in results(trained(**CASES[name])):
        assert 0 < rank["told"] < 10 * matrices  # the calls of blocks, and nothing of each matrix


@pytest.mark.parametrize("case", only(["zero3"], CASES))
def test_what_ranks_have_trained_is_exported(case: dict[str, Any]) -> None:
    folder = trained(**case)
    out = folder / "exported"
    assert all(report.ok for report in verify_checkpoint(folder / "step=10.ckpt"))
    with pytest.warns(UserWarning, match="no tokenizer"):
        reports = export_checkpoint(folder / "step=10.ckpt", out)
    assert len(reports) == len(masks(folder))
    assert all(report.ok for report in verify_checkpoint(out))
    if "bf16" in case.get("precision", ""):
        return  # the model's copy is rounded, so that its router may choose other experts
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(out).eval()(input_ids=torch.arange(16).unsqueeze(0)).logits
    for rank in range(2):
        torch.testing.assert_close(torch.load(folder / f"logits{rank}.pt"), logits)


@pytest.mark.rest
@pytest.mark.parametrize("name", ["zero2", "zero3", "fsdp"])
def test_a_resumed_training_of_experts_ends_with_the_same_bits(name: str) -> None:
    check_resuming(5, **CASES[name])


# Experts that go

EXPERTS: dict[str, Any] = {
    "model": "mixtral",
    "pattern": "experts",
    "sparsity": 0.5,
    "schedule": (0, 6, 3),
    "max_steps": 10,
    "watch": False,
    "save": [4, 10],
}
DROPPED: dict[str, dict[str, Any]] = {
    "ddp": {**EXPERTS, "strategy": "ddp"},
    "fsdp": {**EXPERTS, "strategy": "fsdp", "distributed": False},
    "zero2": {**EXPERTS, "strategy": "zero2", "precision": "bf16-mixed"},
    "zero3": {**EXPERTS, "strategy": "zero3"},
    "zero3, experts as leaves": {**EXPERTS, "strategy": "zero3", **LEAF},
}


@pytest.mark.parametrize("case", only(["zero3", "fsdp"], DROPPED))
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


@pytest.mark.parametrize("case", only(["zero3", "fsdp"], DROPPED))
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
def test_strategies_drop_alike(name: str) -> None:
    assert masks(trained(**DROPPED[name])).keys() == masks(trained(**DROPPED["ddp"])).keys()


@pytest.mark.parametrize("name", only(["zero3"], ["zero3", "fsdp", "ddp"]))
def test_a_resumed_training_that_drops_experts_ends_with_the_same_bits(name: str) -> None:
    check_resuming(4, **DROPPED[name])
