import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from thanos_lightning.cli import main

UP = "model.layers.0.mlp.up_proj.weight"


# The program


def test_help_lists_all_commands(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    for command in ("fit", "validate", "test", "predict", "recipes", "plan", "verify", "export", "reshard", "plot"):
        assert f"\n    {command} " in shown


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_help_of_trainer_commands(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    assert "--trainer.max_steps" in shown
    assert "--trainer.callbacks.help=ThanosPruningCallback" in shown


@pytest.mark.parametrize(
    "program", [[str(Path(sys.executable).with_name("thanos-lightning"))], [sys.executable, "-m", "thanos_lightning"]]
)
def test_it_is_a_script_and_a_module(program):
    done = subprocess.run([*program, "--version"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("thanos-lightning 0.")


def test_verify_imports_no_trainer(copied):
    """In a process of its own, as these tests have imported everything."""
    code = (
        "import sys; from thanos_lightning.cli import main\n"
        "assert main(['verify', 'hf', '--pattern', '2:4']) == 0\n"
        "print([name for name in ('lightning', 'deepspeed', 'matplotlib', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_debugging_keeps_the_error(monkeypatch):
    monkeypatch.setenv("THANOS_LIGHTNING_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        main(["verify", "nowhere"])


def test_other_errors_keep_their_traceback(monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise ValueError("not ours")  # but this test's

    monkeypatch.setattr("thanos_lightning.checkpoints.verify.verify_checkpoint", fail)
    assert main(["verify", "a"]) == 1
    shown = capsys.readouterr().err.splitlines()
    assert shown[0] == "Traceback (most recent call last):"
    assert shown[-2:] == [
        "ValueError: not ours",
        "thanos-lightning: error: this may be a fault of the program: report it with the lines above",
    ]


# verify


@pytest.mark.parametrize("checkpoint", ["hf", "a.ckpt"])
def test_verify_summary(copied, capsys, checkpoint):
    assert main(["verify", checkpoint]) == 0
    assert capsys.readouterr().out == f"{checkpoint}: 7 tensors conform (2:4), 50.00% of their entries are 0\n"


@pytest.mark.parametrize("arguments", [[], ["--pattern", "2:4"], ["--pattern", "unstructured", "--sparsity", "0.5"]])
@pytest.mark.parametrize("value", [0.1, -0.0])
def test_verify_table(copied, capsys, value, arguments):
    tensors = load_file("hf/model.safetensors")
    flat = tensors[UP].view(-1)
    flat[flat.eq(0).nonzero()[0]] = value
    save_file(tensors, "hf/model.safetensors", metadata={"format": "pt"})
    assert main(["verify", "hf", *arguments]) == 1
    shown = capsys.readouterr()
    assert UP in shown.out
    assert "q_proj" not in shown.out
    assert shown.out.endswith("hf: 1 of 7 tensors do not conform\n")
    shares_differ = "an allocation gives each layer a share of its own: where they were recorded, they are checked"
    assert (shares_differ in shown.err) == ("unstructured" in arguments)


def test_verify_selects_layers(copied, capsys):
    one = ["--pattern", "2:4", "--targets", "*.up_proj", "*.down_proj", "--ignore", "re:.*down.*"]
    (copied / "hf" / "sparsity.json").unlink()
    assert main(["verify", "hf", *one]) == 0
    assert "1 tensors conform" in capsys.readouterr().out
    assert main(["verify", "hf", "--pattern", "2:4", "--ignore"]) == 1
    assert "lm_head.weight" in capsys.readouterr().out
    assert main(["verify", "hf", "--pattern", "2:4", "--outlier-fraction", "0.5"]) == 0


# export


def test_export(copied, capsys):
    content = torch.load("a.ckpt", weights_only=True)
    content["thanos_lightning"]["tokenizer"] = None
    torch.save(content, "a.ckpt")
    assert main(["export", "a.ckpt", "out", "--dtype", "bfloat16"]) == 0
    shown = capsys.readouterr()
    assert "out: 7 tensors conform (2:4), 50.00% of their entries are 0\n" in shown.out
    assert "thanos-lightning: warning: the checkpoint names no tokenizer" in shown.err
    assert AutoModelForCausalLM.from_pretrained(copied / "out").dtype == torch.bfloat16
    assert json.loads((copied / "out" / "sparsity.json").read_text())["sparsity"] == 0.5


def test_export_of_broken_masks(copied, capsys):
    content = torch.load("a.ckpt", weights_only=True)
    content["state_dict"][f"model.{UP}"].fill_(1.0)
    torch.save(content, "a.ckpt")
    assert main(["export", "a.ckpt", "out"]) == 1
    shown = capsys.readouterr().out
    assert UP in shown
    assert "nothing was exported): 1 of 7 tensors do not conform" in shown
    assert not (copied / "out").exists()
