"""Real ranks over gloo under FSDP2: Lightning's ModelParallelStrategy, and fully_shard in configure_model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import change_checkpoint, failed
from ranks import (
    check_clipped,
    check_equal_masks,
    check_everywhere,
    check_resuming,
    check_zeros,
    masks,
    only,
    results,
    train,
    trained,
)

from thanos_lightning.checkpoints.verify import verify_checkpoint
from thanos_lightning.ranks.masks import LayerMask

ACCUMULATING = {"accumulate": 3, "batch_size": 2, "max_steps": 13, "calibration_steps": 1}
GRID: dict[str, dict[str, Any]] = {
    f"{precision}-{optimizer}{'-accumulating' if more else ''}": {
        "precision": precision,
        "optimizer": optimizer,
        **more,
    }
    for number, precision in enumerate(("32-true", "bf16-mixed", "bf16-true"))
    for optimizer, more in zip(("adamw", "sgd"), ({}, ACCUMULATING)[:: -1 if number == 1 else 1], strict=True)
}
KINDS: dict[str, dict[str, Any]] = {
    "transposed weights": {"model": "gpt2", "precision": "bf16-mixed"},
    "unstructured": {"pattern": "unstructured", "sparsity": 0.6},
    "unstructured, a calibration set": {"pattern": "unstructured", "sparsity": 0.6, "calibration_batches": 3},
    "gathered in bf16": {"fsdp": {"bf16": True}},
    "kept gathered between forward and backward": {"fsdp": {"reshard_after_forward": False}},
    "all as one, measured between": {"fsdp": {"how": "root"}, "monitor": "val/loss"},
    "a replica on each rank": {"fsdp": {"replicas": 2}},
    "model built in configure_model": {"configure_model": True},
    "saved in shards": {"save": [2, 5, 8]},
    "saved as one file": {"save": [2, 5, 8, 10], "distributed": False},
}
REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "columns": (
        {"fsdp": {"columns": ["model.layers.1.mlp.up_proj.weight"]}},
        ["model.layers.1.mlp.up_proj has the placements (Shard(dim=1)) over", "shard_placement_fn"],
    ),
    "partly sharded": (
        {"fsdp": {"how": "first"}},
        ["layer model.model.layers.1.self_attn.q_proj is not sharded", "call fully_shard"],
    ),
    "tensor parallel": (
        {"fsdp": {"how": "tensor"}, "targets": ["*.up_proj"]},
        ["model.layers.0.mlp.up_proj has the placements (Shard(dim=0)) over", "tensor_parallel"],
    ),
    "tensor parallel and sharded": (
        {"fsdp": {"how": "both"}},
        ["model.layers.0.mlp.up_proj has the placements (_StridedShard"],
    ),
}
UNEVEN: dict[str, dict[str, Any]] = {
    "32-true-adamw": {"model": "narrow"},
    "bf16-true-sgd": {"model": "narrow", "precision": "bf16-true", "optimizer": "sgd"},
    "transposed weights": {"model": "gpt2"},
}
ZEROS = only(["32-true-adamw", "bf16-mixed-adamw-accumulating"], {**GRID, **KINDS})


def fsdp(case: dict[str, Any]) -> Path:
    return trained(strategy="fsdp", **case)


def check(case: dict[str, Any], ranks: int = 2) -> list[dict[str, Any]]:
    """What each rank saw, in which zeros hold everywhere; how many entries of each mask it holds."""
    out = trained(ranks, strategy="fsdp", **case)
    seen = check_everywhere(out, {"strategy": "fsdp", **case}, ranks)
    for rank in seen:
        assert rank["enforced"] == rank["steps"]
    replicas = case.get("fsdp", {}).get("replicas", 1)
    for name, keep in masks(out).items():
        assert sum(rank["held"][name.removesuffix(".weight")] for rank in seen) == keep.numel() * replicas
    return [rank["held"] for rank in seen]


@pytest.mark.parametrize("case", ZEROS)
def test_zeros_hold_everywhere(case: dict[str, Any]) -> None:
    check(case)


@pytest.mark.rest
@pytest.mark.parametrize("name", UNEVEN)
def test_shards_need_not_be_equal(name: str) -> None:
    """On three ranks, of which some hold more rows than others, or none."""
    held = check(UNEVEN[name], ranks=3)
    if UNEVEN[name]["model"] == "narrow":
        assert [rank["model.model.layers.0.self_attn.q_proj"] // 32 for rank in held] == [11, 11, 10]
        assert [rank["model.model.layers.0.self_attn.k_proj"] // 32 for rank in held] == [2, 2, 0]
    else:
        assert [rank["model.transformer.h.0.mlp.c_proj"] // 32 for rank in held] == [43, 43, 42]


@pytest.mark.parametrize("case", ZEROS)
def test_the_clipped_norm_is_that_of_the_sparse_model(case: dict[str, Any]) -> None:
    check_clipped(results(fsdp(case)), 1e-2 if case.get("precision") == "bf16-true" else 1e-5, least=5)


@pytest.mark.rest
@pytest.mark.parametrize(
    "name",
    [
        "kept gathered between forward and backward",
        "all as one, measured between",  # what a validation leaves gathered is not what the next step trains
        "a replica on each rank",
        "model built in configure_model",
        "saved in shards",
        "saved as one file",
    ],
)
def test_where_parameters_lie_changes_nothing(name: str) -> None:
    for one, other in zip(results(fsdp(GRID["32-true-adamw"])), results(fsdp(KINDS[name])), strict=True):
        assert one["losses"] == other["losses"]
        assert one["digest"] == other["digest"]


@pytest.mark.parametrize("stop", only(["5"], {"2": 2, "5": 5, "8": 8}))  # windows are 1-3, 4-6, 6-7
@pytest.mark.parametrize("name", only(["saved in shards"], ["saved in shards", "saved as one file"]))
def test_a_resumed_run_is_the_run_that_was_never_stopped(name: str, stop: int) -> None:
    check_resuming(stop, strategy="fsdp", **KINDS[name])


@pytest.mark.rest
def test_another_number_of_ranks_goes_on(tmp_path: Path) -> None:
    saved = fsdp(KINDS["saved in shards"]) / "step=5.ckpt" / "meta.pt"
    before = torch.load(saved, weights_only=True)["callbacks"]["ThanosPruningCallback"]["masks"]
    check_zeros(train(tmp_path, ranks=3, strategy="fsdp", resume=str(saved.parent)), steps=10, events=[3, 6, 7])
    for name, keep in check_equal_masks(tmp_path, ranks=3).items():
        assert float(keep.float().mean()) == 0.5
        assert not (keep & ~LayerMask.from_state(before[name]).keep).any()


@pytest.mark.rest
def test_a_single_file_says_whose_the_moments_are(tmp_path: Path) -> None:
    saved = fsdp(KINDS["saved as one file"]) / "step=10.ckpt"
    reports = verify_checkpoint(saved)
    assert len(reports) == 14
    assert failed(reports) == []
    name = "model.model.layers.1.mlp.up_proj.weight"

    def fill_moment(content: dict[str, Any]) -> None:
        (numbered,) = content["thanos_lightning"]["optimizer_parameters"]
        content["optimizer_states"][0]["state"][numbered.index(name)]["exp_avg"] += 1

    damaged = change_checkpoint(saved, tmp_path / "damaged.ckpt", fill_moment)
    assert [report.name for report in failed(verify_checkpoint(damaged))] == [name]


@pytest.mark.rest
@pytest.mark.parametrize(("case", "words"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_sharded_by_rows_is_refused_by_name(case: dict[str, Any], words: list[str]) -> None:
    for rank in results(fsdp(case)):
        assert rank["error"].startswith("MisconfigurationException")
        assert all(word in rank["error"] for word in words)
        assert rank["losses"] == []
