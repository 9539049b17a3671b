"""How long an event takes on 1, 2 and 4 ranks, with one thread each, over gloo on one machine.

    python benchmarks/distributed_solve.py
    python benchmarks/distributed_solve.py --ranks 1 2 --blocks 4 --output benchmarks/results

A window is pruned to 2:4: the layers of some decoder blocks with SmolLM2-135M's shapes, of which each rank solves its
own. Each rank has its own statistics. Where there are more ranks than cores they share them: their time says nothing
about more cores, but the processor's time for which the busiest rank's thread solves does.
"""

import argparse
import ctypes
import gc
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from machine import keep
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from thanos_lightning.collect.collector import Moments
from thanos_lightning.enforcement import MaskEnforcer
from thanos_lightning.event.targets import Targets
from thanos_lightning.event.window import prune_window
from thanos_lightning.layers.targets import find_targets
from thanos_lightning.plan.schedule import Event
from thanos_lightning.plan.windows import Window
from thanos_lightning.ranks.access import ParameterAccess
from thanos_lightning.ranks.owners import assign_owners
from thanos_lightning.solver import NM, HessianAccumulator
from thanos_lightning.solver.layer import SolverOptions

OPTIONS = SolverOptions(saliency="wanda", admm_steps=0, refine_steps=10)
HIDDEN, INTERMEDIATE, KEYS = 576, 1536, 192
TOKENS = 4096


def layers_of(blocks: int) -> tuple[nn.ModuleDict, list[list[str]]]:
    """The layers, and which of them see the same inputs."""
    layers, sharing = {}, []
    for block in range(blocks):
        shapes = {
            "q": (HIDDEN, HIDDEN),
            "k": (HIDDEN, KEYS),
            "v": (HIDDEN, KEYS),
            "o": (HIDDEN, HIDDEN),
            "gate": (HIDDEN, INTERMEDIATE),
            "up": (HIDDEN, INTERMEDIATE),
            "down": (INTERMEDIATE, HIDDEN),
        }
        layers |= {f"{name}{block}": nn.Linear(*shape, bias=False) for name, shape in shapes.items()}
        sharing += [
            [f"{name}{block}" for name in names] for names in (["q", "k", "v"], ["o"], ["gate", "up"], ["down"])
        ]
    return nn.ModuleDict(layers), sharing


