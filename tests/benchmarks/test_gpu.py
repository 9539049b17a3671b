"""benchmarks/gpu.sh at its smallest sizes, on the CPU: that all of it runs, and goes on where it ended."""

import json
import os
import subprocess
import sys
from pathlib import Path

import machine
import pytest
from toy import tiny_files

SCRIPT = Path(machine.__file__).with_name("gpu.sh")
STEPS = ("tests", "solver", "enforcement", "compiled", "adapters", "runtimes", "one_shot", "recovery")


def run(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {**os.environ, "PATH": path, "DEVICE": "cpu", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([str(SCRIPT), str(folder / "results")], env=env, cwd=folder, capture_output=True, text=True)


@pytest.mark.rest
def test_all_of_it_runs_once(tmp_path: Path) -> None:
    tiny, text = tiny_files(tmp_path)
    ended = run(tmp_path, MODEL=tiny, TEXT=str(text))
    assert ended.returncode == 0, (ended.stdout + ended.stderr)[-5000:]
    (results,) = (tmp_path / "results").iterdir()
    assert {file.stem for file in results.glob("*.done")} == set(STEPS)
    assert " passed" in (results / "tests.log").read_text()
    assert "failed" not in (results / "tests.log").read_text()
    kept = [json.loads(file.read_text()) for file in results.glob("*.json")]
    assert len(kept) == len(STEPS) - 1
    assert all(document.get("results", document.get("seconds")) for document in kept)
    (results / "one_shot.done").unlink()
    again = run(tmp_path, MODEL=str(tmp_path / "nowhere"), TEXT=str(text))
    assert again.returncode == 1
    assert "failed: one_shot; " in again.stdout
    assert again.stdout.count("finished before") == len(STEPS) - 1


@pytest.mark.rest
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    ended = run(tmp_path, DEVICE="cuda", CUDA_VISIBLE_DEVICES="")
    assert ended.returncode != 0
    assert "benchmarks/gpu.sh: no GPU is found by torch" in ended.stderr
