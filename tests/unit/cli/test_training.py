import sys

import pytest
import yaml
from lightning.pytorch import Callback

from thanos_lightning import Allocation, ThanosPruningCallback
from thanos_lightning.cli import main
from thanos_lightning.cli.mistakes import Mistake
from thanos_lightning.cli.training import CLI
from thanos_lightning.solver import NM


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["thanos-lightning"])


def printed(capsys, *arguments):
    with pytest.raises(SystemExit) as exit_:
        main(["fit", *arguments, "--print_config"])
    assert exit_.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("arguments", [["--config", "quickstart"], ["-c=quickstart"]])
def test_a_recipe_by_its_name(capsys, arguments):
    assert printed(capsys, *arguments)["data"]["init_args"]["dataset"] == "python-reference"


def test_a_file_of_a_recipes_name(capsys, tmp_path):
    (tmp_path / "quickstart").write_text("trainer: {max_steps: 7}\nmodel: CausalLM\n")
    assert printed(capsys, "--config", "quickstart", "--model.model=a")["trainer"]["max_steps"] == 7


def test_precision_is_resolved_and_said(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("thanos_lightning.cli.training.fast_precision", lambda device: ("64-true", f"it is {device}"))
    with caplog.at_level("INFO"):
        cli = CLI(["--config", "quickstart"], run=False)
    assert cli.trainer.precision == "64-true"
    assert cli.config.trainer.precision == "64-true"  # what is saved
    assert [line for line in caplog.messages if "precision" in line] == ["precision: 64-true, since it is cpu"]


def test_a_precision_that_is_given(monkeypatch):
    cli = CLI(["--config", "quickstart", "--trainer.precision", "bf16-mixed"], run=False)
    assert cli.trainer.precision == "bf16-mixed"


class Solves(Callback):
    """A callback of one's own, whose options have names of ours."""

    def __init__(self, solver: int, schedule: float = 1.0):
        self.solver = solver


def test_options_of_another_callback_are_its_own():
    mine = [f"--trainer.callbacks+={__name__}.Solves", "--trainer.callbacks.solver=3"]
    cli = CLI(["--config", "quickstart", *mine], run=False)
    assert [one.solver for one in cli.trainer.callbacks if isinstance(one, Solves)] == [3]
    with pytest.raises(Mistake, match="schedule of Solves is 'soon': give a number"):
        CLI(["--config", "quickstart", *mine, "--trainer.callbacks.schedule=soon"], run=False)


def test_an_option_of_a_group_that_is_not_given():
    callback = "--trainer.callbacks.0"
    others = [f"{callback}.pattern=unstructured", f"{callback}.sparsity=0.5"]
    for asked in ("uniform", "loss"):
        cli = CLI(["--config", "quickstart", *others, f"{callback}.allocation.by={asked}"], run=False)
        (pruning,) = (one for one in cli.trainer.callbacks if isinstance(one, ThanosPruningCallback))
        assert pruning.options.allocation == Allocation(asked)


@pytest.mark.parametrize("argument", ["--trainer.callbacks.0.pattern", "--trainer.callbacks.0.init_args.pattern"])
def test_an_argument_of_one_callback(argument):
    cli = CLI(["--config", "quickstart", argument, "1:4", "--trainer.callbacks.0.schedule.at=[0, 8]"], run=False)
    (pruning,) = (one for one in cli.trainer.callbacks if isinstance(one, ThanosPruningCallback))
    saving = cli.trainer.checkpoint_callback
    assert (pruning.options.pattern, pruning.options.schedule.at, pruning.options.monitor) == (
        NM(1, 4),
        (0, 8),
        "val/perplexity",
    )
    assert saving.filename == "quickstart"
