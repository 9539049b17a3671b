"""Ranks that differ, in data or in memory: they work, or all end with one error; none waits for another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from ranks import check_equal_masks, check_zeros, only, train

LEFT = "step=3.ckpt"
STRATEGIES = ("ddp", "zero2", "zero3", "fsdp")
CALIBRATED: dict[str, Any] = {
    "calibration_batches": 7,
    "pattern": "unstructured",
    "sparsity": 0.6,
    "schedule": (3, 3, 1),
    "max_steps": 5,
}
DATA: dict[str, dict[str, Any]] = {"a calibration set": CALIBRATED, "training batches": {"max_steps": 5}}
MEMORY = {
    "memory inside a forward": DATA,
    "memory for messages": DATA,
    "memory for weights": ["a calibration set"],  # of the scan
    "memory": ["training batches"],  # in solving
}
REFUSED: dict[str, tuple[dict[str, Any], Sequence[str]]] = {
    **{
        f"{strategy}, {what}": ({"strategy": strategy, **case}, words)
        for strategy in STRATEGIES
        for what, (case, *words) in {
            "no calibration batch": (
                {**CALIBRATED, "fewer": 7},
                "ValueError: calibration.batches has no batch on rank 1",
            ),
            "fewer training batches": (
                {"fewer": 2, "epochs": 1},
                "rank 0 has 27 optimizer steps to train and rank 1 has 25",
            ),
            "a full disk": (
                {"fault": "disk", "save": [3], "max_steps": 5},
                f"PruningError: rank {int(strategy != 'ddp')}: ",
                f"{LEFT} can't be written (No space left on device)",
            ),
            "nan": ({"fault": "nan"}, "PruningError: rank 1: layer model.model.layers.1.mlp.down_proj: "),
            "a mask that is none": (
                {"fault": "mask", "uncounted": []},
                "PruningError: rank 1: the batch's 'counted' has shape (4, 16)",
            ),
            "no token at all": ({"uncounted": [0, 1]}, "PruningError: no token was counted at all"),
        }.items()
    },
    **{
        f"{strategy}, {fault}, {data}": (
            {"strategy": strategy, "fault": fault, **DATA[data]},
            ("PruningError: rank 1: ", "OutOfMemoryError: tried to allocate 1 PiB"),
        )
        for strategy in STRATEGIES
        for fault, where in MEMORY.items()
        for data in where
    },
}
REFILLED = {
    f"{strategy}, {what}": (strategy, what)
    for strategy in ("ddp", "zero1", "zero2", "zero3", "fsdp")
    for what in ("weight", "master", "exp_avg", "exp_avg_sq")
    if what != "master" or strategy.startswith("zero")
}
DEFAULT = ["ddp, no calibration batch", "zero3, memory inside a forward, a calibration set"]
DEFAULT += [f"{strategy}, nan" for strategy in ("ddp", "zero3", "fsdp")]


# of 7 batches rank r of R counts r, r + R, … that it has; rank 1 lacks some at the end
COUNTED = {"one fewer": (1, [4, 3]), "two fewer": (2, [4, 2]), "three ranks, three fewer": (3, [3, 1, 2])}


@pytest.mark.parametrize("case", only(["one fewer"], COUNTED))
@pytest.mark.parametrize("strategy", only(["zero3"], [*STRATEGIES]))
def test_a_calibration_set_that_ends_early_on_one_rank_is_counted_to_the_end(
    tmp_path: Path, strategy: str, case: tuple[int, list[int]]
) -> None:
    fewer, counted = case
    seen = train(tmp_path, len(counted), strategy=strategy, fewer=fewer, **CALIBRATED)
    check_zeros(seen, events=[3])
    check_equal_masks(tmp_path, len(counted))
    assert [sum(rank["tokens"]) / (14 * 4 * 16) for rank in seen] == counted  # each layer, once


def test_each_rank_counts_all_that_a_distributed_sampler_gives_it(tmp_path: Path) -> None:
    ranks = train(tmp_path, **{**CALIBRATED, "calibration_batches": 8, "sampled": True})
    check_zeros(ranks)
    check_equal_masks(tmp_path)
    assert [sum(rank["tokens"]) for rank in ranks] == [4 * 14 * 4 * 16] * 2  # of 8 batches each has four


@pytest.mark.parametrize("name", only(DEFAULT, [*REFUSED]))
def test_all_ranks_end_with_one_error(tmp_path: Path, name: str) -> None:
    case, words = REFUSED[name]
    first, second = train(tmp_path, **case)
    assert first["error"] is not None
    assert all(one in first["error"] for one in words)
    assert second["error"] == first["error"]
    if "memory for weights" in name:  # of the scan, and not of the event behind it
        assert first["scanned"] == second["scanned"] == 0
    if name.endswith("a full disk"):  # nor is there a part of it
        assert [path for path in tmp_path.iterdir() if LEFT in path.name] == []
    else:
        assert first["events"] == second["events"] == []


@pytest.mark.parametrize("name", only(["ddp, exp_avg", "zero3, master"], [*REFILLED]))
def test_what_one_rank_fills_is_found_on_all(tmp_path: Path, name: str) -> None:
    strategy, what = REFILLED[name]
    for rank in train(tmp_path, strategy=strategy, precision="bf16-mixed", fault=f"refill {what}"):
        assert "ZeroViolationError: zeros came back: rank 1: " in rank["error"]
        assert f"pruned entries of model.model.layers.1.mlp.up_proj.weight ({what})" in rank["error"]
        assert rank["steps"] == 9
        assert rank["violations"] == []  # before


@pytest.mark.rest
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_three_ranks_end_with_one_error(tmp_path: Path, strategy: str) -> None:
    errors = [rank["error"] for rank in train(tmp_path, 3, strategy=strategy, fewer=2, epochs=1)]
    assert "optimizer steps to train and rank 1 has" in errors[0]
    assert errors == errors[:1] * 3
