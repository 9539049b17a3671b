"""`thanos-lightning plan`: what it says of trainings, beside what such trainings then do."""

import json
from pathlib import Path

import lightning.pytorch  # noqa: F401  # its log goes to the stderr of this moment: not one of a test's
import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.distributed.fsdp import fully_shard
from toy import ToyLM, tiny_files, tiny_llama

from thanos_lightning.cli import main
from thanos_lightning.cli.planned import Outlook, Plan, PlannedCLI
from thanos_lightning.fit.run import PruningRun

FSDP2 = "lightning.pytorch.strategies.ModelParallelStrategy"
DEEPSPEED = "lightning.pytorch.strategies.DeepSpeedStrategy"
MLP = "transformers.models.llama.modeling_llama.LlamaMLP"
LEAF = {"zero_optimization": {"stage": 3, "leaf_module": {"classes": [MLP]}}}
ALL_DATA = "{data_parallel_size: 4, tensor_parallel_size: 1}"
GPUS = ("--trainer.accelerator=gpu", "--devices=2")


class Loading(LightningModule):
    """Reads numbers when it is made."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, int(torch.ones(1).item()))


class Sharded(ToyLM):
    """Shards itself, as FSDP2 wants it."""

    def configure_model(self) -> None:
        assert self.device_mesh is not None
        for block in self.model.model.layers:
            fully_shard(block, mesh=self.device_mesh["data_parallel"])
        fully_shard(self.model, mesh=self.device_mesh["data_parallel"])


@pytest.fixture
def fit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Arguments for a tiny model and a tiny text: of each rank's weights 24,000 are in layers to prune."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    model, text = tiny_files(tmp_path)
    return [
        *("--model", "CausalLM", "--model.model", model, "--data", "TextData", "--data.dataset", str(text)),
        *("--data.tokenizer", model, "--data.block_size", "16", "--data.batch_size", "4", "--data.max_val_blocks", "4"),
        *("--trainer.accelerator", "cpu", "--trainer.max_steps", "8", "--trainer.logger", "false"),
        *("--trainer.callbacks+=ThanosPruningCallback", "--trainer.enable_checkpointing", "false"),
    ]


def outlook_of(*arguments: str) -> Outlook:
    return Plan(PlannedCLI(list(arguments), for_another=False)).outlook()


def text_of(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> str:
    capsys.readouterr()  # what DeepSpeed said when it was imported
    assert main(["plan", *arguments]) == status
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    return said


@pytest.mark.parametrize(
    "options",
    [
        {"pattern": "2:4", "calibration.memory_gib": "0.00004", "schedule": "{at: [4, 6]}", "calibration.steps": "1"},
        {"pattern": "unstructured", "sparsity": "0.5", "schedule": "{at: [2, 4, 6]}", "calibration.steps": "1"},
        *(
            pytest.param({"calibration.batches": "datamodule", "sparsity": "0.5", **one}, marks=pytest.mark.rest)
            for one in ({"pattern": "unstructured"}, {"pattern": "channels", "multiple_of": "8"})
        ),
    ],
    ids=["windows", "scan", "calibration set", "channels"],
)
def test_windows_are_those_of_the_run(options: dict[str, str], fit: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    fit += [f"--trainer.callbacks.0.{name}={value}" for name, value in options.items()]
    said = outlook_of(*fit).windows
    runs: list[PruningRun] = []
    end = PruningRun.end
    monkeypatch.setattr(PruningRun, "end", lambda run: (runs.append(run), end(run)))
    assert main(["fit", *fit]) == 0
    spans, expected = (
        [(one.start_step, one.end_step, one.scans, list(one.patterns)) for one in windows]
        for windows in (said, runs[0].windows)
    )
    assert spans == expected
    assert len({window.event.step for window in said}) == len(runs[0].past.report.events)


def test_what_does_not_fit_and_what_would(fit: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    fit += [f"--trainer.callbacks.0.calibration.{one}" for one in ("batches=datamodule", "memory_gib=1")]
    enough, too_little = (str(part * outlook_of(*fit).most / 2**30) for part in (1.01, 0.99))
    assert "it fits       if activations take no more than" in text_of(capsys, *fit, "--memory-gib", enough)
    said = text_of(capsys, *fit, "--memory-gib", too_little, status=1)
    assert "does not fit  1 MiB too much" in said
    shared = text_of(capsys, *fit, "--memory-gib", too_little, "--devices", "2", status=1)
    assert "each of 2 ranks: DDP" in shared
    assert "memory_gib" not in shared, "training needs most"


def test_windows_are_planned_for_the_memory(fit: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    fit += ["--trainer.callbacks.0.schedule={at: [4]}", "--trainer.callbacks.0.pattern=2:4"]
    whole = outlook_of(*fit)
    assert whole.at_events == [whole.most]
    assert "it fits" in text_of(capsys, *fit, "--memory-gib", str(0.99 * whole.most / 2**30))


def test_a_recipe_is_planned_for_a_device_that_is_not_here(capsys: pytest.CaptureFixture[str], fit: list[str]) -> None:
    fit += ["--trainer.accelerator", "auto", "--trainer.precision", "auto", "--trainer.strategy", "deepspeed_stage_3"]
    said = text_of(capsys, *fit, "--device", "h100", "--devices", "8", "--num-nodes", "2")
    assert "each of 16 × h100: DeepSpeed ZeRO-3" in said
    assert "of 74.5" in said
    of_cpu = [*fit, "--trainer.accelerator", "cpu", "--trainer.strategy", "auto"]
    here, there = (Plan(PlannedCLI(of_cpu, for_another=another)).precision for another in (False, True))
    assert here == there


def test_what_is_offloaded_is_told_apart(fit: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    fit += ["--trainer.accelerator", "gpu", "--trainer.strategy", "deepspeed_stage_3_offload", "--devices", "1"]
    said = text_of(capsys, *fit)
    assert "moments of the optimizer (offloaded)" in said
    assert "offloaded, to the memory of the CPU or to a disk" in said


def test_averaged_weights_are_held_beside_the_model(fit: list[str]) -> None:
    alone = outlook_of(*fit)
    averaged = outlook_of(*fit, "--trainer.callbacks+=lightning.pytorch.callbacks.EMAWeightAveraging")
    assert averaged.in_training - alone.in_training == alone.share.bytes.weights


def test_unknown_steps_are_said(fit: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    fit[fit.index("--trainer.max_steps")] = "--trainer.max_epochs"
    assert main(["plan", *fit]) == 2
    assert "the number of optimizer steps is not known: set the Trainer's max_steps" in capsys.readouterr().err
    said = text_of(capsys, *fit, "--trainer.callbacks.0.calibration.batches=datamodule")
    assert "steps         not known without the data" in said
    assert "steps         at most max_steps" in text_of(capsys, *fit, "--trainer.max_steps", "8")


def test_modules_of_a_users_own(fit: list[str]) -> None:
    own = ["--model", f"{__name__}.Sharded", *fit[4:]]
    strategy = f"--trainer.strategy={{class_path: {FSDP2}, init_args: {ALL_DATA}}}"
    share = outlook_of(*own, strategy, "--trainer.devices=4").share
    weights = 4 * sum(parameter.numel() for parameter in tiny_llama().parameters())
    assert share.strategy == "FSDP2"
    assert share.bytes.weights == weights / 4
    assert share.bytes.moments == 2 * weights / 4
    assert 0 < share.bytes.copies < weights


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--devices", "0"], "trainer.devices is 0: give at least 1"),
        (["--trainer.num_nodes", "0"], "trainer.num_nodes is 0: give at least 1"),
        (["--memory-gib", "0"], "--memory-gib is 0: give a number > 0, such as 80"),
        (["--trainer.devices", "-1", "--trainer.accelerator", "gpu"], "trainer.devices is -1, which is another number"),
        (["--trainer.callbacks", "null"], "the trainer has no ThanosPruningCallback, so nothing would be pruned: add"),
        (["--trainer.strategy=fsdp", *GPUS], "ThanosPruningCallback does not support the"),
        (
            [
                f"--trainer.strategy={{class_path: {DEEPSPEED}, init_args: {{config: {json.dumps(LEAF)}}}}}",
                *("--trainer.callbacks.0.calibration.batches=datamodule", *GPUS),
                "--trainer.callbacks.0.calibration.output_weights=diagonal",
            ],
            "calibration.output_weights is 'diagonal', but under ZeRO-3 there are no gradients on calibration.batches",
        ),
        (["--model", f"{__name__}.Loading"], "model and data can't be built on the meta device, without weights"),
        (["--model.model", "/nowhere"], "no model is at '/nowhere': give a folder that exists"),
        (["--trainer.callbacks.0.calibration.memory_gib", "0.000001"], "the Hessian of layer"),
    ],
)
def test_mistakes(arguments: list[str], line: str, fit: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    if arguments[0] == "--model":
        fit = fit[4:]
    assert main(["plan", *fit, *arguments]) == 2
    said = [text for text in capsys.readouterr().err.splitlines() if text.startswith("thanos-lightning: ")]
    assert len(said) == 1
    assert said[0].removeprefix("thanos-lightning: error: ").startswith(line)
