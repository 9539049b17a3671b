"""Ranks that differ, in data or in memory: they work, or all end with one error; none waits for another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import Trainings, masks, only, results

LEFT = "step=3.ckpt"
STRATEGIES = ("ddp", "zero2", "zero3", "fsdp")
CALIBRATED: dict[str, Any] = {
    "calibration_batches": 7,
    "pattern": "unstructured",
    "sparsity": 0.6,
    "schedule": (3, 3, 1),
    "max_steps": 5,
}
FEWER: dict[str, dict[str, Any]] = {
    f"{strategy}, {fewer} batches fewer": {"strategy": strategy, "fewer": fewer, **CALIBRATED}
    for strategy in STRATEGIES
    for fewer in (1, 2)
}
DATA: dict[str, dict[str, Any]] = {"a calibration set": CALIBRATED, "training batches": {"max_steps": 5}}
MEMORY = {
    "memory inside a forward": DATA,
    "memory for messages": DATA,
    "memory for weights": ["a calibration set"],  # of the scan
    "memory": ["training batches"],  # in solving
}
REFUSED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    **{
        f"{strategy}, {what}": (case, words)
        for strategy in STRATEGIES
        for what, (case, words) in {
            "no calibration batch": (
                {"strategy": strategy, **CALIBRATED, "fewer": 7},
                ("ValueError: calibration.batches has no batch on rank 1",),
            ),
            "fewer training batches": (
                {"strategy": strategy, "fewer": 2, "epochs": 1},
                ("rank 0 has 27 optimizer steps to train and rank 1 has 25",),
            ),
            "a full disk": (
                {"strategy": strategy, "fault": "disk", "save": [3], "max_steps": 5},
                (
                    f"PruningError: rank {int(strategy != 'ddp')}: ",
                    f"{LEFT} can't be written (No space left on device)",
                ),
            ),
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
SAMPLED = "ddp, a distributed sampler"
ON_THREE: dict[str, dict[str, Any]] = {
    strategy: {"strategy": strategy, "fewer": 3, **CALIBRATED} for strategy in STRATEGIES
}
REFUSED_ON_THREE: dict[str, dict[str, Any]] = {
    f"{strategy}, fewer training batches": {"strategy": strategy, "fewer": 2, "epochs": 1} for strategy in STRATEGIES
}
DEFAULT = ["ddp, no calibration batch", "zero3, memory inside a forward, a calibration set"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trainings:
    sampled = {**CALIBRATED, "calibration_batches": 8, "sampled": True}
    cases = {**FEWER, SAMPLED: {"strategy": "ddp", **sampled}, **{name: case for name, (case, _) in REFUSED.items()}}
    return Trainings(tmp_path_factory.mktemp("unequal"), cases)


@pytest.fixture(scope="module")
def of_three(tmp_path_factory: pytest.TempPathFactory) -> Trainings:
    return Trainings(tmp_path_factory.mktemp("three"), {**ON_THREE, **REFUSED_ON_THREE}, ranks=3)


@pytest.mark.parametrize("name", only(["zero3, 1 batches fewer"], FEWER))
def test_a_calibration_set_that_ends_early_on_one_rank_is_counted_to_the_end(trained: Trainings, name: str) -> None:
    first, second = results(trained(name))
    for rank in (first, second):
        assert rank["error"] is None
        assert rank["violations"] == []
        assert rank["events"] == [3]
    # of 7 batches rank 0 counts 0, 2, 4 and 6, and rank 1 those of 1, 3 and 5 that it has; each layer, once
    per_batch = 14 * 4 * 16
    assert sum(first["tokens"]) == 4 * per_batch
    assert sum(second["tokens"]) == {1: 3, 2: 2}[FEWER[name]["fewer"]] * per_batch
    for mask_name, keep in masks(trained(name)).items():
        assert torch.equal(keep, masks(trained(name), 1)[mask_name])


def test_each_rank_counts_all_that_a_distributed_sampler_gives_it(trained: Trainings) -> None:
    ranks = results(trained(SAMPLED))
    assert [rank["error"] for rank in ranks] == [None, None]
    assert [sum(rank["tokens"]) for rank in ranks] == [4 * 14 * 4 * 16] * 2  # of 8 batches each has four
    for mask_name, keep in masks(trained(SAMPLED)).items():
        assert torch.equal(keep, masks(trained(SAMPLED), 1)[mask_name])


@pytest.mark.parametrize("name", only(DEFAULT, REFUSED))
def test_all_ranks_end_with_one_error(trained: Trainings, name: str) -> None:
    first, second = results(trained(name))
    assert first["error"] is not None
    assert all(words in first["error"] for words in REFUSED[name][1])
    assert second["error"] == first["error"]
    if "memory for weights" in name:  # of the scan, and not of the event behind it
        assert first["scanned"] == second["scanned"] == 0
    if name.endswith("a full disk"):  # nor is there a part of it
        assert [path for path in trained(name).iterdir() if LEFT in path.name] == []


@pytest.mark.rest
@pytest.mark.parametrize("strategy", ON_THREE)
def test_three_ranks_count_what_they_have(of_three: Trainings, strategy: str) -> None:
    ranks = results(of_three(strategy), 3)
    for rank in ranks:
        assert rank["error"] is None
        assert rank["violations"] == []
        assert rank["events"] == [3]
    # of 7 batches rank 0 counts 0, 3 and 6, rank 1, which has four, that of 1, and rank 2 those of 2 and 5
    assert [sum(rank["tokens"]) / (14 * 4 * 16) for rank in ranks] == [3, 1, 2]
    for mask_name, keep in masks(of_three(strategy)).items():
        assert torch.equal(keep, masks(of_three(strategy), 2)[mask_name])


@pytest.mark.rest
@pytest.mark.parametrize("name", REFUSED_ON_THREE)
def test_three_ranks_end_with_one_error(of_three: Trainings, name: str) -> None:
    errors = [rank["error"] for rank in results(of_three(name), 3)]
    assert "optimizer steps to train and rank 1 has" in errors[0]
    assert errors == errors[:1] * 3
