"""Forks ranks off one process that has imported everything: python nursery.py.

To import takes ten seconds of a core, for each process that is started. Each line of the standard input is a JSON
object, and so is each answer: {"fork": the environment, "run": module, "argument": for its main, "log": file} is
answered by the process id, {"poll": ids} by the exit codes, null for a process that has not ended. A rank whose
environment names a network namespace (TEST_NETWORK) moves there.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

IMPORTED = (
    *("deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer"),  # else each engine imports it, for a second
    *("training", "teaching"),
)
ANY_KIND = 0


def join(network: str) -> None:
    """Move this process, and what it starts from now on, into the network namespace of that name."""
    with open(f"/run/netns/{network}") as file:
        failed = ctypes.CDLL(None, use_errno=True).setns(file.fileno(), ANY_KIND)  # os.setns is Python 3.12's
    if failed:
        raise OSError(ctypes.get_errno(), f"setns into {network}")


def fork(told: dict[str, Any]) -> int:
    """The process id of a rank; does not return in the rank itself, which ends as a process of its own does."""
    child = os.fork()
    if child:
        return child
    with Path(told["log"]).open("w") as log, open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ.clear()
    os.environ.update(told["fork"])
    if "TEST_NETWORK" in os.environ:
        join(os.environ["TEST_NETWORK"])
    sys.modules["training"].WORLD_SIZE = int(os.environ["WORLD_SIZE"])  # type: ignore[attr-defined]
    importlib.import_module(told["run"]).main(told["argument"])
    sys.exit()


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # on which DeepSpeed writes while it is imported
    for name in IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a tenth of a training's time went into looking through what is imported
    codes: dict[int, int] = {}
    for line in sys.stdin:
        told = json.loads(line)
        answer: Any
        if "fork" in told:
            answer = fork(told)
        else:
            for pid in told["poll"]:
                if pid not in codes:
                    ended, status = os.waitpid(pid, os.WNOHANG)
                    if ended:
                        codes[pid] = os.waitstatus_to_exitcode(status)
            answer = [codes.get(pid) for pid in told["poll"]]
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
