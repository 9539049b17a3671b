import re
from pathlib import Path

import pytest
import yaml
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelSummary

from thanos_lightning import Allocation, SparsitySchedule, ThanosPruningCallback
from thanos_lightning.cli import main
from thanos_lightning.cli.mistakes import Mistake
from thanos_lightning.cli.parsing import recipes
from thanos_lightning.cli.training import CLI
from thanos_lightning.solver import NM


def cli_of(*arguments, config="quickstart"):
    return CLI(["--config", config, *arguments], run=False)


def options_of(*arguments, config="quickstart"):
    """The options of the last callback that prunes."""
    callbacks = cli_of(*arguments, config=config).trainer.callbacks
    return [one for one in callbacks if isinstance(one, ThanosPruningCallback)][-1].options


def recipe_with(line):
    """The quickstart with another line in place of the pattern's."""
    text = recipes()["quickstart"].read_text(encoding="utf-8")
    Path("mine.yaml").write_text(re.sub('pattern: "2:4".*', line, text, count=1), encoding="utf-8")
    return "mine.yaml"


def printed(capsys, *arguments):
    with pytest.raises(SystemExit) as exit_:
        main(["fit", *arguments, "--print_config"])
    assert exit_.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_a_file_of_a_recipes_name(capsys, tmp_path):
    (tmp_path / "quickstart").write_text("trainer: {max_steps: 7}\nmodel: CausalLM\n")
    assert printed(capsys, "-c=quickstart", "--model.model=a")["trainer"]["max_steps"] == 7


def test_a_training_saves_its_configuration_and_can_be_tested(trained, copied, capsys):
    saved = yaml.safe_load((trained / "run" / "config.yaml").read_text())
    assert saved["trainer"]["callbacks"][0]["init_args"]["pattern"] == "2:4"
    assert main(["test", "--config", "tiny.yaml", "--ckpt_path", "a.ckpt"]) == 0
    assert "test/perplexity" in capsys.readouterr().out


@pytest.mark.usefixtures("copied")
def test_a_training_says_what_it_replaces_and_that_nothing_is_left_to_train(caplog):
    def said(*arguments):
        caplog.clear()
        with caplog.at_level("INFO"):
            assert main(["fit", "--config", "tiny.yaml", *arguments]) == 0
        return [line for line in caplog.messages if re.search("earlier training|left to train|dense", line)]

    assert said() == []
    assert said() == [
        "run/pruning_report.json is of an earlier training, and will be replaced",
        "run/checkpoints/tiny.ckpt is of an earlier training, and is replaced",
    ]
    assert said("--ckpt_path", "a.ckpt") == [
        "nothing was left to train: the training has taken all its 2 optimizer steps already; to train for longer, "
        "raise max_steps (now 2)"
    ]
    assert said("--trainer.callbacks", "null") == [
        "trains dense: no ThanosPruningCallback among the callbacks (trainer.callbacks)"
    ]


def test_a_summary_of_the_model_is_printed_where_it_is_asked_for():
    def summaries(*arguments):
        callbacks = cli_of(*arguments).trainer.callbacks
        return [one for one in callbacks if isinstance(one, ModelSummary)]

    assert not summaries()
    assert summaries("--trainer.enable_model_summary=true")
    assert summaries("--trainer.callbacks+=ModelSummary")


def test_a_precision_that_is_not_given_is_resolved_and_said(monkeypatch, caplog):
    monkeypatch.setattr("thanos_lightning.cli.training.fast_precision", lambda device: ("64-true", f"it is {device}"))
    with caplog.at_level("INFO"):
        cli = cli_of()
    assert cli.trainer.precision == "64-true"
    assert cli.config.trainer.precision == "64-true"  # what is saved
    assert [line for line in caplog.messages if "precision" in line] == ["precision: 64-true, since it is cpu"]
    assert cli_of("--trainer.precision", "bf16-mixed").trainer.precision == "bf16-mixed"


class Solves(Callback):
    """A callback of one's own, whose options have names of ours."""

    def __init__(self, solver: int, schedule: float = 1.0):
        self.solver = solver


def test_options_of_another_callback_are_its_own():
    mine = [f"--trainer.callbacks+={__name__}.Solves", "--trainer.callbacks.solver=3"]
    assert [one.solver for one in cli_of(*mine).trainer.callbacks if isinstance(one, Solves)] == [3]
    with pytest.raises(Mistake, match="schedule of Solves is 'soon': give a number"):
        cli_of(*mine, "--trainer.callbacks.schedule=soon")


@pytest.mark.parametrize("asked", ["uniform", "loss"])
def test_an_option_of_a_group_that_is_not_given(asked):
    callback = "--trainer.callbacks.0"
    others = [f"{callback}.pattern=unstructured", f"{callback}.sparsity=0.5"]
    assert options_of(*others, f"{callback}.allocation.by={asked}").allocation == Allocation(asked)


@pytest.mark.parametrize("argument", ["--trainer.callbacks.0.pattern", "--trainer.callbacks.0.init_args.pattern"])
def test_an_argument_of_one_callback(argument):
    cli = cli_of(argument, "1:4", "--trainer.callbacks.0.schedule.at=[0, 8]")
    options = cli.trainer.callbacks[0].options
    assert (options.pattern, options.schedule.at, options.monitor) == (NM(1, 4), (0, 8), "val/perplexity")
    assert cli.trainer.checkpoint_callback.filename == "quickstart"


def test_a_callback_on_the_command_line():
    given = ["pattern=4:8", "targets=['*.up_proj']", "schedule.start_step=1", "schedule.end_step=0.5"]
    added = [f"--trainer.callbacks.{one}" for one in (*given, "schedule.every_n_steps=1")]
    options = options_of("--trainer.callbacks+=ThanosPruningCallback", *added)
    assert (options.pattern, list(options.targets)) == (NM(4, 8), ["*.up_proj"])
    assert options.schedule == SparsitySchedule(1, 0.5, 1)


@pytest.mark.parametrize("text", ["4:8", '"4:8"'])
def test_quotes_around_a_pattern_are_optional(text):
    assert options_of(config=recipe_with(f"pattern: {text}")).pattern == NM(4, 8)


@pytest.mark.parametrize(
    ("text", "value"), [("1", 1), ("0.2", 0.2), ("1e-1", 0.1), (".5", 0.5), ("0", 0), ("0.0", 0.0)]
)
def test_steps_and_fractions_stay_apart(text, value):
    three = options_of(config=recipe_with(f"schedule: {{start_step: {text}, end_step: {text}, every_n_steps: 1}}"))
    listed = options_of(config=recipe_with(f"schedule: {{at: [{text}]}}"))
    for found in (three.schedule.start_step, three.schedule.end_step, listed.schedule.at[0]):
        assert found == value
        assert type(found) is type(value)
