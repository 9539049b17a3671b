"""A rank that fails where the package talks to others ends all of them, wherever that is."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from ranks import start

SMALL: dict[str, Any] = {
    "pattern": "unstructured",
    "sparsity": 0.5,
    "calibration_batches": 3,
    "schedule": (1, 1, 1),
    "max_steps": 3,
    "save": True,
    "targets": ["*layers.0.mlp.*"],
    "watch": False,
}
SEED = int(os.environ.get("THANOS_SEED", "0"))
TRIED = 2  # calls at which a rank fails, drawn from the seed; THANOS_TALKS=all takes each


def outcome(root: Path, k: int, ranks: int, fails: int, strategy: str) -> list[int]:
    """The exit codes where a rank fails at the k-th call, none at the 0th. All have to end."""
    out = root / str(k)
    plan = {"out": str(out), "case": {**SMALL, "strategy": strategy}, "fails": fails, "at": k}
    return start(out, [plan], ranks, run="talking").codes


@pytest.mark.rest
@pytest.mark.parametrize(("strategy", "ranks"), [("ddp", 2), ("zero2", 2), ("zero3", 2), ("zero3", 3), ("fsdp", 2)])
def test_no_rank_waits_for_one_that_fails_amid_a_talk(tmp_path: Path, strategy: str, ranks: int) -> None:
    fails = ranks - 1
    assert outcome(tmp_path, 0, ranks, fails, strategy) == [0] * ranks
    lines = json.loads((tmp_path / "0" / f"talks{fails}.json").read_text())
    assert len(lines) > 20
    calls = range(1, len(lines) + 1)
    takes_all = os.environ.get("THANOS_TALKS") == "all"
    tried = list(calls) if takes_all else random.Random(f"{SEED} {strategy} {ranks}").sample(calls, TRIED)
    for k in tried:
        assert 0 not in outcome(tmp_path, k, ranks, fails, strategy), f"call {k}: {lines[k - 1]}"
    print(f"{strategy}, {ranks} ranks: failed at {len(tried)} of {len(lines)} calls")  # noqa: T201
