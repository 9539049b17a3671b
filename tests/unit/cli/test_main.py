import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from thanos_lightning import SolverOptions, SparsitySchedule, ThanosPruningCallback
from thanos_lightning.cli import main
from thanos_lightning.cli.training import CLI
from thanos_lightning.report.data import EventReport, LayerReport, PruningReport
from thanos_lightning.solver import NM


class TinyModule(LightningModule):
    def __init__(self, vocabulary: int = 40):
        super().__init__()
        self.model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocabulary,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=1,
                num_attention_heads=2,
                bos_token_id=1,
                eos_token_id=2,
            )
        )

    def training_step(self, batch, batch_idx):
        return self.model(**batch, labels=batch["input_ids"]).loss

    def test_step(self, batch, batch_idx):
        self.log("loss", self.training_step(batch, batch_idx))

    def train_dataloader(self):
        return DataLoader([{"input_ids": torch.randint(3, 40, (8,))} for _ in range(8)], batch_size=4)

    def test_dataloader(self):
        return self.train_dataloader()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


AT_ONCE = SparsitySchedule(1, 1, 1)


class SpyCallback(ThanosPruningCallback):
    """Tells the test what reached the callback."""

    made: list = []  # noqa: RUF012

    def __init__(self, pattern: str = "2:4", sparsity: float | None = None, schedule: SparsitySchedule | None = None):
        super().__init__(pattern, sparsity, schedule or AT_ONCE, solver=SolverOptions.as_published("magnitude"))
        self.made.append(self)


@pytest.fixture(autouse=True)
def _quiet(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["thanos-lightning"])
    monkeypatch.delenv("THANOS_LIGHTNING_DEBUG", raising=False)
    monkeypatch.setattr(SpyCallback, "made", [])
    monkeypatch.chdir(tmp_path)


def write_config(folder, callback, **changes):
    text = textwrap.dedent(
        f"""\
        seed_everything: 3
        model:
          class_path: {__name__}.TinyModule
        trainer:
          max_steps: 2
          accelerator: cpu
          logger: false
          enable_progress_bar: false
          enable_model_summary: false
          enable_checkpointing: true
          default_root_dir: {folder}
          callbacks:
        """
    )
    (folder / "config.yaml").write_text(text + textwrap.indent(textwrap.dedent(callback), "    "))
    return str(folder / "config.yaml")


def spy(init_args=""):
    return f"- class_path: {__name__}.SpyCallback\n  init_args: {{{init_args}}}\n"


PRUNING = """\
- class_path: thanos_lightning.ThanosPruningCallback
  init_args:
    pattern: 2:4
    solver: {method: magnitude}
    schedule: {start_step: 1, end_step: 1, every_n_steps: 1}
"""


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fitted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["thanos-lightning"])
        assert main(["fit", "--config", write_config(folder, PRUNING)]) == 0
    (checkpoint,) = (folder / "checkpoints").glob("*.ckpt")
    return checkpoint


@pytest.fixture
def folder(fitted, tmp_path, capsys):
    assert main(["export", str(fitted), str(tmp_path / "out")]) == 0
    capsys.readouterr()
    return tmp_path / "out"


def fill(folder, value):
    tensors = load_file(folder / "model.safetensors")
    flat = tensors["model.layers.0.mlp.up_proj.weight"].view(-1)
    flat[flat.eq(0).nonzero()[0]] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# The program


