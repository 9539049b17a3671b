"""Memory and time of a step that trains all weights of a pruned model, LoRA adapters that keep zeros, or norms alone.

    python benchmarks/adapters.py
    python benchmarks/adapters.py --layers 6 --output benchmarks/results

A Llama with SmolLM2-135M's shapes is pruned to 2:4 before the first step, and trained on batches of 512 tokens with
AdamW. Memory is the peak of a process of its own in the steps after the first ones, less what the process has without a
model; on a GPU it is what torch has allocated. Seconds are medians. Linux only.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from compiled import Clock
from enforcement import Model
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from machine import add_device, keep
from memory import CLEAR, kibibytes
from rich.console import Console
from rich.table import Table

from thanos_lightning import SolverOptions, SparsitySchedule, ThanosPruningCallback
from thanos_lightning.lm.causal_lm import add_lora

WARM, STEPS = 3, 8
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
WAYS = ("all weights", "LoRA", "norms alone")


class Peak(Callback):
    """The memory of the steps after the first ones."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.before = kibibytes("VmRSS")
        self.mib = 0.0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Begin to count after the first steps, and read at the end."""
        if trainer.global_step == WARM:
            CLEAR.write_text("5")  # the peak starts anew
            if self.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
        if trainer.global_step == WARM + STEPS:
            of_process = 2**10 * (kibibytes("VmHWM") - self.before)
            self.mib = (torch.cuda.max_memory_allocated() if self.device == "cuda" else of_process) / 2**20


class Trained(Model):
    """A model of which only some weights are trained."""

    def __init__(self, layers: int, vocabulary: int, way: str) -> None:
        super().__init__(layers, vocabulary)
        if way == "LoRA":
            add_lora(self.model, LORA)
        for name, parameter in self.named_parameters():
            if way == "norms alone":
                parameter.requires_grad_("norm" in name)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW of what is trained."""
        return torch.optim.AdamW([one for one in self.parameters() if one.requires_grad], lr=1e-4)


def train(way: str, device: str, layers: int, vocabulary: int) -> dict[str, float]:
    """Return what one way takes."""
    peak = Peak(device)
    seed_everything(0, verbose=False)
    module, clock = Trained(layers, vocabulary, way), Clock(device)
    # by magnitude, since the event is not what is measured
    once = SparsitySchedule(at=[0])
    pruning = ThanosPruningCallback("2:4", schedule=once, solver=SolverOptions.as_published("magnitude"))
    trainer = Trainer(
        accelerator=device,
        devices=1,
        precision="bf16-mixed" if device == "cuda" else "32-true",
        max_steps=WARM + STEPS,
        callbacks=[clock, pruning, peak],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    sequences = torch.randint(vocabulary, (4 * trainer.max_steps, 128))
    trainer.fit(module, torch.utils.data.DataLoader(sequences, batch_size=4))
    trained = sum(one.numel() for one in module.parameters() if one.requires_grad)
    return {"trained": trained, "mib": round(peak.mib), "seconds": statistics.median(clock.steps[WARM:])}


def main() -> None:
    """Measure each way in a process of its own, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_device(parser)
    parser.add_argument("--layers", type=int, default=30, help="decoder layers (30)")
    parser.add_argument("--vocabulary", type=int, default=49152, help="tokens (49,152)")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (2)")
    parser.add_argument("--output", type=Path, help="folder to keep the result in")
    parser.add_argument("--way", choices=WAYS, help="measure this one alone, and print JSON")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.way is not None:
        print(json.dumps(train(given.way, given.device, given.layers, given.vocabulary)))
        return
    found = {}
    table = Table("trained", "weights in M", "MiB", "seconds a step")
    for way in WAYS:
        ended = subprocess.run([sys.executable, *sys.argv, "--way", way], check=True, stdout=subprocess.PIPE, text=True)
        one = found[way] = json.loads(ended.stdout.splitlines()[-1])
        table.add_row(way, f"{one['trained'] / 1e6:.2f}", f"{one['mib']:,.0f}", f"{one['seconds']:.2f}")
    Console().print(table)
    if given.output is not None:
        settings = {name: getattr(given, name) for name in ("layers", "vocabulary", "threads")}
        print(keep("adapters", given.output, {**settings, "results": found}, given.device))


if __name__ == "__main__":
    main()
