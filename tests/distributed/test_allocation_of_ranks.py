"""A budget shared among layers by two real ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ranks import agreement, masks, train

ALLOCATED = {"pattern": "unstructured", "sparsity": 0.5, "allocation": {"by": "loss"}, "schedule": (0, 8, 4)}


@pytest.mark.rest
@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_two_ranks_allocate_as_one_does(tmp_path: Path, strategy: str) -> None:
    two = train(tmp_path / "two", strategy=strategy, batch_size=4, save=[3], **ALLOCATED)
    (one,) = train(tmp_path / "one", ranks=1, strategy="auto", batch_size=8, **ALLOCATED)
    for rank in (*two, one):
        assert rank["error"] is None
        assert rank["violations"] == []
        assert rank["events"] == [4, 8]
    found = masks(tmp_path / "two", 0)
    assert all(torch.equal(keep, masks(tmp_path / "two", 1)[name]) for name, keep in found.items())
    pruned = {name: int((~keep).sum()) for name, keep in found.items()}
    assert sum(pruned.values()) == sum(int(0.5 * keep.numel()) for keep in found.values())
    sparsities = [pruned[name] / keep.numel() for name, keep in found.items()]
    assert max(sparsities) - min(sparsities) > 0.05
    assert agreement(tmp_path / "one", tmp_path / "two") >= 0.99
    # inside the window of the scan, from the second step to the fourth
    case = {**ALLOCATED, "resume": str(tmp_path / "two" / "step=3.ckpt")}
    resumed = train(tmp_path / "resumed", strategy=strategy, batch_size=4, **case)
    for before, after in zip(two, resumed, strict=True):
        assert after["error"] is None
        assert after["digest"] == before["digest"]
