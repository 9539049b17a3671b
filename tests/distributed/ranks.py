"""Lets real ranks train, and reads what they saw.

Starting a process costs ten seconds of imports. So ranks are forked off one process (nursery.py), once for each number
of them, and take the trainings of all tests, one after the other. Tests that need ranks of their own `start` them.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from require import only as only

from thanos_lightning.ranks.masks import LayerMask

FOLDER: Path | None = None  # of what all tests share; conftest.py makes it
NURSERY = Path(__file__).with_name("nursery.py")
# in seconds: DeepSpeed compiles for four minutes at its first use, and a slow machine takes three times as long. A rank
# that waits for another that is gone gives up after 1,800
PATIENCE = 1200
PRUNABLE = [
    f"model.layers.{layer}.{name}_proj.weight"
    for layer in range(2)
    for name in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
]

# Cases that several tests train, in part
OFFLOADED: dict[str, Any] = {"deepspeed": {"offload_optimizer": True, "offload_parameters": True}}
FP32_SUMS: dict[str, Any] = {
    "strategy": "zero1",
    "precision": "bf16-mixed",
    "config": {"data_types": {"grad_accum_dtype": "fp32"}},
}


@dataclass(frozen=True)
class Ended:
    """How the processes ended."""

    codes: list[int]
    outputs: list[str]


def free_port() -> int:
    """A port below those that systems hand out, or a connection could take it before the ranks listen."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_768)
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


def environment(rank: int, ranks: int, port: int, **more: str) -> dict[str, str]:
    return {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "NODE_RANK": "0",
        "WORLD_SIZE": str(ranks),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        # where memory is aligned otherwise, MKL rounds otherwise on some CPUs: runs that are equal would not seem so
        "MKL_CBWR": "AVX2,STRICT",
        **more,
    }


