"""Every recipe is parsed by LightningCLI against the code that it drives, and built; its schedule fits its training."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from lightning.pytorch.cli import LightningCLI

from thanos_lightning import ThanosPruningCallback
from thanos_lightning.lm import CausalLM, TextData

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


def test_the_promised_recipes_are_there() -> None:
    names = {recipe.name for recipe in RECIPES}
    assert names >= {"quickstart.yaml", "llama-3.1-8b-2of4.yaml", "llama-3.1-8b-unstructured50.yaml"}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_builds(recipe: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    # the machine that runs this test may have no GPU; everything else is the recipe's
    here = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.num_nodes=1"]
    cli = LightningCLI(args=["--config", str(recipe), *here], run=False, save_config_callback=None)
    assert isinstance(cli.model, CausalLM)
    assert isinstance(cli.datamodule, TextData)
    (pruning,) = [callback for callback in cli.trainer.callbacks if isinstance(callback, ThanosPruningCallback)]
    total = cli.trainer.max_steps
    assert total > 0
    events = pruning.schedule.resolve(total).events()
    assert len(events) > 1, "not gradual"
    assert events[0].step >= pruning.calibration_steps
    assert events[-1].step <= 0.75 * total, "no time to recover"
    assert events[-1].sparsity(pruning.pattern.sparsity) == pruning.pattern.sparsity
    assert math.isclose(pruning.pattern.sparsity, 0.5)
