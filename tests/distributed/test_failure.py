"""A rank dies: the others end with an error, and the last checkpoint resumes as if nothing had happened.

The points at which ranks are killed are drawn from a seed, which THANOS_SEED sets.
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest
from ranks import check_resumed, environment, free_port, only, start, train, trained

STRATEGIES: dict[str, dict[str, Any]] = {
    "zero3 in bf16": {"strategy": "zero3", "precision": "bf16-mixed"},
    "zero3": {"strategy": "zero3"},
    "zero2": {"strategy": "zero2"},
    "fsdp": {"strategy": "fsdp", "configure_model": True},
    "ddp": {"strategy": "ddp"},
}
SEED = int(os.environ.get("THANOS_SEED", "0"))


def killed(root: Path, name: str, *, codes: tuple[int, int], **how: Any) -> Path:
    """Train until a rank is killed; the folder of the training. The other rank ends by itself, with an error."""
    out = root / name
    ended = start(out, [{"out": str(out), **how, **STRATEGIES[name]}])
    for code, expected in zip(ended.codes, codes, strict=True):
        assert code == expected if expected else code not in (0, -9)
    if "fault" in how:
        assert "onnection" in ended.outputs[0]  # reset, or closed, by the peer
    return out


def killed_at_random(root: Path, names: list[str]) -> list[Path]:
    """Kill each at a point of its own; the checkpoints of the step before."""
    chance = random.Random(f"{SEED} {names}")
    # the last one is after the optimizer's step, before an event and the checkpoint
    where = ["on_train_batch_start", "on_before_backward", "on_after_backward", "on_train_batch_end"]
    points = [(chance.randint(2, 10), chance.choice(where), chance.randint(0, 1)) for _ in names]
    print(f"THANOS_SEED={SEED}: killed at {points}")  # noqa: T201
    checkpoints = []
    for name, (batch, place, rank) in zip(names, points, strict=True):
        how = {"kill_at": (batch, place, rank), "save": [batch - 1]}
        out = killed(root, name, codes=(-9, 0) if rank == 0 else (0, -9), **how)
        checkpoints.append(out / f"step={batch - 1}.ckpt")
    return checkpoints


def resume(checkpoints: list[Path]) -> None:
    """Go on in new processes, and end as the training that was never killed."""
    root = checkpoints[0].parents[1]
    names = [checkpoint.parent.name for checkpoint in checkpoints]
    cases = [
        {"out": str(root / f"{name} resumed"), "resume": str(checkpoint), **STRATEGIES[name]}
        for name, checkpoint in zip(names, checkpoints, strict=True)
    ]
    ended = start(root, cases)
    assert ended.codes == [0, 0], "\n".join(text[-3000:] for text in ended.outputs)
    for name, checkpoint in zip(names, checkpoints, strict=True):
        stop = int(checkpoint.stem.removeprefix("step="))
        check_resumed(trained(**STRATEGIES[name]), root / f"{name} resumed", stop)


@pytest.mark.parametrize("name", only(["ddp"], ["ddp", "zero3"]))
@pytest.mark.parametrize(
    "fault", only(["SIGTERM on the last"], ["SIGTERM", "SIGTERM on the first", "SIGTERM on the last"])
)
def test_sigterm_of_one_rank_ends_all_before_the_event(fault: str, name: str, tmp_path: Path) -> None:
    for rank in train(tmp_path, **STRATEGIES[name], fault=fault, schedule=(2, 2, 1), save=[2]):
        assert rank["error"].startswith("SIGTERMException")
        assert rank["steps"] == 2
        assert rank["events"] == []
    assert (tmp_path / "step=2.ckpt").exists()


def test_the_lock_of_a_killed_start_is_named(tmp_path: Path) -> None:
    lock = tmp_path / "extensions" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    own = environment(0, 1, free_port(), TORCH_EXTENSIONS_DIR=str(lock.parents[1]))
    ended = start(tmp_path, [{"out": str(tmp_path), **STRATEGIES["zero3"], "fault": "locked"}], 1, environments=[own])
    assert f"rm {lock}" in ended.outputs[0]
    assert ended.codes == [1]
    assert list(lock.parent.iterdir()) == [lock]


def test_killed_at_random_points(tmp_path: Path) -> None:
    resume(killed_at_random(tmp_path, ["zero3 in bf16", "ddp"]))


@pytest.mark.rest
def test_killed_at_more_points_and_inside_an_event(tmp_path: Path) -> None:
    inside = [
        killed(tmp_path, name, codes=(0, -9), fault="killed_inside", save=[2]) for name in ("zero3 in bf16", "ddp")
    ]
    at_random = killed_at_random(tmp_path, ["zero3", "zero2", "fsdp"])
    resume([*(out / "step=2.ckpt" for out in inside), *at_random])
