"""Two real ranks over gloo under DDP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import PRUNABLE, agreement, check_sparsity, masks, train

UNSTRUCTURED: dict[str, Any] = {"pattern": "unstructured", "sparsity": 0.6}


@pytest.mark.parametrize(
    ("case", "events"),
    [
        ({"optimizer": "adamw", "precision": "bf16-mixed"}, [3, 6, 7]),
        pytest.param({"optimizer": "sgd", "precision": "bf16-true"}, [3, 6, 7], marks=pytest.mark.rest),
        pytest.param(
            {"pattern": "unstructured", "sparsity": 0.6, "accumulate": 3, "batch_size": 2, "max_steps": 4},
            [3],
            marks=pytest.mark.rest,
        ),
    ],
)
def test_zeros_hold_on_both_ranks(tmp_path: Path, case: dict[str, Any], events: list[int]) -> None:
    first, second = train(tmp_path, **case)
    for rank in (first, second):
        assert rank["error"] is None
        assert rank["violations"] == []
        assert rank["collectives"] == []
        assert rank["control"] > 0
        assert rank["checked"]["weight"] >= 14 * 2
        assert rank["events"] == events
        asked = 0.4 if "pattern" not in case else 0.3  # less, where layers share a budget
        assert min(rank["sparsity"][name] for name in PRUNABLE) > asked
    assert first["digest"] == second["digest"]
    for name, keep in masks(tmp_path, 0).items():
        assert torch.equal(keep, masks(tmp_path, 1)[name])


@pytest.mark.parametrize(
    "case",
    [
        {},
        UNSTRUCTURED,
        pytest.param({**UNSTRUCTURED, "calibration_batches": 4}, marks=pytest.mark.rest),
        pytest.param({"targets": ["*layers.0.mlp.up_proj"]}, marks=pytest.mark.rest),  # one rank solves nothing
    ],
)
def test_two_ranks_prune_as_one_does(tmp_path: Path, case: dict[str, Any]) -> None:
    """Two ranks with four sequences a batch see at each step what one rank with eight sees."""
    (two, _) = train(tmp_path / "two", batch_size=4, **case)
    (one,) = train(tmp_path / "one", ranks=1, strategy="auto", batch_size=8, **case)
    assert one["error"] is two["error"] is None
    assert agreement(tmp_path / "one", tmp_path / "two") >= 0.999
    check_sparsity(masks(tmp_path / "two"), case)


@pytest.mark.parametrize("case", [{}, pytest.param(UNSTRUCTURED, marks=pytest.mark.rest)])
def test_resume_inside_a_window_is_bit_identical(tmp_path: Path, case: dict[str, Any]) -> None:
    whole = train(tmp_path / "whole", save=[2, 5], **case)
    # windows are 1-3, 4-6, 6-7; with an allocation the first one is that of its scan, too
    for stop in (2, 5):
        checkpoint = str(tmp_path / "whole" / f"step={stop}.ckpt")
        resumed = train(tmp_path / f"resumed{stop}", resume=checkpoint, **case)
        for before, after in zip(whole, resumed, strict=True):
            assert after["error"] is None
            assert after["losses"] == before["losses"][stop:]
            assert after["digest"] == before["digest"]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("nan", ": layer model.model.layers.1.mlp.down_proj: "),
        ("refill exp_avg", "rank 1: 768 of 768 pruned entries of model.model.layers.1.mlp.up_proj.weight (exp_avg)"),
        pytest.param("memory", "OutOfMemoryError: tried to allocate 1 PiB", marks=pytest.mark.rest),
    ],
)
def test_a_fault_on_one_rank_ends_both_with_its_name(tmp_path: Path, fault: str, words: str) -> None:
    for rank in train(tmp_path, fault=fault):
        assert rank["error"] is not None
        assert rank["error"].startswith(("PruningError: rank ", "ZeroViolationError: zeros came back: rank 1"))
        assert words in rank["error"]
        if not fault.startswith("refill"):
            assert rank["events"] == []


@pytest.mark.rest
def test_a_layer_that_one_rank_never_calls_is_pruned_alike(tmp_path: Path) -> None:
    """As an expert that gets no token on some rank."""
    first, second = train(tmp_path, strategy="ddp_find_unused_parameters_true", routed=True)
    for rank in (first, second):
        assert rank["error"] is None
        assert rank["violations"] == []
        assert rank["events"] == [3, 6, 7]
        assert rank["checked"]["weight"] >= 15 * 2
    assert set(first["sums"]) == {9}
    assert set(second["sums"]) == {8}
    assert first["digest"] == second["digest"]
    assert torch.equal(masks(tmp_path)["expert.weight"], masks(tmp_path, 1)["expert.weight"])
    assert float(masks(tmp_path)["expert.weight"].float().mean()) == 0.5
