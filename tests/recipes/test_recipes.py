"""Every recipe is parsed by LightningCLI against the code that it drives, and built; its schedule fits its training.

Each is planned, and the heads of the large ones are what the plan says. Those for ZeRO-3 are rehearsed, too: on CPUs,
with a tiny model.
"""

import itertools
import json
import math
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import DeepSpeedStrategy
from toy import tiny_files

from thanos_lightning import ThanosPruningCallback
from thanos_lightning.cli import main
from thanos_lightning.cli.planned import Plan, PlannedCLI
from thanos_lightning.cli.training import CLI
from thanos_lightning.lm import CausalLM, Distillation, TextData

FOLDER = Path(__file__).parents[2] / "recipes"
ZERO3 = {"llama-3.1-8b-2of4-zero3": (8, 1), "llama-3.1-70b-2of4-zero3-multinode": (8, 4)}  # GPUs, machines
SPARSITIES = {
    "quickstart": 0.5,
    "quickstart-zero3-cpu": 0.5,
    "smollm2-135m-2of4": 0.5,
    "smollm2-135m-2of4-distilled": 0.5,
    "smollm2-135m-channels30": 0.3,
    "smollm2-135m-unstructured60": 0.6,
    "smollm2-135m-unstructured80-gradual": 0.8,
    "llama-3.1-8b-2of4": 0.5,
    "llama-3.1-8b-unstructured50": 0.5,
    **dict.fromkeys(ZERO3, 0.5),
    "llama-3.2-1b-2of4-distilled": 0.5,
    "llama-3.2-1b-channels30": 0.3,
    "llama-3.2-1b-unstructured60-gradual": 0.6,
    "qwen3-0.6b-channels30": 0.3,
    "qwen3-0.6b-unstructured70-gradual": 0.7,
    "qwen3-1.7b-unstructured50-gradual": 0.5,
}
RECIPES = sorted({*SPARSITIES, *(file.stem for file in FOLDER.glob("*.yaml"))})
WINDOWS = {  # and the most blocks in one
    "llama-3.1-8b-2of4": (4, 10),
    "llama-3.1-8b-unstructured50": (8, 10),  # the first four look at the layers
    "llama-3.1-8b-2of4-zero3": (2, 17),
    "llama-3.1-70b-2of4-zero3-multinode": (27, 3),
}
PLANNED = [  # and where
    *((name, f"recipes/{name}.yaml") for name in ("llama-3.1-8b-2of4", *ZERO3)),
    ("llama-3.1-8b-2of4-zero3", "docs/scaling/plan.md"),
]


@pytest.fixture(autouse=True)
def _in_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["thanos-lightning"])


def build(name: str) -> LightningCLI:
    # the machine that runs this test may have no GPU; everything else is the recipe's
    here = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.num_nodes=1"]
    return CLI(["--config", str(FOLDER / f"{name}.yaml"), *here], run=False, save_config_callback=None)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_what_it_is(name: str) -> None:
    lines = (FOLDER / f"{name}.yaml").read_text().splitlines()
    head = "\n".join(itertools.takewhile(lambda line: line.startswith("#"), lines))
    assert all(words in head.lower() for words in (name, "for whom", "cost", "expect", "measured"))


def only(kind: type[Callback], cli: LightningCLI) -> Any:
    (callback,) = [callback for callback in cli.trainer.callbacks if isinstance(callback, kind)]
    return callback


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_builds(name: str) -> None:
    cli = build(name)
    assert isinstance(cli.model, CausalLM)
    assert isinstance(cli.datamodule, TextData)
    options, total = only(ThanosPruningCallback, cli).options, cli.trainer.max_steps
    assert total > 0
    events = options.schedule.resolve(total).events()
    if options.calibration.batches is None:
        assert len(events) > 1, "not gradual"
        assert events[0].step >= options.calibration.steps
    else:
        best = [0.1, 0.2, 0.3, 0.4] if options.pattern.sparsity >= 0.8 else [0]
        assert [event.step for event in events] == [part * total for part in best], "not what was measured best"
        assert options.calibration.batches == "datamodule"
    assert events[-1].step <= 0.75 * total, "no time to recover"
    assert events[-1].sparsity(options.pattern.sparsity) == options.pattern.sparsity
    assert math.isclose(options.pattern.sparsity, SPARSITIES[name])
    assert cli.datamodule.tokenizer == cli.model.model_name
    saving, teaching = only(ModelCheckpoint, cli), cli.model.distillation
    assert isinstance(teaching, Distillation) == name.endswith(("distilled", "channels30"))
    if teaching:
        assert teaching.dtype == "bfloat16"
        assert cli.model.hparams["distillation"] == asdict(teaching)
        assert saving.monitor == options.monitor
    if saving.monitor is None:
        assert saving._every_n_train_steps <= total
    else:
        assert cli.trainer.val_check_interval <= total * cli.trainer.accumulate_grad_batches, "nothing is ever saved"


