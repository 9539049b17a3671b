"""The examples in the docstrings and in the README run."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest
from toy import ToyLM, loader

import thanos_lightning
import thanos_lightning.solver

ROOT = Path(__file__).parents[2]
MODULES = sorted(
    module.name for module in pkgutil.walk_packages(thanos_lightning.__path__, prefix=f"{thanos_lightning.__name__}.")
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_a_module(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_the_public_names_have_examples() -> None:
    found = {
        test.name.rsplit(".", 1)[-1]
        for name in MODULES
        for test in doctest.DocTestFinder().find(importlib.import_module(name))
        if test.examples
    }
    public = {*thanos_lightning.__all__, *thanos_lightning.solver.__all__}
    errors_and_unions = {name for name in public if name.endswith("Error")} | {"Pattern", "PrunedLayer"}
    assert public - errors_and_unions <= found


def code_of(page: str) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    return str(code)


def test_the_readme_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    training = code_of("README.md")
    module: Any = ToyLM()
    module.train_dataloader, module.val_dataloader = lambda: loader(64), lambda: loader(8)
    assert "max_steps=2000" in training
    own = {"my_module": module, "my_batches": list(loader(64))}
    exec(training.replace("max_steps=2000", "max_steps=20").replace(", my_data", ""), own)
    zeros = [(p == 0).float().mean().item() for n, p in module.named_parameters() if "proj" in n]
    assert min(zeros) >= 0.5


@pytest.mark.parametrize(("page", "name"), [("docs/guide/teacher.md", "loss"), ("docs/guide/modules.md", "pruned")])
def test_the_code_of_a_page_runs(page: str, name: str) -> None:
    found: dict[str, Any] = {}
    exec(code_of(page), found)
    assert found[name] is not None
