"""Two real ranks over gloo under DDP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ranks import PRUNABLE, agreement, check_equal_masks, check_resumed, check_sparsity, check_zeros, train

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
    check_zeros((first, second), collectives=[], events=events, digest=first["digest"])
    check_equal_masks(tmp_path)
    for rank in (first, second):
        assert rank["control"] > 0
        assert rank["checked"]["weight"] >= 14 * 2
        asked = 0.4 if "pattern" not in case else 0.3  # less, where layers share a budget
        assert min(rank["sparsity"][name] for name in PRUNABLE) > asked


@pytest.mark.parametrize(
    "case",
    [
        {},
        UNSTRUCTURED,
        pytest.param({**UNSTRUCTURED, "strategy": "zero3"}, marks=pytest.mark.rest),
        pytest.param({**UNSTRUCTURED, "calibration_batches": 4}, marks=pytest.mark.rest),
        pytest.param({"targets": ["*layers.0.mlp.up_proj"]}, marks=pytest.mark.rest),  # one rank solves nothing
    ],
)
def test_two_ranks_prune_as_one_does(tmp_path: Path, case: dict[str, Any]) -> None:
    """Two ranks with four sequences a batch see at each step what one rank with eight sees."""
    two = train(tmp_path / "two", batch_size=4, **case)
    one = train(tmp_path / "one", ranks=1, batch_size=8, **{**case, "strategy": "auto"})
    check_zeros([*one, *two])
    assert agreement(tmp_path / "one", tmp_path / "two") >= 0.999
    check_sparsity(check_equal_masks(tmp_path / "two"), case)


@pytest.mark.parametrize(
    "case",
    [
        {},
        pytest.param(UNSTRUCTURED, marks=pytest.mark.rest),
        pytest.param({**UNSTRUCTURED, "strategy": "zero3"}, marks=pytest.mark.rest),
    ],
)
def test_resume_inside_a_window_is_bit_identical(tmp_path: Path, case: dict[str, Any]) -> None:
    train(tmp_path / "whole", save=[2, 5], **case)
    # windows are 1-3, 4-6, 6-7; with an allocation the first one is that of its scan, too
    for stop in (2, 5):
        checkpoint = str(tmp_path / "whole" / f"step={stop}.ckpt")
        train(tmp_path / f"resumed{stop}", resume=checkpoint, **case)
        check_resumed(tmp_path / "whole", tmp_path / f"resumed{stop}", stop)


@pytest.mark.rest
def test_a_layer_that_one_rank_never_calls_is_pruned_alike(tmp_path: Path) -> None:
    """As an expert that gets no token on some rank."""
    first, second = train(tmp_path, strategy="ddp_find_unused_parameters_true", routed=True)
    check_zeros((first, second), events=[3, 6, 7], digest=first["digest"])
    assert min(rank["checked"]["weight"] for rank in (first, second)) >= 15 * 2
    assert set(first["sums"]) == {9}
    assert set(second["sums"]) == {8}
    assert float(check_equal_masks(tmp_path)["expert.weight"].float().mean()) == 0.5