class Nursery:
    """The process off which ranks are forked: nursery.py."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(NURSERY)],
            env=environment(0, 1, 0),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, **told: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(told) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


_nursery = functools.cache(Nursery)


class Processes:
    """Ranks that have been forked.

    Args:
        run: The module whose `main` they run.
        logs: Their standard output and errors, by rank.
        arguments: What each is given, by rank.
        environments: By rank; None for those of ranks on one host.
    """

    def __init__(
        self,
        run: str,
        logs: Sequence[Path],
        arguments: Sequence[str],
        environments: Sequence[dict[str, str]] | None = None,
    ) -> None:
        port, number = free_port(), len(logs)
        if environments is None:
            environments = [environment(rank, number, port) for rank in range(number)]
        self.pids: list[int] = [
            _nursery().ask(fork=own, run=run, argument=argument, log=str(log))
            for own, argument, log in zip(environments, arguments, logs, strict=True)
        ]

    def codes(self) -> list[int | None]:
        codes: list[int | None] = _nursery().ask(poll=self.pids)
        return codes

    def kill(self) -> None:
        for pid, code in zip(self.pids, self.codes(), strict=True):
            if code is None:
                os.kill(pid, signal.SIGKILL)
        while None in self.codes():
            time.sleep(0.01)


def start(
    out: Path,
    cases: Sequence[dict[str, Any]],
    ranks: int = 2,
    run: str = "training",
    environments: Sequence[dict[str, str]] | None = None,
) -> Ended:
    """Train the cases one after the other on ranks of their own (or run another module), and wait for all to end.

    Ranks that have not ended after PATIENCE are killed, and the test fails with what they said last.
    """
    out.mkdir(parents=True, exist_ok=True)
    file, logs = out / "cases.jsonl", [out / f"log{rank}.txt" for rank in range(ranks)]
    file.write_text("".join(json.dumps(case) + "\n" for case in cases))
    end = time.monotonic() + PATIENCE
    processes = Processes(run, logs, [str(file)] * ranks, environments)
    while None in (codes := processes.codes()) and time.monotonic() < end:
        time.sleep(0.05)
    processes.kill()
    outputs = [log.read_text(errors="replace") for log in logs]
    assert None not in codes, "\n".join([f"not ended after {PATIENCE} s", *(text[-3000:] for text in outputs)])
    return Ended([code for code in codes if code is not None], outputs)


def train_alone(
    out: Path, ranks: int = 2, environments: Sequence[dict[str, str]] | None = None, **case: Any
) -> list[dict[str, Any]]:
    """Train one case on ranks of its own; what each rank saw."""
    ended = start(out, [{"out": str(out), **case}], ranks, environments=environments)
    assert ended.codes == [0] * ranks, "\n".join(text[-3000:] for text in ended.outputs)
    return results(out, ranks)


class Pool:
    """So many ranks that wait for trainings."""

    def __init__(self, ranks: int) -> None:
        self.folder = Path(tempfile.mkdtemp(dir=FOLDER))
        self.logs = [self.folder / f"log{rank}.txt" for rank in range(ranks)]
        pipes = [self.folder / f"tasks{rank}" for rank in range(ranks)]
        for pipe in pipes:
            os.mkfifo(pipe)
        self.processes = Processes("training", self.logs, [str(pipe) for pipe in pipes])
        self.pipes = [pipe.open("w") for pipe in pipes]

    def train(self, case: dict[str, Any]) -> None:
        """Train, on all ranks; where one fails the pool ends, and the test with what its ranks said last."""
        begin = [log.stat().st_size for log in self.logs]
        done = [Path(case["out"]) / f"done{rank}" for rank in range(len(self.logs))]
        for pipe, file in zip(self.pipes, done, strict=True):
            file.unlink(missing_ok=True)
            pipe.write(json.dumps(case) + "\n")
            pipe.flush()
        end = time.monotonic() + PATIENCE
        while not all(file.exists() for file in done):
            codes = self.processes.codes()
            if codes != [None] * len(codes) or time.monotonic() > end:
                self.end()
                said = [log.read_bytes()[start:] for log, start in zip(self.logs, begin, strict=True)]
                tails = [text[-3000:].decode(errors="replace") for text in said]
                raise AssertionError("\n".join([f"ended by {codes}: {case}", *tails]))
            time.sleep(0.02)

    def end(self) -> None:
        del _pools[len(self.logs)]
        self.processes.kill()
        for pipe in self.pipes:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


_pools: dict[int, Pool] = {}


def end_pools() -> None:
    for pool in list(_pools.values()):
        pool.end()
    if _nursery.cache_info().currsize:
        _nursery().end()
        _nursery.cache_clear()


def train(out: Path, ranks: int = 2, **case: Any) -> list[dict[str, Any]]:
    """Train one case, on ranks that other tests use, too; what each rank saw."""
    if ranks not in _pools:
        _pools[ranks] = Pool(ranks)
    _pools[ranks].train({"out": str(out), **case})
    return results(out, ranks)


_trained: dict[str, Path] = {}


def trained(ranks: int = 2, **case: Any) -> Path:
    """The folder of a training, which is done when it is asked for first, and once for all tests that ask for it."""
    key = json.dumps([ranks, case], sort_keys=True)
    if key not in _trained:
        out = Path(tempfile.mkdtemp(dir=FOLDER))
        train(out, ranks, **case)
        _trained[key] = out
    return _trained[key]


def results(out: Path, ranks: int = 2) -> list[dict[str, Any]]:
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(ranks)]


def check_zeros(ranks: Sequence[dict[str, Any]], **expected: Any) -> None:
    """A training without an error, in which each rank found no pruned entry that is not 0, and these values."""
    for rank in ranks:
        assert rank["error"] is None
        assert rank["violations"] == []
        assert {name: rank[name] for name in expected} == expected


def check_everywhere(out: Path, case: dict[str, Any], ranks: int = 2) -> list[dict[str, Any]]:
    """Zeros hold on all ranks in all that a strategy keeps of a pruned weight, in each step; what each rank saw."""
    seen = results(out, ranks)
    strategy, precision = case.get("strategy", "ddp"), case.get("precision", "32-true")
    layers = 1 if "targets" in case else 8 if case.get("model") == "gpt2" else 14
    places = {"weight", "momentum_buffer"} if case.get("optimizer") == "sgd" else {"weight", "exp_avg", "exp_avg_sq"}
    if strategy.startswith("zero") and (strategy, precision) != ("zero0", "32-true"):
        places |= {"master"}
    check_zeros(seen, collectives=[], events=[3, 6, 7], digest=seen[0]["digest"])
    for rank in seen:
        if precision == "16-mixed":  # steps that are skipped do not count
            assert 12 <= rank["steps"] < len(rank["losses"])
        else:
            assert rank["steps"] == case.get("max_steps", 10)
        assert rank["checked"].keys() == places
        assert rank["checked"]["weight"] >= layers * (rank["steps"] - 7)
        assert min(rank["checked"].values()) >= (layers - len(case.get("frozen", []))) * (rank["steps"] - 7)
        assert rank["enforced"] > 0
        assert rank["control"] > 0
    kept = check_equal_masks(out, ranks)
    assert len(kept) == layers
    check_sparsity(kept, case)
    return seen


def check_resumed(whole: Path, resumed: Path, stop: int) -> None:
    """A resumed training is the one that was never stopped, to the last bit."""
    for before, after in zip(results(whole), results(resumed), strict=True):
        check_zeros([after], losses=before["losses"][stop:], digest=before["digest"])


def check_resuming(*stops: int, **case: Any) -> None:
    """The training of a case that saves after these steps ends with the same bits where it is resumed after them."""
    whole = trained(**case)
    for stop in stops:
        check_resumed(whole, trained(**{**case, "save": False, "resume": str(whole / f"step={stop}.ckpt")}), stop)


def check_equal_masks(out: Path, ranks: int = 2) -> dict[str, torch.Tensor]:
    """The masks, which are the same on all ranks."""
    first = masks(out)
    for rank in range(1, ranks):
        other = masks(out, rank)
        assert other.keys() == first.keys()
        assert all(torch.equal(other[name], keep) for name, keep in first.items())
    return first


def check_clipped(ranks: Sequence[dict[str, Any]], tolerance: float, least: int = 0) -> None:
    """The norm that gradients were clipped by is that of the sparse model, at least so often."""
    for rank in ranks:
        assert len(rank["norms"]) >= least
        for sparse, clipped_by in rank["norms"]:
            assert clipped_by == pytest.approx(sparse, rel=tolerance)


def check_sparsity(kept: dict[str, torch.Tensor], case: dict[str, Any]) -> None:
    """Each layer is as sparse as the case asks for; unstructured ones are together, each with a share of its own."""
    sparsities = {1 - float(keep.float().mean()) for keep in kept.values()}
    if case.get("pattern") != "unstructured":
        assert sparsities == {0.5}
        return
    budget = sum(int(case["sparsity"] * keep.numel()) for keep in kept.values())
    assert sum(int((~keep).sum()) for keep in kept.values()) == budget
    if "unlabelled" in case or "leaf_module" in case.get("zero", {}):  # there were no gradients
        assert max(sparsities) - min(sparsities) < 0.01  # whole weights of layers of any size
    else:
        assert 0.1 < max(sparsities) - min(sparsities) < 0.31


def masks(out: Path, rank: int = 0) -> dict[str, torch.Tensor]:
    saved = torch.load(out / f"state{rank}.pt", weights_only=True)["masks"]
    return {name: LayerMask.from_state(state).keep for name, state in saved.items()}


def agreement(one: Path, other: Path) -> float:
    """The fraction of the entries of all masks that are the same."""
    expected, found = masks(one), masks(other)
    assert expected.keys() == found.keys()
    total = sum(keep.numel() for keep in expected.values())
    return sum(int((keep == found[name]).sum()) for name, keep in expected.items()) / total