def test_help_lists_all_commands(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    for command in ("fit", "validate", "test", "predict", "recipes", "plan", "verify", "export", "reshard", "plot"):
        assert f"\n    {command} " in shown


def test_version(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out.startswith("thanos-lightning 0.")


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_help_of_trainer_commands(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    assert "--trainer.max_steps" in shown
    assert "--trainer.callbacks.help=ThanosPruningCallback" in shown


def test_verify_imports_no_trainer(folder):
    """In a process of its own, as these tests have imported everything."""
    code = (
        "import sys; from thanos_lightning.cli import main\n"
        f"assert main(['verify', {str(folder)!r}, '--pattern', '2:4']) == 0\n"
        "print([name for name in ('lightning', 'deepspeed', 'matplotlib', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_console_script(folder):
    script = os.path.join(os.path.dirname(sys.executable), "thanos-lightning")
    done = subprocess.run([script, "verify", str(folder), "--pattern", "4:8"], capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr  # 2:4 is 4:8 too
    assert "7 tensors conform (4:8), 50.00% of their entries are 0" in done.stdout


def test_as_a_module():
    done = subprocess.run([sys.executable, "-m", "thanos_lightning", "--version"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("thanos-lightning 0.")


# verify


def test_verify_summary(folder, fitted, capsys):
    assert main(["verify", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder}: 7 tensors conform (2:4), 50.00% of their entries are 0\n"
    assert main(["verify", str(fitted)]) == 0
    assert "7 tensors conform (2:4), 50.00%" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["--pattern", "2:4"], ["--pattern", "unstructured", "--sparsity", "0.5"]])
@pytest.mark.parametrize("value", [0.1, -0.0])
def test_verify_table(folder, capsys, value, arguments):
    fill(folder, value)
    assert main(["verify", str(folder), *arguments]) == 1
    shown = capsys.readouterr()
    assert "model.layers.0.mlp.up_proj.weight" in shown.out
    assert "q_proj" not in shown.out
    assert shown.out.endswith(f"{folder}: 1 of 7 tensors do not conform\n")
    shares_differ = "an allocation gives each layer a share of its own: where they were recorded, they are checked"
    assert (shares_differ in shown.err) == ("unstructured" in arguments)


@pytest.mark.parametrize("part", ["state_dict", "optimizer_states"])
def test_verify_checkpoint(fitted, tmp_path, capsys, part):
    content = torch.load(fitted, weights_only=True)
    if part == "state_dict":
        tensor = content["state_dict"]["model.model.layers.0.mlp.up_proj.weight"]
    else:
        states = content["optimizer_states"][0]["state"].values()
        tensor = [state["exp_avg"] for state in states if tuple(state["exp_avg"].shape) == (24, 16)][1]
    flat = tensor.view(-1)
    flat[flat.eq(0).nonzero()[0]] = 1.0
    torch.save(content, tmp_path / "a.ckpt")
    assert main(["verify", str(tmp_path / "a.ckpt")]) == 1
    shown = capsys.readouterr().out
    assert "model.model.layers.0.mlp.up_proj.weight" in shown
    assert "1 of 7 tensors do not conform" in shown


def test_verify_selects_layers(folder, capsys):
    one = ["--pattern", "2:4", "--targets", "*.up_proj", "*.down_proj", "--ignore", "re:.*down.*"]
    (folder / "sparsity.json").unlink()
    assert main(["verify", str(folder), *one]) == 0
    assert "1 tensors conform" in capsys.readouterr().out
    assert main(["verify", str(folder), "--pattern", "2:4", "--ignore"]) == 1
    assert "lm_head.weight" in capsys.readouterr().out
    assert main(["verify", str(folder), "--pattern", "2:4", "--outlier-fraction", "0.5"]) == 0


def test_pattern_arrives_as_text(folder, capsys):
    assert main(["verify", str(folder), "--pattern", "1:4"]) == 1
    assert "│ 1:4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "nowhere"], "nowhere does not exist"),
        (["verify", "."], "holds no weights, and no model.safetensors"),
        (["verify", "OUT", "--sparsity", "0.5"], "give --pattern"),
        (["verify", "OUT", "--targets", "*"], "give --pattern"),
        (["verify", "OUT", "--pattern", "2-4"], "pattern='2-4' is not known"),
        (["verify", "OUT", "--pattern", "unstructured"], "needs a sparsity"),
        (["verify", "OUT", "--pattern", "2:4", "--targets", "nothing"], "matches no prunable layer"),
        (["export", "nowhere.ckpt", "new"], "nowhere.ckpt does not exist"),
        (["export", "CKPT", "OUT"], "exists already"),
        (["export", "CKPT", "new", "--dtype", "int8"], "dtype is 'int8'"),
        (
            ["export", "CKPT", "new", "--tokenizer", "/nowhere/tokenizer"],
            "give the name or path of one with --tokenizer",
        ),
    ],
)
def test_mistakes_are_one_line(folder, fitted, capsys, monkeypatch, arguments, message):
    arguments = [{"OUT": str(folder), "CKPT": str(fitted)}.get(argument, argument) for argument in arguments]
    assert main(arguments) == 2
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == 1
    assert shown[0].startswith("thanos-lightning: error: ")
    assert message in shown[0]
    monkeypatch.setenv("THANOS_LIGHTNING_DEBUG", "1")
    with pytest.raises((ValueError, FileNotFoundError)):
        main(arguments)


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


# export


def test_export(fitted, tmp_path, capsys):
    assert main(["export", str(fitted), "out", "--dtype", "bfloat16"]) == 0
    shown = capsys.readouterr()
    assert "out: 7 tensors conform (2:4), 50.00% of their entries are 0\n" in shown.out
    assert "thanos-lightning: warning: the checkpoint names no tokenizer" in shown.err
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    assert json.loads((tmp_path / "out" / "sparsity.json").read_text())["sparsity"] == 0.5


def test_export_of_broken_masks(fitted, tmp_path, capsys):
    content = torch.load(fitted, weights_only=True)
    content["state_dict"]["model.model.layers.0.mlp.up_proj.weight"].fill_(1.0)
    torch.save(content, tmp_path / "a.ckpt")
    assert main(["export", str(tmp_path / "a.ckpt"), "out"]) == 1
    shown = capsys.readouterr().out
    assert "model.layers.0.mlp.up_proj.weight" in shown
    assert "nothing was exported): 1 of 7 tensors do not conform" in shown
    assert not (tmp_path / "out").exists()


# fit and its configuration


def test_fit_twice_in_one_folder(fitted, tmp_path):
    assert (fitted.parent.parent / "config.yaml").is_file()
    config = write_config(tmp_path, spy())
    for _ in range(2):
        assert main(["fit", "--config", config, "--trainer.enable_checkpointing=false"]) == 0
    # the saved one replaced the given one of the same name, and says the same
    assert main(["fit", "--config", config]) == 0
    assert [made.options.pattern for made in SpyCallback.made] == [NM(2, 4)] * 3


def test_test_command(fitted, capsys):
    config = write_config(fitted.parent.parent, spy())
    assert main(["test", "--config", config, "--ckpt_path", str(fitted)]) == 0
    assert "loss" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["2:4", '"2:4"'])
def test_quotes_around_a_pattern_are_optional(tmp_path, text):
    assert main(["fit", "--config", write_config(tmp_path, spy(f"pattern: {text}"))]) == 0
    assert SpyCallback.made[0].options.pattern == NM(2, 4)
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert saved["trainer"]["callbacks"][0]["init_args"]["pattern"] == "2:4"


@pytest.mark.parametrize(
    ("text", "value"), [("1", 1), ("0.2", 0.2), ("1e-1", 0.1), (".5", 0.5), ("0", 0), ("0.0", 0.0)]
)
def test_steps_and_fractions_stay_apart(tmp_path, text, value):
    callbacks = [
        spy(f"schedule: {{start_step: {text}, end_step: {text}, every_n_steps: 1}}"),
        spy(f"schedule: {{at: [{text}]}}"),
    ]
    for callback in callbacks:
        CLI(["--config", write_config(tmp_path, callback)], run=False)
    three, listed = (made.options.schedule for made in SpyCallback.made)
    for found in (three.start_step, three.end_step, listed.at[0]):
        assert found == value
        assert type(found) is type(value)


def test_schedule_in_yaml(tmp_path):
    schedule = "schedule: {start_step: 1, end_step: 0.5, every_n_steps: 0.25}"
    assert main(["fit", "--config", write_config(tmp_path, spy(schedule))]) == 0
    assert SpyCallback.made[0].options.schedule == SparsitySchedule(1, 0.5, 0.25)


def test_callback_on_the_command_line(tmp_path, capsys):
    config = write_config(tmp_path, "[]\n")
    arguments = [
        "--trainer.callbacks+=thanos_lightning.ThanosPruningCallback",
        "--trainer.callbacks.pattern=2:4",
        "--trainer.callbacks.targets=['*.up_proj']",
        "--trainer.callbacks.schedule.start_step=1",
        "--trainer.callbacks.schedule.end_step=0.5",
        "--trainer.callbacks.schedule.every_n_steps=1",
    ]
    assert main(["fit", "--config", config, *arguments]) == 0
    (checkpoint,) = (tmp_path / "checkpoints").glob("*.ckpt")
    capsys.readouterr()
    assert main(["verify", str(checkpoint)]) == 0
    assert "1 tensors conform (2:4)" in capsys.readouterr().out


def test_short_class_name(tmp_path, capsys):
    config = write_config(tmp_path, "[]\n")
    with pytest.raises(SystemExit) as exit_:
        main(["fit", "--config", config, "--trainer.callbacks+=ThanosPruningCallback", "--print_config"])
    assert exit_.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    (callback,) = printed["trainer"]["callbacks"]
    assert callback["class_path"].startswith("thanos_lightning.")
    assert callback["init_args"]["pattern"] == "2:4"


def test_misconfiguration_of_the_trainer_is_one_line(tmp_path, capsys, monkeypatch):
    arguments = ["fit", "--config", write_config(tmp_path, spy()), "--trainer.devices=0"]
    assert main(arguments) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("thanos-lightning: error: ")
    monkeypatch.setenv("THANOS_LIGHTNING_DEBUG", "1")
    with pytest.raises(MisconfigurationException):
        main(arguments)


def test_plot(tmp_path, capsys):
    layer = LayerReport("a", (2, 4), "2:4", 0.5, 1.0, 0.1, 0.1)
    PruningReport([EventReport(5, 0.5, [layer])]).write(tmp_path / "pruning_report.json")
    assert main(["plot", str(tmp_path / "pruning_report.json"), str(tmp_path / "report.png")]) == 0
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert main(["plot", str(tmp_path / "none.json"), str(tmp_path / "report.png")]) == 2
    assert "none.json does not exist" in capsys.readouterr().err
