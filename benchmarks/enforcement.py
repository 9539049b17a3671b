"""What enforcement and collection cost of a training step under DeepSpeed ZeRO 0 to 3.

    python benchmarks/enforcement.py
    python benchmarks/enforcement.py --stages 3 --layers 10 --output benchmarks/results

Two ranks with one thread each (on a GPU one) train a Llama with SmolLM2-135M's shapes in bf16, by default 512 tokens a
rank and step: few, since enforcement does not take longer where there are more, and the rest of the step does. First
come steps in which nothing is collected or masked, then steps that collect, then one event, then steps that enforce.
Collection is what a collecting step takes longer than the mean of the steps before and after it, less enforcement;
enforcement is timed in the step (masking gradients and masters). All are medians within one run.
"""

import argparse
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from machine import add_device, hardware, keep
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from thanos_lightning import CalibrationOptions, CPUDeepSpeed, SolverOptions, SparsitySchedule, ThanosPruningCallback
from thanos_lightning.report.stopwatch import finish

RANKS = {"cpu": 2, "cuda": 1}
SEQUENCES = 4


class Model(LightningModule):
    """A Llama with random weights, by default with the shapes of SmolLM2-135M."""

    def __init__(self, layers: int, vocabulary: int) -> None:
        super().__init__()
        self.model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocabulary,
                hidden_size=576,
                intermediate_size=1536,
                num_hidden_layers=layers,
                num_attention_heads=9,
                num_key_value_heads=3,
                tie_word_embeddings=True,
            )
        )

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """The loss of the model."""
        loss: Tensor = self.model(input_ids=batch, labels=batch, use_cache=False).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class Clock(Callback):
    """Times each step, and what of it is enforcement."""

    def __init__(self, pruning: ThanosPruningCallback, device: str) -> None:
        self.pruning, self.device = pruning, torch.device(device)
        self.steps: list[float] = []
        self.enforcing: list[float] = []
        self._inside = 0.0
        self._begin = 0.0

    def _timed(self, method: Callable[..., None]) -> Callable[..., None]:
        def timed(*args: Any) -> None:
            finish(self.device)
            begin = time.perf_counter()
            method(*args)
            finish(self.device)
            self._inside += time.perf_counter() - begin

        return timed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Begin a step; before the first, put the clock around the enforcer's methods."""
        if not self.steps:
            enforcer: Any = self.pruning._run.enforcer
            enforcer.enforce = self._timed(enforcer.enforce)
            enforcer.mask_gradients = self._timed(enforcer.mask_gradients)
        dist.barrier()
        finish(self.device)
        self._inside, self._begin = 0.0, time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """End a step; this callback comes before the one that prunes."""
        finish(self.device)
        self.steps.append(time.perf_counter() - self._begin)
        self.enforcing.append(self._inside)


