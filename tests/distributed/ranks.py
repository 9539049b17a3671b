"""Starts the ranks of a training as processes of their own, and reads what they saw."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from thanos_lightning.masks import LayerMask

SCRIPT = Path(__file__).with_name("training.py")
# in seconds: DeepSpeed compiles for four minutes at its first use, and a slow machine takes three times as long
PATIENCE = 1200
PRUNABLE = [
    f"model.layers.{layer}.{name}_proj.weight"
    for layer in range(2)
    for name in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
]


@dataclass(frozen=True)
class Ended:
    """How the processes ended."""

    codes: list[int]
    outputs: list[str]
    seconds: float


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
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
        **more,
    }


def start(
    out: Path,
    cases: Sequence[dict[str, Any]],
    ranks: int = 2,
    timeout: float = PATIENCE,
    script: Path = SCRIPT,
    **variables: str,
) -> Ended:
    """Train the cases one after the other on so many ranks, and wait for all of them to end.

    `variables` are of the environment, beside those of `environment`. Ranks that have not ended after `timeout` seconds
    are killed, and the test fails with what they said last.
    """
    out.mkdir(parents=True, exist_ok=True)
    file = out / "cases.json"
    file.write_text(json.dumps(cases))
    port = free_port()
    logs = [(out / f"log{rank}.txt").open("w+") for rank in range(ranks)]
    begin = time.monotonic()
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(file)],
            env=environment(rank, ranks, port, **variables),
            stdout=logs[rank],
            stderr=subprocess.STDOUT,
        )
        for rank in range(ranks)
    ]
    late = False
    try:
        codes = [process.wait(max(1, timeout - (time.monotonic() - begin))) for process in processes]
    except subprocess.TimeoutExpired:
        late = True
    finally:
        for process in processes:
            process.kill()
    outputs = []
    for log in logs:
        log.seek(0)
        outputs.append(log.read())
        log.close()
    assert not late, "\n".join([f"not ended after {timeout:.0f} s", *(text[-3000:] for text in outputs)])
    return Ended(codes, outputs, time.monotonic() - begin)


def train(out: Path, ranks: int = 2, **case: Any) -> list[dict[str, Any]]:
    """Train one case; what each rank saw."""
    ended = start(out, [{"out": str(out), **case}], ranks)
    assert ended.codes == [0] * ranks, "\n".join(text[-3000:] for text in ended.outputs)
    return results(out, ranks)


def results(out: Path, ranks: int = 2) -> list[dict[str, Any]]:
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(ranks)]


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
