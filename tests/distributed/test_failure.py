"""A rank dies: the others end with an error, and the last checkpoint resumes as if nothing had happened."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from ranks import results, start

STRATEGIES: list[dict[str, Any]] = [
    {"strategy": "zero3", "precision": "bf16-mixed"},
    {"strategy": "zero3"},
    {"strategy": "zero2"},
    {"strategy": "fsdp", "configure_model": True},
    {"strategy": "ddp"},
]
NAMES = [f"{number} {case['strategy']}" for number, case in enumerate(STRATEGIES)]
PROMPT = 150  # seconds in which all processes have to end


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trainings that are never killed."""
    root = tmp_path_factory.mktemp("whole")
    cases = [{"out": str(root / name), **case} for name, case in zip(NAMES, STRATEGIES, strict=True)]
    ended = start(root, cases)
    assert ended.codes == [0, 0], "\n".join(text[-3000:] for text in ended.outputs)
    return root


def test_killed_at_random_points(whole: Path, tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(10**6)
    chance = random.Random(seed)
    where = ["start", "forward", "backward", "end"]
    points = [(chance.randint(2, 12), chance.choice(where), chance.randint(0, 1)) for _ in NAMES]
    told = f"seed {seed}, killed at {points}"
    for name, case, point in zip(NAMES, STRATEGIES, points, strict=True):
        out = tmp_path / name
        ended = start(out, [{"out": str(out), "save": True, "kill_at": point, **case}], timeout=PROMPT)
        assert ended.codes[point[2]] == -9, told
        assert ended.codes[1 - point[2]] not in (0, -9), told  # by itself, with an error
    cases = [
        {"out": str(tmp_path / name / "resumed"), "resume": str(tmp_path / name / f"step={batch - 1}.ckpt"), **case}
        for name, case, (batch, _, _) in zip(NAMES, STRATEGIES, points, strict=True)
    ]
    ended = start(tmp_path, cases)
    assert ended.codes == [0, 0], told + "\n".join(text[-3000:] for text in ended.outputs)
    for name in NAMES:
        for before, after in zip(results(whole / name), results(tmp_path / name / "resumed"), strict=True):
            assert after["error"] is None, told
            assert after["violations"] == [], told
            assert after["digest"] == before["digest"], told
            assert after["losses"] == before["losses"][-len(after["losses"]) :], told


@pytest.mark.parametrize("case", STRATEGIES[:1] + STRATEGIES[-1:], ids=["zero3", "ddp"])
def test_killed_inside_an_event(whole: Path, tmp_path: Path, case: dict[str, Any]) -> None:
    ended = start(tmp_path, [{"out": str(tmp_path), "save": True, "fault": "killed_inside", **case}], timeout=PROMPT)
    assert ended.codes[1] == -9
    assert ended.codes[0] not in (0, -9)
    assert "onnection" in ended.outputs[0]  # reset, or closed, by the peer
    resumed = tmp_path / "resumed"
    again = start(resumed, [{"out": str(resumed), "resume": str(tmp_path / "step=2.ckpt"), **case}])
    assert again.codes == [0, 0], "\n".join(text[-3000:] for text in again.outputs)
    name = NAMES[STRATEGIES.index(case)]
    assert [rank["digest"] for rank in results(resumed)] == [rank["digest"] for rank in results(whole / name)]
