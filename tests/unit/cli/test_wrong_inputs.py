"""What a user may get wrong on the command line: the input, the exit status and the line."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import lightning.pytorch  # noqa: F401  # its log goes to the stderr of this moment: not one of a test's
import pytest

from thanos_lightning.cli import main
from thanos_lightning.cli.shipped import recipes

QUICKSTART = recipes()["quickstart"].read_text(encoding="utf-8")
PATTERN = 'pattern: "2:4".*'


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["thanos-lightning"])
    monkeypatch.delenv("THANOS_LIGHTNING_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)


def line_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that is said, by exit status 2."""
    try:
        status = main(list(arguments))
    except SystemExit as exit_:
        status = exit_.code  # type: ignore[assignment]  # an int here
    shown = capsys.readouterr().err
    said = [line for line in shown.splitlines() if line.startswith("thanos-lightning: ")]
    assert status == 2, shown
    assert len(said) == 1, shown
    assert "Traceback" not in shown
    assert shown.splitlines()[-1] == said[0]
    return said[0].removeprefix("thanos-lightning: error: ")


# What the recipe says, as a regular expression -> what a user wrote -> the line, or how it begins
WRONG_VALUES = [
    (PATTERN, "pattern: 124", 'pattern of ThanosPruningCallback is 124: give text in quotes, such as "2:4" (YAML 1.1 '),
    (PATTERN, "sparsity: half", "sparsity of ThanosPruningCallback is 'half': give a number or null"),
    (
        PATTERN,
        "method: obc",
        "method of ThanosPruningCallback is 'obc': choose one of thanos, sparsegpt, wanda, magnitude",
    ),
    (
        PATTERN,
        "sparsty: 0.5",
        "ThanosPruningCallback has no option sparsty: did you mean sparsity? `thanos-lightning fit "
        "--trainer.callbacks.help=ThanosPruningCallback` lists all",
    ),
    (PATTERN, "block_size: 1.5", "block_size of ThanosPruningCallback is 1.5: give a whole number"),
    (
        "dataloader: datamodule",
        "dataloader: 3",
        "calibration_dataloader of ThanosPruningCallback is 3: give data",
    ),
    ("start_step: 0", "start_stp: 0", "SparsitySchedule has no option start_stp: did you mean start_step?"),
    ("start_step: 0", "start_step: soon", "start_step of SparsitySchedule is 'soon': give a whole number or a number"),
    ("learning_rate: .*", "learning_rate: fast", "learning_rate of CausalLM is 'fast': give a number"),
    ("e: cosine", "e: step", "lr_schedule of CausalLM is 'step': choose one of linear, cosine, constant"),
    ("precision: auto", "precision: bf32", "trainer.precision is 'bf32': choose one of transformer-engine, "),
    ("max_steps: .*", "max_steps: many", "trainer.max_steps is 'many': give a whole number"),
    ("max_steps: .*", "max_stps: 40", "fit has no option trainer.max_stps: did you mean trainer.max_steps? "),
    ("seed_everything: 1", "seed_evrything: 1", "fit has no option seed_evrything: did you mean seed_everything? "),
    ("batch_size: .*", "batchsize: 8", "TextData has no option batchsize: did you mean batch_size? "),
    (
        "ThanosPruningCallback",
        "ThanosPruningCalback",
        "class_path is 'thanos_lightning.ThanosPruningCalback': did ",
    ),
    ("thanos_lightning.ThanosPruningCallback", "ThanosPruner", "class_path is 'ThanosPruner': did you mean ThanosPru"),
    ("lm.CausalLM", "lm.CausalML", "class_path is 'thanos_lightning.lm.CausalML': did you mean thanos_lightning.lm.C"),
    ("lm.CausalLM", "ml.CausalLM", "class_path is 'thanos_lightning.ml.CausalLM': thanos_lightning has no ml"),
    ("thanos_lightning.lm.CausalLM", "nowhere.LM", "class_path is 'nowhere.LM': no module named 'nowhere': install it"),
    (
        "lm.TextData",
        "lm.CausalLM",
        "data: thanos_lightning.lm.CausalLM is no LightningDataModule: give a class",
    ),
    ("  callbacks:\n", "  callbacks:\n    - 3\n", "trainer.callbacks: 3 is no Callback: give class_path and init_args"),
    ("batch_size: .*", "batch_size: 0", "batch_size is 0: give at least 1"),
]


