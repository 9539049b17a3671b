"""Two real ranks over gloo: they hold zeros under DDP, and prune as one process does under each strategy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ranks import (
    agreement,
    check_equal_masks,
    check_everywhere,
    check_resuming,
    check_sparsity,
    check_zeros,
    only,
    results,
    train,
    trained,
)

UNSTRUCTURED: dict[str, Any] = {"pattern": "unstructured", "sparsity": 0.6}
CASES: dict[str, dict[str, Any]] = {
    "bf16-mixed": {"precision": "bf16-mixed"},
    "bf16-true-sgd": {"optimizer": "sgd", "precision": "bf16-true"},
    "accumulating": {**UNSTRUCTURED, "accumulate": 3, "batch_size": 2, "max_steps": 13, "calibration_steps": 1},
}
AS_ONE: dict[str, dict[str, Any]] = {
    "ddp": {},
    "unstructured": UNSTRUCTURED,
    "zero3": {"strategy": "zero3"},
    "zero3, unstructured": {"strategy": "zero3", **UNSTRUCTURED},
    "fsdp": {"strategy": "fsdp"},
    "a calibration set": {**UNSTRUCTURED, "calibration_batches": 4},
    "one rank solves nothing": {"targets": ["*layers.0.mlp.up_proj"]},
}
RESUMED = {name: {**AS_ONE[name], "save": [2, 5]} for name in ("ddp", "unstructured", "zero3, unstructured")}


@pytest.mark.parametrize("case", only(["bf16-mixed"], CASES))
def test_zeros_hold_on_both_ranks(case: dict[str, Any]) -> None:
    check_everywhere(**case)


@pytest.mark.parametrize("case", only(["ddp", "unstructured", "zero3"], AS_ONE))
def test_two_ranks_prune_as_one_does(case: dict[str, Any]) -> None:
    """Two ranks with four sequences a batch see at each step what one rank with eight sees."""
    one, two = trained(1, batch_size=8, **{**case, "strategy": "auto"}), trained(**case)
    (alone,), both = results(one, 1), results(two)
    check_zeros([alone, *both])
    assert agreement(one, two) >= 0.999
    check_sparsity(check_equal_masks(two), case)
    halves = [sum(pair) / 2 for pair in zip(*(rank["losses"] for rank in both), strict=True)]
    assert halves == pytest.approx(alone["losses"], rel=2e-3)


@pytest.mark.parametrize("case", only(["ddp"], RESUMED))
def test_resume_inside_a_window_is_bit_identical(case: dict[str, Any]) -> None:
    # windows are 1-3, 4-6, 6-7; with an allocation the first one is that of its scan, too
    check_resuming(2, 5, **case)


@pytest.mark.rest
def test_a_layer_that_one_rank_never_calls_is_pruned_alike(tmp_path: Path) -> None:
    """As an expert that gets no token on some rank."""
    first, second = train(tmp_path, strategy="ddp_find_unused_parameters_true", routed=True)
    check_zeros((first, second), events=[3, 6, 7], digest=first["digest"])
    assert min(rank["checked"]["weight"] for rank in (first, second)) >= 15 * 2
    assert set(first["sums"]) == {9}
    assert set(second["sums"]) == {8}
    assert float(check_equal_masks(tmp_path)["expert.weight"].float().mean()) == 0.5
