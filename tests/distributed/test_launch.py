"""The scripts in launch/, run for real on this machine; for Slurm with a stand-in for srun."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from launched import LAUNCH, check_ranks, prepare
from ranks import PATIENCE, free_port

ROOT = LAUNCH.parent
SCRIPTS = sorted(LAUNCH.glob("*.sh"))

# Starts the tasks of one node with what Slurm tells each of them; srun's own options are left out.
SRUN = """#!/usr/bin/env bash
set -euo pipefail
while [[ $1 == --* ]]; do shift; done
for ((task = 0; task < SLURM_NTASKS; task++)); do
  SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NODEID=0 "$@" &
  started+=($!)
done
for task in "${started[@]}"; do wait "$task"; done
"""


def by_torchrun(folder: Path) -> dict[str, str]:
    return {}


def by_deepspeed(folder: Path) -> dict[str, str]:
    hostfile = folder / "hostfile"
    hostfile.write_text("# one machine\nlocalhost slots=2\n")
    return {"HOSTFILE": str(hostfile), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1"}


def by_slurm(folder: Path) -> dict[str, str]:
    programs = folder / "venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "srun").write_text(SRUN)
    (programs / "srun").chmod(0o755)
    (programs / "activate").write_text(f"PATH={programs}:$PATH\n")
    return {
        "VENV": str(programs.parent),
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NAME": "thanos",
        "SLURM_NODELIST": "localhost",
        "SLURM_NNODES": "1",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
    }


@pytest.mark.rest
@pytest.mark.parametrize(
    ("script", "prepare_launcher", "environment"),
    [
        ("torchrun.sh", by_torchrun, "TorchElasticEnvironment"),
        ("deepspeed.sh", by_deepspeed, "LightningEnvironment"),
        ("slurm.sh", by_slurm, "SLURMEnvironment"),
    ],
)
def test_a_launcher_starts_each_rank_once(
    tmp_path: Path, script: str, prepare_launcher: Callable[[Path], dict[str, str]], environment: str
) -> None:
    arguments, env = prepare(tmp_path)
    env |= {"MASTER_PORT": str(free_port())} | prepare_launcher(tmp_path)
    ended = subprocess.run(
        [str(LAUNCH / script), *arguments], env=env, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE
    )
    assert ended.returncode == 0, (ended.stdout + ended.stderr)[-5000:]
    check_ranks(tmp_path, [(0, 0, 0), (1, 1, 0)], environment)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_script_is_sound_bash(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert os.access(script, os.X_OK)
    assert "\nset -euo pipefail\n" in script.read_text()


@pytest.mark.parametrize("script", ["torchrun.sh", "deepspeed.sh", "slurm.sh"])
def test_a_script_asks_for_the_recipe(script: str) -> None:
    ended = subprocess.run([str(LAUNCH / script)], capture_output=True, text=True)
    assert ended.returncode != 0
    assert f"launch/{script} RECIPE.yaml" in ended.stderr


def test_the_hostfile_is_deepspeeds() -> None:
    from deepspeed.launcher.runner import fetch_hostfile

    assert fetch_hostfile(str(LAUNCH / "hostfile")) == {f"node-{node}": 8 for node in range(4)}


RECIPES = sorted((ROOT / "recipes").glob("*-zero3*.yaml"))


@pytest.mark.parametrize(
    "file", [*SCRIPTS, *RECIPES, ROOT / "docs" / "scaling" / "multinode.md"], ids=lambda file: file.name
)
def test_files_that_are_named_are_there(file: Path) -> None:
    text = file.read_text()
    named = [ROOT / name for name in re.findall(r"(?:recipes|launch|docs|tests)/[\w./-]*\w", text)]
    named += [file.parent / link for link in re.findall(r"\]\(([\w./-]+)\)", text)]
    assert named or file in RECIPES  # which may name none
    assert [path for path in named if not path.exists()] == []
