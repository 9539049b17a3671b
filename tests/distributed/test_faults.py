"""A rank that fails where the package talks to others ends all of them, wherever that is."""

from __future__ import annotations

import json
import os
import random
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import training
from ranks import start

import thanos_lightning

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
PACKAGE = str(Path(thanos_lightning.__file__).parent)
TALKS = (
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_reduce",
    "barrier",
    "batch_isend_irecv",
    "broadcast",
    "broadcast_object_list",
    "new_group",
    "reduce",
    "reduce_scatter_tensor",
)


class FailingError(RuntimeError):
    """What the chosen rank fails with."""


class Talks:
    """Counts the calls, and fails at one of them."""

    def __init__(self, fails_at: int) -> None:
        self.fails_at, self.number = fails_at, 0
        self.depth = 0
        self.lines: list[str] = []
        for name in TALKS:
            setattr(dist, name, self._counted(getattr(dist, name)))

    def _counted(self, talk: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            line = self._line()
            if self.depth or line is None:
                return talk(*args, **kwargs)
            self.number += 1
            self.lines.append(line)
            if self.number == self.fails_at:
                raise FailingError(f"call {self.number}, {line}")
            self.depth += 1
            try:
                return talk(*args, **kwargs)
            finally:
                self.depth -= 1

        return call

    @staticmethod
    def _line() -> str | None:
        """The line of the package that asks, None where it is another's."""
        frame: Any = sys._getframe(2)
        while frame is not None:
            if frame.f_code.co_filename.startswith(PACKAGE):
                return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
            frame = frame.f_back
        return None


def main(told: str) -> None:
    """Train, on one rank, {"out", "case", "fails": rank, "at": the call, from 1}; ends the process.

    Its exit code is 0 for a training that ends well, 2 for one that ends with an error that it tells. What talked is
    written to talks<rank>.json.
    """
    torch.set_num_threads(1)
    plan = json.loads(Path(told).read_text())
    out, rank = Path(plan["out"]), int(os.environ["RANK"])
    talks = Talks(plan["at"] if rank == plan["fails"] else 0)
    code = 1
    try:
        training.train(training.Case(out=str(out), **plan["case"]))
        report = json.loads((out / f"rank{rank}.json").read_text())
        (out / f"talks{rank}.json").write_text(json.dumps(talks.lines))
        code = 0 if report["error"] is None else 2
        sys.stdout.write(str(report["error"]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # at once, as a process that fails: nothing is left to say to the others


def outcome(root: Path, k: int, ranks: int, fails: int, strategy: str) -> list[int]:
    """The exit codes where a rank fails at the k-th call, none at the 0th. All have to end."""
    out = root / str(k)
    plan = {"out": str(out), "case": {**SMALL, "strategy": strategy}, "fails": fails, "at": k}
    return start(out, [plan], ranks, run="test_faults").codes


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
