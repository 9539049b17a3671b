"""Two real ranks over gloo, started as a script."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from thanos_lightning.masks import LayerMask

SCRIPT = Path(__file__).with_name("ddp_training.py")
PRUNABLE = [
    f"model.layers.{layer}.{name}_proj.weight"
    for layer in range(2)
    for name in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
]


def train(out: Path, *arguments: str, ranks: int = 2) -> list[dict[str, Any]]:
    """Run the script; what each rank saw."""
    out.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(out), "--ranks", str(ranks), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(ranks)]


def masks(out: Path, rank: int = 0) -> dict[str, torch.Tensor]:
    saved = torch.load(out / f"masks{rank}.pt", weights_only=True)
    return {name: LayerMask.from_state(state).keep for name, state in saved.items()}


@pytest.mark.parametrize(
    ("arguments", "events"),
    [
        (["--optimizer", "adamw", "--precision", "bf16-mixed"], [3, 6, 7]),
        (["--optimizer", "sgd", "--precision", "bf16-true"], [3, 6, 7]),
        (["--optimizer", "adamw", "--pattern", "unstructured", "--accumulate", "3", "--batch-size", "2"], [3]),
    ],
)
def test_zeros_hold_on_both_ranks(tmp_path: Path, arguments: list[str], events: list[int]) -> None:
    first, second = train(tmp_path, *arguments)
    for rank in (first, second):
        assert rank["error"] is None
        assert rank["violations"] == 0
        assert rank["checked"] >= 14 * 2 * 3
        assert rank["events"] == events
        assert min(rank["sparsity"][name] for name in PRUNABLE) > 0.4
    assert first["weights"] == second["weights"]
    for name, keep in masks(tmp_path, 0).items():
        assert torch.equal(keep, masks(tmp_path, 1)[name])


def test_two_ranks_prune_as_one_does(tmp_path: Path) -> None:
    """Two ranks with four sequences a batch see at each step what one rank with eight sees."""
    (two, _) = train(tmp_path / "two", "--batch-size", "4")
    (one,) = train(tmp_path / "one", "--batch-size", "8", ranks=1)
    assert one["error"] is two["error"] is None
    expected, found = masks(tmp_path / "one"), masks(tmp_path / "two")
    total = sum(keep.numel() for keep in expected.values())
    same = sum(int((keep == found[name]).sum()) for name, keep in expected.items())
    assert same / total >= 0.999


def test_resume_inside_a_window_is_bit_identical(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", "--save")
    for stop in (2, 5):  # windows are 1-3, 4-6, 6-7
        resumed = train(tmp_path / f"resumed{stop}", "--resume", str(tmp_path / "whole" / f"step={stop}.ckpt"))
        for before, after in zip(whole, resumed, strict=True):
            assert after["error"] is None
            assert after["losses"] == before["losses"][stop:]
            assert after["weights"] == before["weights"]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("nan", "PruningError: layer model.model.layers.1.mlp.down_proj"),
        ("refill", "ZeroViolationError: zeros came back: rank 1"),
        ("memory", "OutOfMemoryError: tried to allocate 1 PiB (on rank 1)"),
    ],
)
def test_a_fault_on_one_rank_ends_both_with_its_name(tmp_path: Path, fault: str, words: str) -> None:
    for rank in train(tmp_path, "--fault", fault):
        assert rank["error"] is not None
        assert words in rank["error"]
        if fault != "refill":
            assert rank["events"] == []
            assert max(rank["sparsity"].values()) == 0.0
