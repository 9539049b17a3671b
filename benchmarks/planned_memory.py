"""What `thanos-lightning plan` says of memory, beside what trainings of SmolLM2-135M take: one device, and ZeRO-3.

    python benchmarks/planned_memory.py
    python benchmarks/planned_memory.py --output benchmarks/results

Linux only: measured is the kernel's peak of a process's resident memory, less what it held before it had a model, on
the rank that took most. Batches are of 16 tokens, since a plan leaves activations out. Each training prunes to 2:4
before its first step.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from machine import keep
from rich.console import Console
from rich.table import Table

from thanos_lightning.cli.planned import Plan, PlannedCLI

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
FOLDER = "PLANNED_MEMORY"  # an environment variable
COMMON = [
    *("--trainer.max_steps", "4", "--trainer.limit_val_batches", "0"),
    *(
        "--trainer.precision",
        "32-true",
        "--trainer.callbacks.0.monitor",
        "null",
        "--trainer.callbacks.0.reorder",
        "false",
    ),
    *("--data.block_size", "16", "--data.batch_size", "1", "--data.calibration_tokens", "256"),
    *("--trainer.callbacks.0.solver.admm_steps", "1", "--trainer.callbacks.0.solver.refine_steps", "1"),
]
ZERO3 = [
    *("--trainer.strategy", "thanos_lightning.CPUDeepSpeed", "--trainer.strategy.stage", "3", "--trainer.devices", "2"),
    *("--trainer.strategy.reduce_bucket_size", "5000000", "--trainer.accelerator", "cpu"),  # else it is mostly buckets
]
CASES = {"one device": [], "ZeRO-3, two ranks": ZERO3}


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
        CLEAR.write_text("5")

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


def fit(*arguments: str, folder: Path) -> None:
    """Train in a process of its own."""
    environment = {
        **os.environ,
        "PYTHONPATH": f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "MALLOC_MMAP_THRESHOLD_": "65536",  # what is freed is given back
        FOLDER: str(folder),
    }
    command = [sys.executable, "-m", "thanos_lightning", "fit", *arguments]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)


def main() -> None:
    """Measure, print, and write where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--output", type=Path, help="folder for a JSON file that is named after the hardware")
    arguments = parser.parse_args()
    table = Table("case", "what", "measured MiB", "planned MiB", "ratio")
    rows: list[dict[str, Any]] = []
    for case in arguments.cases:
        options = ["--config", "quickstart", *COMMON, *CASES[case]]
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            options.append(f"--trainer.default_root_dir={folder}")
            outlook = Plan(PlannedCLI(options, for_another=False)).outlook()
            fit(*options, "--trainer.callbacks+=planned_memory.Peaks", folder=folder)
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
                }
            )
            table.add_row(*map(str, rows[-1].values()))
    Console(width=100).print(table)
    if arguments.output is not None:
        torch.set_num_threads(1)  # of each rank
        print(keep("planned memory", arguments.output, {"results": rows}))


if __name__ == "__main__":
    main()
