"""A rank dies: the others end with an error, and the last checkpoint resumes as if nothing had happened.

The points at which ranks are killed are drawn from a seed, which THANOS_SEED sets.
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest
from ranks import Trainings, results, start

STRATEGIES: dict[str, dict[str, Any]] = {
    "zero3 in bf16": {"strategy": "zero3", "precision": "bf16-mixed"},
    "zero3": {"strategy": "zero3"},
    "zero2": {"strategy": "zero2"},
    "fsdp": {"strategy": "fsdp", "configure_model": True},
    "ddp": {"strategy": "ddp"},
}
REST = pytest.mark.rest
PROMPT = 150  # seconds in which all processes have to end
SEED = int(os.environ.get("THANOS_SEED", "0"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Trainings:
    """The trainings that are never killed."""
    return Trainings(tmp_path_factory.mktemp("whole"), STRATEGIES)


def resume(whole: Trainings, names: list[str], checkpoints: list[Path]) -> None:
    """Go on in new processes, and end as the training that was never killed."""
    root = checkpoints[0].parents[1]
    cases = [
        {"out": str(root / f"{name} resumed"), "resume": str(checkpoint), **STRATEGIES[name]}
        for name, checkpoint in zip(names, checkpoints, strict=True)
    ]
    ended = start(root, cases)
    assert ended.codes == [0, 0], "\n".join(text[-3000:] for text in ended.outputs)
    for name in names:
        for before, after in zip(results(whole(name)), results(root / f"{name} resumed"), strict=True):
            assert after["error"] is None
            assert after["violations"] == []
            assert after["digest"] == before["digest"]
            assert after["losses"] == before["losses"][-len(after["losses"]) :]


@pytest.mark.parametrize(
    "names", [["zero3 in bf16", "ddp"], pytest.param(["zero3", "zero2", "fsdp"], marks=REST)], ids=str
)
def test_killed_at_random_points(whole: Trainings, tmp_path: Path, names: list[str]) -> None:
    chance = random.Random(f"{SEED} {names}")
    where = ["start", "forward", "backward", "end"]
    points = [(chance.randint(2, 12), chance.choice(where), chance.randint(0, 1)) for _ in names]
    print(f"THANOS_SEED={SEED}: killed at {points}")  # noqa: T201
    for name, point in zip(names, points, strict=True):
        out = tmp_path / name
        case = {"out": str(out), "save": True, "kill_at": point, **STRATEGIES[name]}
        ended = start(out, [case], timeout=PROMPT)
        assert ended.codes[point[2]] == -9
        assert ended.codes[1 - point[2]] not in (0, -9)  # by itself, with an error
    resume(
        whole,
        names,
        [tmp_path / name / f"step={batch - 1}.ckpt" for name, (batch, _, _) in zip(names, points, strict=True)],
    )


@pytest.mark.rest
@pytest.mark.parametrize("name", ["zero3 in bf16", "ddp"])
def test_killed_inside_an_event(whole: Trainings, tmp_path: Path, name: str) -> None:
    out = tmp_path / name
    ended = start(out, [{"out": str(out), "save": True, "fault": "killed_inside", **STRATEGIES[name]}], timeout=PROMPT)
    assert ended.codes[1] == -9
    assert ended.codes[0] not in (0, -9)
    assert "onnection" in ended.outputs[0]  # reset, or closed, by the peer
    resume(whole, [name], [out / "step=2.ckpt"])
