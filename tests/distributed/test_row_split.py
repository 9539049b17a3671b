"""Ranks that outnumber the layers of a window, and so split their rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import agreement, masks, results, start, train_all

ONE_LAYER = ["*layers.0.self_attn.k_proj"]
TWO_LAYERS = ["*layers.0.self_attn.k_proj", "*layers.0.mlp.down_proj"]
PATTERNS: dict[str, dict[str, Any]] = {
    "2:4": {"pattern": "2:4"},
    "unstructured": {"pattern": "unstructured", "sparsity": 0.6},
    "structured": {"pattern": "structured", "sparsity": 0.3},
}
# What one rank sees in a batch, several see together.
SEQUENCES = {1: {2: 8, 3: 12}, 2: {2: 4}, 3: {3: 4}}
FAULTS: dict[str, dict[str, Any]] = {
    "nan": {"fault": "nan", "targets": ["*layers.1.mlp.down_proj"]},
    "memory": {"fault": "memory", "targets": ONE_LAYER},
}


def folder(root: Path, ranks: int, strategy: str, number: int, name: str, like: int) -> Path:
    return root / f"{ranks} {strategy}, {number} {name}, as {like} ranks"


def cases(root: Path, ranks: int, strategy: str, like: int) -> list[dict[str, Any]]:
    return [
        {
            "out": str(folder(root, ranks, strategy, number, name, like)),
            "strategy": strategy,
            "targets": targets,
            "batch_size": SEQUENCES[ranks][like],
            "max_steps": 7,
            "watch": False,
            **pattern,
        }
        for name, pattern in PATTERNS.items()
        for number, targets in ((1, ONE_LAYER), (2, TWO_LAYERS))
        if number < like
    ]


@pytest.mark.rest
def test_windows_without_a_training(tmp_path: Path) -> None:
    """All methods and patterns on three ranks, and members that fail at all places: see the script."""
    ended = start(tmp_path, [], ranks=3, run="row_split")
    assert ended.codes == [0] * 3, "\n".join(text[-3000:] for text in ended.outputs)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All trainings of as many ranks one after the other in the same processes."""
    root = tmp_path_factory.mktemp("split")
    jobs = {
        1: cases(root, 1, "auto", 2) + cases(root, 1, "auto", 3),
        2: cases(root, 2, "ddp", 2) + cases(root, 2, "zero3", 2),
        3: cases(root, 3, "ddp", 3) + cases(root, 3, "zero3", 3),
    }
    jobs[2] += [
        {"out": str(root / f"{strategy} {fault}"), "strategy": strategy, **case}
        for strategy in ("ddp", "zero3")
        for fault, case in FAULTS.items()
    ]
    for ranks, its_cases in jobs.items():
        train_all(its_cases, ranks)
    return root


@pytest.mark.rest
@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
@pytest.mark.parametrize(("ranks", "number"), [(2, 1), (3, 1), (3, 2)])
def test_ranks_that_split_rows_prune_as_one_does(
    trained: Path, ranks: int, number: int, strategy: str, name: str
) -> None:
    split = folder(trained, ranks, strategy, number, name, ranks)
    whole = folder(trained, 1, "auto", number, name, ranks)
    expected = masks(whole)
    assert len(expected) == number
    for rank, seen in enumerate(results(split, ranks)):
        assert seen["error"] is None
        assert seen["events"] == [3, 6, 7]
        for mask_name, keep in masks(split, rank).items():
            assert torch.equal(keep, masks(split)[mask_name])
            assert keep.sum() == expected[mask_name].sum()
    assert agreement(whole, split) >= 0.999


@pytest.mark.rest
@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("nan", "layers.1.mlp.down_proj: the hessian holds NaN"),
        ("memory", "layers.0.self_attn.k_proj: OutOfMemoryError: tried to allocate 1 PiB (on rank 1)"),
    ],
)
def test_a_fault_on_one_member_ends_all_with_its_name(trained: Path, strategy: str, fault: str, words: str) -> None:
    for rank in results(trained / f"{strategy} {fault}"):
        assert rank["error"].startswith(f"PruningError: layer model.model.{words}")
        assert rank["events"] == []