@pytest.mark.parametrize("name", ZERO3)
def test_a_zero3_recipe_shards_all_and_offloads_nothing(name: str) -> None:
    cli = build(name)
    assert isinstance(cli.trainer.strategy, DeepSpeedStrategy)
    zero = cli.trainer.strategy.config["zero_optimization"]
    assert (zero["stage"], zero["sub_group_size"]) == (3, 100_000_000)
    assert not zero.keys() & {"offload_optimizer", "offload_param"}
    assert cli.trainer.precision == "bf16-mixed"
    written = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())["trainer"]
    assert (written["devices"], written["num_nodes"]) == ZERO3[name]
    needed = cli.trainer.max_steps * math.prod(ZERO3[name]) * cli.trainer.accumulate_grad_batches
    assert needed <= cli.datamodule.max_train_blocks, "blocks would be seen twice"


SLOW = "llama-3.2-1b-channels30"  # which takes twelve seconds, and has a sister


@pytest.mark.parametrize("name", [pytest.param(one, marks=[pytest.mark.rest] * (one == SLOW)) for one in RECIPES])
def test_a_recipe_can_be_planned(name: str) -> None:
    planned = Plan(PlannedCLI(["--config", name], for_another=True))
    windows = planned.outlook().windows
    devices, nodes = ZERO3.get(name, (2 if "zero3" in name else 1, 1))
    assert planned.ranks == devices * nodes
    expected, blocks = WINDOWS.get(name, (len(windows), 0))
    assert len(windows) == expected
    assert not blocks or max(len(window.patterns) for window in windows) == 7 * blocks


@pytest.mark.parametrize(("name", "file"), PLANNED)
def test_what_is_written_of_a_large_recipe_is_its_plan(
    name: str, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    written = [line.lstrip("#").strip() for line in (FOLDER.parent / file).read_text().splitlines()]
    (command,) = (line for line in written if line.startswith(f"thanos-lightning plan --config {name} "))
    assert main(command.split()[1:]) == 0
    said = [line.strip() for line in capsys.readouterr().out.splitlines()]
    begin = written.index(said[0])
    assert written[begin : begin + len(said)] == said


def rehearsal(recipe: Path, folder: Path) -> Path:
    """The recipe on two CPU processes: its model a tiny one, its text short, its steps few, and all else as it is."""
    tiny, text = tiny_files(folder)
    config = yaml.safe_load(recipe.read_text())
    config["model"]["init_args"] |= {"model": tiny}
    config["data"]["init_args"] |= {"dataset": str(text), "tokenizer": tiny, "block_size": 16, "max_val_blocks": 4}
    for name in ("dataset_config", "train_split", "num_workers", "num_proc"):
        del config["data"]["init_args"][name]
    config["trainer"] |= {"accelerator": "cpu", "devices": 2, "num_nodes": 1, "max_steps": 10}
    config["trainer"]["default_root_dir"] = str(folder / "run")
    config["trainer"]["strategy"]["class_path"] = "thanos_lightning.CPUDeepSpeed"
    config["trainer"]["strategy"]["init_args"]["sub_group_size"] = 5000
    pruning, saving = (callback["init_args"] for callback in config["trainer"]["callbacks"])
    pruning["calibration"]["memory_gib"] = 40 / 2**20  # a little more than a block's: two windows
    saving["every_n_train_steps"] = 10
    rehearsed = folder / "rehearsal.yaml"
    rehearsed.write_text(yaml.safe_dump(config))
    return rehearsed


@pytest.mark.rest
@pytest.mark.parametrize("name", ZERO3)
def test_a_zero3_recipe_is_rehearsed_on_cpus(name: str, tmp_path: Path) -> None:
    recipe = rehearsal(FOLDER / f"{name}.yaml", tmp_path)
    # a launcher's variables would say that the processes are there already
    env = {key: value for key, value in os.environ.items() if key not in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE")}
    env |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "HF_DATASETS_CACHE": str(tmp_path / "datasets")}
    command = [str(Path(sys.executable).with_name("thanos-lightning")), "fit", "--config", str(recipe)]
    ended = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=1200)
    assert ended.returncode == 0, (ended.stdout + ended.stderr)[-5000:]
    report = json.loads((tmp_path / "run" / "pruning_report.json").read_text())
    (event,) = report["events"]
    assert event["step"] == 0
    assert {layer["sparsity"] for layer in event["layers"]} == {0.5}
    assert len(event["layers"]) == 14
    assert len(event["blocks"]) == 2
    assert None not in report["summary"].values()
    (saved,) = (tmp_path / "run").rglob("*.ckpt")
    assert len(list(saved.rglob("*_optim_states.pt"))) == 2
