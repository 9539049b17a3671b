"""A rank that fails where the package talks to others ends all of them, wherever that is."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("talking.py")
SECONDS = 60
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


def outcomes(out: Path, ks: list[int], ranks: int, fails: int, **case: Any) -> dict[int, list[int | None]]:
    out.mkdir(parents=True)
    plan = {"out": str(out), "case": {**SMALL, **case}, "ranks": ranks, "fails": fails, "ks": ks, "seconds": SECONDS}
    (out / "plan.json").write_text(json.dumps(plan))
    subprocess.run([sys.executable, str(SCRIPT), str(out / "plan.json")], check=True)
    return {int(k): codes for k, codes in json.loads((out / "outcomes.json").read_text()).items()}


@pytest.mark.rest
@pytest.mark.parametrize(("strategy", "ranks"), [("ddp", 2), ("zero2", 2), ("zero3", 2), ("zero3", 3), ("fsdp", 2)])
def test_no_rank_waits_for_one_that_fails_amid_a_talk(tmp_path: Path, strategy: str, ranks: int) -> None:
    fails = ranks - 1
    case = {"strategy": strategy}
    assert outcomes(tmp_path / "whole", [0], ranks, fails, **case) == {0: [0] * ranks}
    lines = json.loads((tmp_path / "whole" / "0" / f"talks{fails}.json").read_text())
    assert len(lines) > 20
    calls = range(1, len(lines) + 1)
    takes_all = os.environ.get("THANOS_TALKS") == "all"
    tried = list(calls) if takes_all else random.Random(f"{SEED} {strategy} {ranks}").sample(calls, TRIED)
    found = outcomes(tmp_path / "failing", tried, ranks, fails, **case)
    waited = {f"{k}: {lines[k - 1]}": codes for k, codes in found.items() if None in codes or 0 in codes}
    assert waited == {}, f"{len(waited)} of {len(tried)}"
    print(f"{strategy}, {ranks} ranks: failed at {len(tried)} of {len(lines)} calls")  # noqa: T201
