"""What the callback costs a training that is compiled, in its windows and between them.

    python benchmarks/compiled.py
    python benchmarks/compiled.py --device cuda --output benchmarks/results

A Llama with SmolLM2-135M's shapes is trained three times on the same batches of 512 tokens: in plain Python; with its
blocks compiled; and so with the callback, which collects in six steps in the middle and prunes after them. Printed are
median seconds of a step, and how many graphs were traced in all: with the callback as many as without.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from enforcement import Model
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from machine import add_device, keep
from torch._dynamo.utils import counters

from thanos_lightning import CalibrationOptions, SolverOptions, SparsitySchedule, ThanosPruningCallback
from thanos_lightning.report.stopwatch import finish

WARM, STEPS = 3, 6  # steps of each kind; the first three trace graphs


class Clock(Callback):
    """Times each step."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.steps: list[float] = []
        self._begin = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Begin a step."""
        finish(self.device)
        self._begin = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """End a step; this callback comes before the one that prunes."""
        finish(self.device)
        self.steps.append(time.perf_counter() - self._begin)


def train(device: str, layers: int, *, compiled: bool, prunes: bool) -> tuple[list[float], int]:
    """Return the seconds of each step, and how many graphs were traced."""
    torch._dynamo.reset()
    counters.clear()
    seed_everything(0, verbose=False)
    module, clock = Model(layers, vocabulary=4096), Clock(device)
    if compiled:
        for block in module.model.model.layers:
            block.compile()
    event = WARM + 2 * STEPS
    pruning = ThanosPruningCallback(
        "2:4",
        schedule=SparsitySchedule(at=[event]),
        # the event is not what is timed; refinement still needs the statistics
        solver=SolverOptions.as_published("magnitude", refine_steps=1),
        calibration=CalibrationOptions(steps=STEPS, attention_mask_key=None),
        verify_every_n_steps=0,
    )
    trainer = Trainer(
        accelerator=device,
        devices=1,
        precision="bf16-mixed" if device == "cuda" else "32-true",
        max_steps=WARM + 3 * STEPS,
        callbacks=[clock, *([pruning] if prunes else [])],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    sequences = torch.randint(4096, (4 * trainer.max_steps, 128))
    trainer.fit(module, torch.utils.data.DataLoader(sequences, batch_size=4))
    return clock.steps, counters["stats"]["unique_graphs"]


def main() -> None:
    """Train thrice, print and keep the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_device(parser)
    parser.add_argument("--layers", type=int, default=30, help="decoder layers (30)")
    parser.add_argument("--output", type=Path, help="folder to keep the result in")
    given = parser.parse_args()
    plain, _ = train(given.device, given.layers, compiled=False, prunes=False)
    without, graphs = train(given.device, given.layers, compiled=True, prunes=False)
    beside, graphs_beside = train(given.device, given.layers, compiled=True, prunes=True)
    before, inside = WARM + STEPS, WARM + 2 * STEPS
    found = {
        "not compiled": statistics.median(plain[WARM:]),
        "compiled": statistics.median(without[WARM:]),
        "compiled, before the window": statistics.median(beside[WARM:before]),
        "compiled, in the window": statistics.median(beside[before:inside]),
        "compiled, after the event": statistics.median(beside[inside:]),
    }
    result = {"seconds": found, "graphs": graphs, "graphs beside the callback": graphs_beside}
    print(json.dumps(result, indent=1))
    if given.output is not None:
        print(keep("compiled", given.output, {"layers": given.layers, **result}, given.device))


if __name__ == "__main__":
    main()
