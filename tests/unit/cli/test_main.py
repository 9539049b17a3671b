import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_cases import change_checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from thanos_lightning.cli import main

UP = "model.layers.0.mlp.up_proj.weight"
OF_TRAINER = ("fit", "validate", "test")


@pytest.mark.parametrize("command", ["", *OF_TRAINER])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"] if command else ["--help"])
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    of_trainer = ("--trainer.max_steps", "--trainer.callbacks.help=ThanosPruningCallback")
    commands = [f"\n    {name} " for name in (*OF_TRAINER, "recipes", "plan", "verify", "export", "reshard", "plot")]
    assert [word for word in (of_trainer if command else commands) if word not in shown] == []
    if command:
        assert shown.index("ThanosPruningCallback") < shown.index("options:") < shown.index("Name of a recipe")


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


@pytest.mark.parametrize("arguments", [("--config",), ("-c=quickstat",), ("--config", "quickstart", "--ckpt_path=a")])
def test_what_is_not_there_is_refused_before_torch_is_loaded(arguments):
    code = (
        "import sys; from thanos_lightning.cli import main\n"
        f"assert main(['fit', *{arguments}]) == 2\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


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


def test_export(copied, capsys):
    change_checkpoint(path := Path("a.ckpt"), path, lambda content: content["thanos_lightning"].update(tokenizer=None))
    assert main(["export", "a.ckpt", "out", "--dtype", "bfloat16"]) == 0
    shown = capsys.readouterr()
    conform = "7 tensors conform (2:4), 50.00% of their entries are 0\n"
    assert shown.out.endswith(
        f"out: {conform}If you quantise it: int8 and int4, rounded to nearest, keep the zeros; "
        "GPTQ and GGUF's Q4_K do not\n"
    )
    assert "thanos-lightning: warning: the checkpoint names no tokenizer" in shown.err
    assert AutoModelForCausalLM.from_pretrained(copied / "out").dtype == torch.bfloat16
    for checkpoint in ("out", "a.ckpt"):
        assert main(["verify", checkpoint]) == 0
        assert capsys.readouterr().out == f"{checkpoint}: {conform}"


@pytest.mark.usefixtures("copied")
def test_plot_says_what_it_has_written(capsys):
    assert main(["plot", "report.json", "a.svg"]) == 0
    assert capsys.readouterr().out == "a.svg: a picture of report.json\n"
    assert Path("a.svg").stat().st_size > 0


def test_export_of_broken_masks(copied, capsys):
    change_checkpoint(path := Path("a.ckpt"), path, lambda content: content["state_dict"][f"model.{UP}"].fill_(1.0))
    assert main(["export", "a.ckpt", "out"]) == 1
    shown = capsys.readouterr().out
    assert UP in shown
    assert "nothing was exported): 1 of 7 tensors do not conform" in shown
    assert not (copied / "out").exists()
