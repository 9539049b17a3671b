"""Every command of docs/tutorial.md, one after the other, with a tiny model and a short text."""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from toy import tiny_files

from thanos_lightning.cli import main

PAGE = (Path(__file__).parents[2] / "docs" / "tutorial.md").read_text(encoding="utf-8")


def test_every_command_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^    thanos-lightning (.+)$", PAGE, re.MULTILINE)
    assert len(commands) == 7
    for command in commands:
        arguments, _, file = command.partition(" > ")
        monkeypatch.setattr("sys.argv", ["thanos-lightning", *shlex.split(arguments)])
        assert main(shlex.split(arguments)) == 0, command
        shown = capsys.readouterr().out
        if file:  # a recipe, which now trains a tiny model on a short text
            (model, text), config = tiny_files(tmp_path), yaml.safe_load(shown)
            config["model"]["init_args"]["model"] = model
            config["data"]["init_args"] |= {"dataset": str(text), "tokenizer": model, "block_size": 16}
            Path(file).write_text(yaml.safe_dump(config))
    assert Path("report.png").is_file()
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(code.replace("The import statement", "b c d"), {})
    assert capsys.readouterr().out
