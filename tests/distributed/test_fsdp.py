"""Real ranks over gloo under FSDP2: Lightning's ModelParallelStrategy, and fully_shard in configure_model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import change_checkpoint, failed
from ranks import (
    Trainings,
    agreement,
    check_clipped,
    check_equal_masks,
    check_resumed,
    check_sparsity,
    check_zeros,
    only,
    results,
    train,
)

from thanos_lightning.checkpoints.verify import verify_checkpoint
from thanos_lightning.sharding.masks import LayerMask

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
    "saved as one file": {"save": [2, 8, 10], "distributed": False},
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
STOPS = {"saved in shards": (2, 5, 8), "saved as one file": (2, 8)}  # windows are 1-3, 4-6, 6-7
UNEVEN: dict[str, dict[str, Any]] = {
    "32-true-adamw": {"model": "narrow"},
    "bf16-true-sgd": {"model": "narrow", "precision": "bf16-true", "optimizer": "sgd"},
    "transposed weights": {"model": "gpt2"},
}
ZEROS = only(["32-true-adamw", "bf16-mixed-adamw-accumulating"], [*GRID, *KINDS])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trainings:
    resumed = {
        f"{name}, resumed after {stop}": {**KINDS[name], "resume": (name, stop)}
        for name, stops in STOPS.items()
        for stop in stops
    }
    cases = {**GRID, **KINDS, **resumed, "ddp": {"strategy": "ddp"}}
    return Trainings(
        tmp_path_factory.mktemp("fsdp"), {name: {"strategy": "fsdp", **case} for name, case in cases.items()}
    )


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Trainings:
    """On three ranks, of which some hold more rows than others, or none."""
    cases = {name: {"strategy": "fsdp", **case} for name, case in UNEVEN.items()}
    return Trainings(tmp_path_factory.mktemp("uneven"), cases, ranks=3)


def check(out: Path, case: dict[str, Any], ranks: int) -> None:
    seen = results(out, ranks)
    num_layers = 8 if case.get("model") == "gpt2" else 14
    moments = {"momentum_buffer"} if case.get("optimizer") == "sgd" else {"exp_avg", "exp_avg_sq"}
    steps = case.get("max_steps", 10)
    expected = {"steps": steps, "enforced": steps, "collectives": [], "events": [3, 6, 7]}
    check_zeros(seen, digest=seen[0]["digest"], **expected)
    for rank in seen:
        assert rank["checked"].keys() == {"weight"} | moments
        assert min(rank["checked"].values()) >= num_layers * (steps - 7)
        assert rank["control"] > 0
    kept = check_equal_masks(out, ranks)
    check_sparsity(kept, case)
    assert len(kept) == num_layers
    for name, keep in kept.items():
        module = name.removesuffix(".weight")
        held = [rank["held"][module] for rank in seen]
        replicas = case.get("fsdp", {}).get("replicas", 1)
        assert sum(held) == keep.numel() * replicas


@pytest.mark.parametrize("name", ZEROS)
def test_zeros_hold_everywhere(trained: Trainings, name: str) -> None:
    check(trained(name), {**GRID, **KINDS}[name], ranks=2)


@pytest.mark.rest
@pytest.mark.parametrize("name", UNEVEN)
def test_shards_need_not_be_equal(uneven: Trainings, name: str) -> None:
    check(uneven(name), UNEVEN[name], ranks=3)
    held = [rank["held"] for rank in results(uneven(name), 3)]
    if UNEVEN[name]["model"] == "narrow":
        assert [rank["model.model.layers.0.self_attn.q_proj"] // 32 for rank in held] == [11, 11, 10]
        assert [rank["model.model.layers.0.self_attn.k_proj"] // 32 for rank in held] == [2, 2, 0]
    else:
        assert [rank["model.transformer.h.0.mlp.c_proj"] // 32 for rank in held] == [43, 43, 42]


@pytest.mark.parametrize("name", ZEROS)
def test_the_clipped_norm_is_that_of_the_sparse_model(trained: Trainings, name: str) -> None:
    is_rounded = {**GRID, **KINDS}[name].get("precision") == "bf16-true"
    check_clipped(results(trained(name)), 1e-2 if is_rounded else 1e-5, least=5)


@pytest.mark.rest
def test_ddp_prunes_alike(trained: Trainings) -> None:
    assert agreement(trained("ddp"), trained("32-true-adamw")) >= 0.999
    for ddp, fsdp in zip(results(trained("ddp")), results(trained("32-true-adamw")), strict=True):
        assert ddp["error"] is None
        assert fsdp["losses"] == pytest.approx(ddp["losses"], rel=2e-3)


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
def test_where_parameters_lie_changes_nothing(trained: Trainings, name: str) -> None:
    for one, other in zip(results(trained("32-true-adamw")), results(trained(name)), strict=True):
        assert one["losses"] == other["losses"]
        assert one["digest"] == other["digest"]


@pytest.mark.parametrize(
    ("name", "stop"),
    [
        pytest.param(name, stop, marks=() if (name, stop) == ("saved in shards", 5) else pytest.mark.rest)
        for name, stops in STOPS.items()
        for stop in stops
    ],
)
def test_a_resumed_run_is_the_run_that_was_never_stopped(trained: Trainings, name: str, stop: int) -> None:
    check_resumed(trained(name), trained(f"{name}, resumed after {stop}"), stop)


@pytest.mark.rest
def test_another_number_of_ranks_goes_on(trained: Trainings, tmp_path: Path) -> None:
    saved = trained("saved in shards") / "step=5.ckpt" / "meta.pt"
    before = torch.load(saved, weights_only=True)["callbacks"]["ThanosPruningCallback"]["masks"]
    check_zeros(train(tmp_path, ranks=3, strategy="fsdp", resume=str(saved.parent)), steps=10, events=[3, 6, 7])
    for name, keep in check_equal_masks(tmp_path, ranks=3).items():
        assert float(keep.float().mean()) == 0.5
        assert not (keep & ~LayerMask.from_state(before[name]).keep).any()


@pytest.mark.rest
def test_a_single_file_says_whose_the_moments_are(trained: Trainings, tmp_path: Path) -> None:
    saved = trained("saved as one file") / "step=10.ckpt"
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
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_sharded_by_rows_is_refused_by_name(tmp_path: Path, name: str) -> None:
    case, words = REFUSED[name]
    for rank in train(tmp_path, strategy="fsdp", **case):
        assert rank["error"].startswith("MisconfigurationException")
        assert all(word in rank["error"] for word in words)
        assert rank["losses"] == []
