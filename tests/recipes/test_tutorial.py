"""Every command of docs/tutorial.md, one after the other, with a tiny model and a short text."""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from toy import tiny_files

from thanos_lightning.cli import main

PAGE = (Path(__file__).parents[2] / "docs" / "tutorial.md").read_text(encoding="utf-8")
IN_CHANNELS = {"pattern": "channels", "sparsity": 0.3}  # what the page has a reader change in channels.yaml


def test_every_command_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model, text = tiny_files(tmp_path)
    tiny = ["--model.model", model, "--data.tokenizer", model, "--data.dataset", str(text), "--data.block_size", "16"]
    commands = re.findall(r"^    thanos-lightning (.+)$", PAGE, re.MULTILINE)
    assert len(commands) == 8
    for command in commands:
        printed, _, file = command.partition(" > ")
        arguments = shlex.split(printed)
        if arguments[0] == "fit":
            arguments += tiny
        monkeypatch.setattr("sys.argv", ["thanos-lightning", *arguments])
        assert main(arguments) == 0, command
        shown = capsys.readouterr().out
        if file:
            config = yaml.safe_load(shown)
            assert all(f"    {key}: {value}\n" in PAGE for key, value in IN_CHANNELS.items())
            config["trainer"]["callbacks"][0]["init_args"] |= IN_CHANNELS | {"multiple_of": 8}  # of 48 channels
            (root,) = re.findall(r"^ +default_root_dir: (.+)$", PAGE, re.MULTILINE)
            config["trainer"]["default_root_dir"] = root
            Path(file).write_text(yaml.safe_dump(config))
    assert Path("report.png").is_file()
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(code.replace("The import statement", "b c d"), {})
    assert capsys.readouterr().out
