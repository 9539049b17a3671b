"""Trains with a rank that fails at the k-th call in which the package talks to others: python talking.py PLAN.json.

PLAN.json has the case, the rank that fails, the k's, and the seconds in which all ranks have to end. For each k the
ranks are forked off this process, which has imported everything: so a k takes two seconds and not ten. What became of
them is written to the plan's folder: for each k the exit codes, None for a rank that had to be killed; and where none
fails, as at k = 0, the lines that talk.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import ranks
import torch
import torch.distributed as dist
import training

import thanos_lightning

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


def run(out: Path, case: dict[str, Any], rank: int, number: int, port: int, fails_at: int) -> None:
    """One rank, in a process of its own, which ends here."""
    log = os.open(out / f"log{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(ranks.environment(rank, number, port))
    training.WORLD_SIZE = number
    talks = Talks(fails_at)
    code = 1
    try:
        training.train(training.Case(out=str(out), **case))
        report = json.loads((out / f"rank{rank}.json").read_text())
        (out / f"talks{rank}.json").write_text(json.dumps(talks.lines))
        code = 0 if report["error"] is None else 2
        sys.stdout.write(str(report["error"]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def outcome(plan: dict[str, Any], k: int) -> list[int | None]:
    """The ranks' exit codes."""
    out = Path(plan["out"]) / str(k)
    out.mkdir(parents=True, exist_ok=True)
    port = ranks.free_port()
    children = []
    for rank in range(plan["ranks"]):
        pid = os.fork()
        if pid == 0:
            run(out, plan["case"], rank, plan["ranks"], port, k if rank == plan["fails"] else 0)
        children.append(pid)
    codes: dict[int, int | None] = {}
    end = time.monotonic() + plan["seconds"]
    while len(codes) < len(children):
        for pid in set(children) - codes.keys():
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                codes[pid] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                codes[pid] = None
        time.sleep(0.02)
    return [codes[pid] for pid in children]


def main() -> None:
    torch.set_num_threads(1)
    plan = json.loads(Path(sys.argv[1]).read_text())
    Path(plan["out"]).joinpath("outcomes.json").write_text(json.dumps({k: outcome(plan, k) for k in plan["ks"]}))


if __name__ == "__main__":
    main()
