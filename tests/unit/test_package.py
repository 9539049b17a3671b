import subprocess
import sys
import tomllib
from importlib.resources import files
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import thanos_lightning

ROOT = Path(__file__).parents[2]


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_public_names() -> None:
    classes = "Allocation CPUDeepSpeed CalibrationOptions FeedForward SolverOptions SparsitySchedule TargetOverride"
    functions = "export_checkpoint mask_adapters verify_checkpoint"
    assert sorted(thanos_lightning.__all__) == [*classes.split(), "ThanosPruningCallback", *functions.split()]
    for name in thanos_lightning.__all__:
        assert getattr(thanos_lightning, name).__name__ == name
        assert name in dir(thanos_lightning)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        thanos_lightning.Nothing  # noqa: B018


def test_the_documents_tell_the_lowest_versions() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [Requirement(one) for one in [f"Python{project['requires-python']}", *project["dependencies"]]]
    floors = {one.name: part.version for one in needed for part in one.specifier if part.operator == ">="}
    told = (
        "Python {Python}, torch {torch}, Lightning {lightning}, transformers {transformers} and DeepSpeed {deepspeed}"
    )
    assert told.format(**floors) in (ROOT / "docs/faq.md").read_text()


def test_it_is_typed() -> None:
    assert files(thanos_lightning).joinpath("py.typed").is_file()


def test_it_works_without_deepspeed_and_leaves_global_switches_alone() -> None:
    code = """
import sys, torch
sys.modules["deepspeed"] = None  # import deepspeed raises
before = (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, torch.get_num_threads())
import thanos_lightning, thanos_lightning.cli, thanos_lightning.checkpoints.export, thanos_lightning.lm
thanos_lightning.ThanosPruningCallback("2:4")
print("deepspeed" in sys.modules and sys.modules["deepspeed"] is None)
print(before == (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, torch.get_num_threads()))
"""
    assert run(code).split()[-2:] == ["True", "True"]


def test_the_solver_loads_no_trainer() -> None:
    code = """
import sys
import thanos_lightning.solver
print([name for name in ("lightning", "transformers", "datasets", "rich") if name in sys.modules])
"""
    assert run(code).strip() == "[]"
