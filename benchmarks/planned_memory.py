"""What `thanos-lightning plan` says of memory, beside what trainings take: on one device, under ZeRO-3, and at width.

    python benchmarks/planned_memory.py
    python benchmarks/planned_memory.py --output benchmarks/results
    python benchmarks/planned_memory.py --cases qwen3-0.6b-channels30 --threads 2 --output benchmarks/results

Linux only: measured is the kernel's peak of a process's resident memory, less what it held before it had a model, on
the rank that took most. Batches are of 16 tokens, since a plan leaves activations out. Each training prunes before its
first step. The cases by default train SmolLM2-135M. The others train models of the widths that recipes train, with
random weights and the recipe's own options of pruning, for two steps on blocks of 128 tokens.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from machine import keep
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen3Config

from thanos_lightning.cli.planned import Plan, PlannedCLI

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
FOLDER = "PLANNED_MEMORY"  # an environment variable
PRUNING = "--trainer.callbacks.0"
SMALL = [
    *("--config", "quickstart"),
    *("--trainer.max_steps", "4", "--trainer.limit_val_batches", "0"),
    *("--trainer.precision", "32-true", f"{PRUNING}.monitor", "null", f"{PRUNING}.reorder", "false"),
    *("--data.block_size", "16", "--data.batch_size", "1", "--data.calibration_tokens", "256"),
    *(f"{PRUNING}.solver.admm_steps", "1", f"{PRUNING}.solver.refine_steps", "1"),
]
ZERO3 = [
    *("--trainer.strategy", "thanos_lightning.CPUDeepSpeed", "--trainer.strategy.stage", "3", "--trainer.devices", "2"),
    *("--trainer.strategy.reduce_bucket_size", "5000000", "--trainer.accelerator", "cpu"),  # else it is mostly buckets
]
DEFAULT = {"one device": SMALL, "ZeRO-3, two ranks": [*SMALL, *ZERO3]}
LLAMA_1B = LlamaConfig(
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    tie_word_embeddings=True,
)
QWEN3 = Qwen3Config(
    vocab_size=151936,
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    tie_word_embeddings=True,
)
OF_LLAMA_8B = LlamaConfig(  # two of 32 layers, and a small vocabulary
    vocab_size=49152,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=2,
    num_attention_heads=32,
    num_key_value_heads=8,
    tie_word_embeddings=True,
)
WIDE: dict[str, tuple[str, PreTrainedConfig, list[str]]] = {  # the recipe, the model and other options
    "qwen3-0.6b-channels30": ("qwen3-0.6b-channels30", QWEN3, []),
    "qwen3-0.6b 2:4": ("qwen3-0.6b-channels30", QWEN3, [f"{PRUNING}.pattern=2:4", f"{PRUNING}.sparsity=null"]),
    "llama-3.2-1b-channels30": ("llama-3.2-1b-channels30", LLAMA_1B, ["--trainer.precision", "bf16-true"]),
    "llama-3.2-1b-2of4-distilled": ("llama-3.2-1b-2of4-distilled", LLAMA_1B, ["--trainer.precision", "bf16-true"]),
    "two layers of llama-3.1-8b-2of4": ("llama-3.1-8b-2of4", OF_LLAMA_8B, []),
}


def mebibytes(field: str) -> float:
    """A field of /proc/self/status, such as VmHWM, the peak of the resident set."""
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) / 1024


class Peaks(Callback):
    """Measures the event before the first step and the training, after the callback that prunes."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """No model is there yet."""
        self.before, self.peaks = mebibytes("RssAnon"), dict[str, float]()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The strategy has the model, some of which may still be a file that is mapped into memory."""
        for parameter in pl_module.parameters():
            parameter.data = parameter.data.clone()

        def forget_loading(*_: object) -> None:
            CLEAR.write_text("5")
            first_batch.remove()

        first_batch = pl_module.model.register_forward_pre_hook(forget_loading)  # by then a teacher is loaded, too

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The event is over."""
        self._note("event")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """All steps are taken."""
        self._note("training")
        (Path(os.environ[FOLDER]) / f"{trainer.global_rank}.json").write_text(json.dumps(self.peaks))

    def _note(self, name: str) -> None:
        self.peaks[name] = mebibytes("VmHWM") - mebibytes("RssFile") - self.before
        CLEAR.write_text("5")


def wide(case: str, folder: Path) -> list[str]:
    """The arguments of a training of two steps, for which a model is written to the folder."""
    recipe, config, options = WIDE[case]
    torch.manual_seed(0)
    # in fp32, or a teacher in bf16 would be a file that is mapped, and not counted
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / "model")
    return [
        *("--config", recipe, "--model.model", str(folder / "model")),
        *("--data.dataset", "python-reference", "--data.dataset_config", "null", "--data.train_split", "train"),
        *("--data.tokenizer", "smollm2-135m", "--data.block_size", "128", "--data.batch_size", "1"),
        *("--data.calibration_tokens", "8192", "--data.num_proc", "1", "--data.max_val_blocks", "4"),
        *("--trainer.accelerator", "cpu", "--trainer.precision", "32-true", "--trainer.max_steps", "2"),
        *("--trainer.accumulate_grad_batches", "1", "--trainer.limit_val_batches", "0"),
        *(f"{PRUNING}.monitor", "null", "--trainer.callbacks.1.monitor", "null"),
        *("--trainer.callbacks.1.every_n_train_steps", "1000"),  # saves nothing
        *options,
    ]


def fit(*arguments: str, folder: Path, threads: int) -> None:
    """Train in a process of its own."""
    environment = {
        **os.environ,
        "PYTHONPATH": f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}",
        "OMP_NUM_THREADS": str(threads),
        "GLOO_SOCKET_IFNAME": "lo",
        "MALLOC_MMAP_THRESHOLD_": "65536",  # what is freed is given back
        FOLDER: str(folder),
    }
    command = [sys.executable, "-m", "thanos_lightning", "fit", *arguments]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)


def main() -> None:
    """Measure, print, and write where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=[*DEFAULT, *WIDE], default=list(DEFAULT))
    parser.add_argument("--threads", type=int, default=1, help="torch threads of each rank")
    parser.add_argument("--output", type=Path, help="folder for a JSON file that is named after the hardware")
    arguments = parser.parse_args()
    table = Table("case", "what", "measured MiB", "planned MiB", "ratio", "minutes")
    rows: list[dict[str, Any]] = []
    for case in arguments.cases:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            options = list(DEFAULT[case]) if case in DEFAULT else wide(case, folder)
            options.append(f"--trainer.default_root_dir={folder}")
            outlook = Plan(PlannedCLI(options, for_another=False)).outlook()
            began = time.monotonic()
            fit(*options, "--trainer.callbacks+=planned_memory.Peaks", folder=folder, threads=arguments.threads)
            minutes = (time.monotonic() - began) / 60
            measured = [json.loads(file.read_text()) for file in folder.glob("?.json")]
        at_events = max(outlook.at_events) + outlook.estimated.states
        said = {"event": at_events, "training": outlook.in_training}
        for what, size in said.items():
            found = max(rank[what] for rank in measured)
            rows.append(
                {
                    "case": case,
                    "what": what,
                    "measured_mib": round(found, 1),
                    "planned_mib": round(size / 2**20, 1),
                    "ratio": round(size / 2**20 / found, 3),
                    "minutes": round(minutes, 1),
                }
            )
            table.add_row(*map(str, rows[-1].values()))
    Console(width=100).print(table)
    if arguments.output is not None:
        torch.set_num_threads(arguments.threads)  # of each rank
        print(keep("planned memory", arguments.output, {"results": rows}))


if __name__ == "__main__":
    main()