@pytest.mark.parametrize(("right", "wrong", "line"), WRONG_VALUES, ids=[wrong.strip() for _, wrong, _ in WRONG_VALUES])
def test_values_in_a_recipe(right: str, wrong: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    mine, replaced = re.subn(right, wrong, QUICKSTART, count=1)
    assert replaced
    Path("mine.yaml").write_text(mine, encoding="utf-8")
    assert line_of(capsys, "fit", "--config", "mine.yaml").startswith(line)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", "--config mine.yaml is empty: give a YAML file as `thanos-lightning recipes quickstart` prints one"),
        (b"- 1\n", "--config mine.yaml holds no keys: give a YAML file as "),
        (b"a: [1\nb: }\n", "--config mine.yaml is no YAML: expected ',' or ']', but got ':' in line 2"),
        (b"\xff\xfe\x00", "--config mine.yaml is no YAML: 'utf-8' codec can't decode byte 0xff in position 0"),
        (None, "--config mine.yaml is a folder: give a YAML file, or a recipe's name"),
    ],
)
def test_files_that_are_no_recipe(content: bytes | None, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    if content is None:
        Path("mine.yaml").mkdir()
    else:
        Path("mine.yaml").write_bytes(content)
    assert line_of(capsys, "fit", "--config=mine.yaml").startswith(line)


OF_CALLBACKS = "`thanos-lightning fit --trainer.callbacks.help=ThanosPruningCallback` lists all"
FIT = ("fit", "--config", "quickstart")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("fit", "-c", "quickstat"), "--config quickstat: there is no such file (in "),
        (("fit",), "no model is given: thanos-lightning fit --config RECIPE.yaml"),
        ((*FIT, "--config"), "argument -c/--config: expected one argument"),
        ((*FIT, "extra"), "unrecognized arguments: extra"),
        ((*FIT, "--trainer.max_stpes=3"), "fit has no option trainer.max_stpes: did you mean trainer.max_steps? "),
        (
            (*FIT, "--modle.learning_rate", "1"),
            "fit has no option modle.learning_rate: did you mean model.lear",
        ),
        ((*FIT, "--model.learning_rate", "fast"), "learning_rate of CausalLM is 'fast': give a number"),
        ((*FIT, "--model.lerning_rate", "1"), "CausalLM has no option lerning_rate: did you mean learning_rate? "),
        (
            (*FIT, "--trainer.callbacks.pattern", "1:4"),
            "--trainer.callbacks.pattern is an option of the last callback, which has none of this name: give the "
            "number of one, from 0, such as --trainer.callbacks.0.pattern",
        ),
        (
            (*FIT, "--trainer.callbacks.0.patern", "1:4"),
            f"ThanosPruningCallback has no option patern: did you mean pattern? {OF_CALLBACKS}",
        ),
        ((*FIT, "--trainer.callbacks.0.pattern=124"), "pattern of ThanosPruningCallback is 124: give text in quotes"),
        ((*FIT, "--trainer.callbacks.2.pattern=1:4"), "--trainer.callbacks.2.pattern: there are 2 callbacks, and the "),
        ((*FIT, "--trainer.callbacks.0.pattern"), "--trainer.callbacks.0.pattern has no value: give one, such as "),
        ((), "the following arguments are required: COMMAND"),
        (("prune",), "argument COMMAND: invalid choice: 'prune' (choose from "),
        (("verify",), "the following arguments are required: checkpoint (`thanos-lightning verify --help` tells more)"),
        (("verify", "a", "--sparsity", "half"), "argument --sparsity: invalid float value: 'half'"),
        (("recipes", "quickstrat"), "'quickstrat' is no recipe or launch file: did you mean quickstart? "),
    ],
)
def test_arguments(arguments: tuple[str, ...], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert line_of(capsys, *arguments).startswith(line)


def test_a_rank_says_which_it_is(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "RANK", "3")
    assert main(["recipes", "nothing"]) == 2
    assert capsys.readouterr().err.startswith("thanos-lightning: rank 3: error: 'nothing' is no recipe")