def peak_bytes() -> int:
    """The most memory that this process has held since it was last reset."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


class TimedAccess(ParameterAccess):
    """Knows how long the sums took, and how long this thread had the processor for it."""

    seconds = processor = 0.0

    def sum_on(self, owner: int, matrix: Tensor | None, width: int) -> Tensor | None:
        """See `ParameterAccess`."""
        begin, on_thread = time.perf_counter(), time.thread_time()
        total = super().sum_on(owner, matrix, width)
        self.seconds += time.perf_counter() - begin
        self.processor += time.thread_time() - on_thread
        return total


def run_rank(rank: int, ranks: int, blocks: int, repeats: int, out: Path) -> None:
    """Prune the window some times on this rank, and write what was measured."""
    torch.set_num_threads(1)
    if ranks > 1:
        dist.init_process_group("gloo", rank=rank, world_size=ranks)
    rows = []
    for repeat in range(repeats + 1):
        torch.manual_seed(0)
        model, sharing = layers_of(blocks)
        layers = find_targets(model)
        torch.manual_seed(1 + rank)
        accumulators: dict[str, HessianAccumulator] = {}
        for names in sharing:
            accumulator = HessianAccumulator(layers[names[0]].cols)
            accumulator.update(torch.randn(TOKENS // ranks, layers[names[0]].cols))
            accumulators |= dict.fromkeys(names, accumulator)
        access = TimedAccess(rank, ranks, torch.device("cpu"))
        window = Window(Event(1, 1.0), dict.fromkeys(layers, NM(2, 4)), 0, 1, is_last=True)
        enforcer = MaskEnforcer(layers, access)
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is free but still counted
        Path("/proc/self/clear_refs").write_text("5")  # the peak
        before = peak_bytes()
        if ranks > 1:
            dist.barrier()
        phases: dict[str, float] = {}
        begin, on_thread = time.perf_counter(), time.thread_time()
        prune_window(
            window,
            Targets(layers, window.patterns),
            Moments(assign_owners(layers, access.world_size), accumulators),
            enforcer,
            OPTIONS,
            now=lambda part, phases=phases: phases.update({part: time.thread_time()}),
        )
        if ranks > 1:
            dist.barrier()
        seconds = time.perf_counter() - begin
        if repeat:  # the first one is for warming up
            rows.append(
                {
                    "seconds": seconds,
                    "processor": phases["writing"] - on_thread - access.processor,
                    "reducing": access.seconds,
                    "peak_bytes": peak_bytes() - before,
                }
            )
    results = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    (out / f"rank{rank}.json").write_text(json.dumps(results))
    if ranks > 1:
        dist.barrier()
        dist.destroy_process_group()


def measure(ranks: int, blocks: int, repeats: int) -> list[dict[str, float]]:
    """What each of so many ranks measured."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            subprocess.Popen(
                [
                    *(sys.executable, __file__, "--rank", str(rank), "--ranks", str(ranks), "--out", folder),
                    *("--blocks", str(blocks), "--repeats", str(repeats)),
                ],
                env=environment,
            )
            for rank in range(ranks)
        ]
        codes = [process.wait() for process in processes]
        if any(codes):
            raise SystemExit("a rank failed")
        return [json.loads((Path(folder) / f"rank{rank}.json").read_text()) for rank in range(ranks)]


def main() -> None:
    """Measure, print, and write where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="numbers of ranks to compare")
    parser.add_argument("--blocks", type=int, default=8, help="decoder blocks in the window")
    parser.add_argument("--repeats", type=int, default=3, help="median of so many runs")
    parser.add_argument("--output", type=Path, help="folder for a JSON file that is named after the hardware")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        run_rank(arguments.rank, arguments.ranks[0], arguments.blocks, arguments.repeats, arguments.out)
        return
    cores, load = len(os.sched_getaffinity(0)), round(os.getloadavg()[0], 1)  # of other work, which takes seconds, too
    rows: list[dict[str, Any]] = []
    for ranks in arguments.ranks:
        measured = measure(ranks, arguments.blocks, arguments.repeats)
        most = {name: max(rank[name] for rank in measured) for name in measured[0]}
        rows.append(
            {
                "ranks": ranks,
                "shares_cores": ranks > cores,
                "seconds": round(most["seconds"], 3),
                "processor": round(most["processor"], 3),
                "reducing": round(most["reducing"], 3),
                "peak_mib": round(most["peak_bytes"] / 2**20, 1),
                "speed_up": round(rows[0]["seconds"] / most["seconds"] if rows else 1.0, 2),
            }
        )
    table = Table(
        title=f"2:4, one thread a rank, {cores} cores, {arguments.blocks} blocks, median of {arguments.repeats}"
    )
    for column in ("ranks", "seconds", "processor", "reducing", "speed-up", "peak MiB a rank"):
        table.add_column(column, justify="right")
    for row in rows:
        note = " (sharing cores)" if row["shares_cores"] else ""
        table.add_row(
            f"{row['ranks']}{note}",
            f"{row['seconds']:.2f}",
            f"{row['processor']:.2f}",
            f"{row['reducing']:.3f}",
            f"{row['speed_up']:.2f}",
            f"{row['peak_mib']:.0f}",
        )
    Console(width=120).print(table)
    if arguments.output is not None:
        print(keep("distributed solve", arguments.output, {"blocks": arguments.blocks, "load": load, "results": rows}))


if __name__ == "__main__":
    main()