def run_rank(stage: int, layers: int, vocabulary: int, steps: int, length: int, device: str, out: Path) -> None:
    """Train on this rank, and write what was measured."""
    torch.set_num_threads(1)
    rank = int(os.environ["LOCAL_RANK"])
    torch.manual_seed(0)
    # the first three are for warming up
    plain, collecting = 3 + steps, 3 + 2 * steps
    pruning = ThanosPruningCallback(
        "2:4",
        schedule=SparsitySchedule(collecting, collecting, 1),
        # the event is not what is timed; refinement still needs the statistics
        solver=SolverOptions.as_published("magnitude", refine_steps=1),
        calibration=CalibrationOptions(steps=steps, attention_mask_key=None),
        verify_every_n_steps=0,
    )
    clock, ranks = Clock(pruning, device), RANKS[device]
    trainer = Trainer(
        accelerator=device,
        devices=ranks,
        strategy=CPUDeepSpeed(stage=stage) if device == "cpu" else DeepSpeedStrategy(stage=stage),
        precision="bf16-mixed",
        max_steps=3 + 3 * steps,
        max_epochs=-1,
        callbacks=[clock, pruning],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
        default_root_dir=out,
    )
    sequences = torch.randint(vocabulary, (ranks * SEQUENCES * (3 + 3 * steps), length))
    trainer.fit(Model(layers, vocabulary), torch.utils.data.DataLoader(sequences, batch_size=SEQUENCES))
    median = statistics.median
    results = {
        "plain": median(clock.steps[3:plain]),
        "collecting": median(clock.steps[plain:collecting]),
        "masked": median(clock.steps[collecting:]),
        "enforcing": median(clock.enforcing[collecting:]),
    }
    (out / f"rank{rank}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


def measure(stage: int, layers: int, vocabulary: int, steps: int, length: int, device: str) -> dict[str, float]:
    """The slowest rank's seconds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(RANKS[device]):
            environment = {
                **os.environ,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "LOCAL_RANK": str(rank),
                "NODE_RANK": "0",
                "OMP_NUM_THREADS": "1",
                "GLOO_SOCKET_IFNAME": "lo",
            }
            command = [sys.executable, __file__, "--out", folder, "--stages", str(stage)]
            command += ["--layers", str(layers), "--vocabulary", str(vocabulary), "--steps", str(steps)]
            command += ["--length", str(length), "--device", device]
            processes.append(subprocess.Popen(command, env=environment))
        codes = [process.wait() for process in processes]
        if any(codes):
            raise SystemExit("a rank failed")
        ranks = [json.loads((Path(folder) / f"rank{rank}.json").read_text()) for rank in range(RANKS[device])]
    return {key: max(rank[key] for rank in ranks) for key in ranks[0]}


def _overhead(seconds: dict[str, float]) -> float:
    # both baselines: a process gets slower or faster while it runs
    baseline = (seconds["plain"] + seconds["masked"] - seconds["enforcing"]) / 2
    return seconds["collecting"] / baseline - 1


def main() -> None:
    """Measure, print, and write where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3], help="ZeRO stages")
    parser.add_argument("--layers", type=int, default=30, help="decoder layers; 30 are SmolLM2-135M's")
    parser.add_argument("--vocabulary", type=int, default=49152, help="of tokens; 49,152 are SmolLM2-135M's")
    parser.add_argument("--steps", type=int, default=7, help="of each kind")
    parser.add_argument(
        "--length", type=int, nargs="+", default=[128], help="tokens of a sequence; a step has 4 a rank"
    )
    parser.add_argument("--output", type=Path, help="folder for a JSON file that is named after the hardware")
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    add_device(parser)
    arguments = parser.parse_args()
    device = arguments.device
    if arguments.out is not None:
        model = arguments.layers, arguments.vocabulary
        run_rank(arguments.stages[0], *model, arguments.steps, arguments.length[0], device, arguments.out)
        return
    rows = []
    for stage, length in itertools.product(arguments.stages, arguments.length):
        seconds = measure(stage, arguments.layers, arguments.vocabulary, arguments.steps, length, device)
        rows.append(
            {
                "stage": stage,
                "tokens": SEQUENCES * length,
                **{key: round(value, 4) for key, value in seconds.items()},
                "enforcement_share": round(seconds["enforcing"] / seconds["masked"], 4),
                "collection_overhead": round(_overhead(seconds), 4),
            }
        )
    torch.set_num_threads(1)  # of each rank
    title = f"{RANKS[device]} ranks, {hardware(device)}, {arguments.layers} layers, bf16, median of {arguments.steps}"
    table = Table(title=title)
    for column in (
        "ZeRO stage",
        "tokens a rank",
        "plain step, s",
        "collecting, s",
        "masked, s",
        "enforcing, s",
        "enforcement",
        "collection",
    ):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            str(row["stage"]),
            f"{row['tokens']:,}",
            f"{row['plain']:.2f}",
            f"{row['collecting']:.2f}",
            f"{row['masked']:.2f}",
            f"{row['enforcing']:.3f}",
            f"{row['enforcement_share']:.1%}",
            f"+{row['collection_overhead']:.1%}",
        )
    Console(width=120).print(table)
    if arguments.output is not None:
        kept = {"layers": arguments.layers, "vocabulary": arguments.vocabulary, "results": rows}
        print(keep("enforcement", arguments.output, kept, device))


if __name__ == "__main__":
    main()
