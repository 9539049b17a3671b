"""Peak memory that pruning a layer takes beside the weight and the Hessian, against what `prune` documents.

    python benchmarks/memory.py
    python benchmarks/memory.py --shapes 1024x1024 --output benchmarks/results

Linux only: the peak is the kernel's count of this process's resident pages, each case in a process of its own.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from machine import hardware, keep
from rich.console import Console
from rich.table import Table

from thanos_lightning.solver import HessianAccumulator, parse_pattern, prune
from thanos_lightning.solver.layer import SolverOptions

CASES: dict[str, dict[str, Any]] = {
    "thanos": {},
    "thanos, refine_steps=10": {"refine_steps": 10},
    "thanos, admm_steps=4": {"saliency": "balanced", "admm_steps": 4},
    "thanos, admm_steps=8, refine_steps=2": {"saliency": "balanced", "admm_steps": 8, "refine_steps": 2},
    "sparsegpt": {"method": "sparsegpt"},
    "wanda": {"method": "wanda"},
    "magnitude": {"method": "magnitude"},
}
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def kibibytes(field: str) -> int:
    """A field of /proc/self/status, such as VmHWM, the peak of the resident set."""
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1])


def run(rows: int, cols: int, pattern: str, options: dict[str, Any], threads: int) -> float:
    """Bytes that one call takes at its peak, beside its arguments."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    prune(torch.randn(64, 64), torch.eye(64), parse_pattern("2:4"), **options)  # libraries and thread pools
    accumulator = HessianAccumulator(cols)
    scales = torch.rand(cols) + 0.1
    for _ in range(4):
        accumulator.update(torch.randn(cols, cols) * scales)
    hessian, weight = accumulator.compute(), torch.randn(rows, cols)
    del accumulator
    parsed = parse_pattern(pattern, 0.5)
    before = kibibytes("VmRSS")
    CLEAR.write_text("5")  # the peak starts anew
    pruned = prune(weight, hessian, parsed, **options)
    assert pruned.loss > 0
    return 1024.0 * (kibibytes("VmHWM") - before)


def main() -> None:
    """Measure, print, and write where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["2048x2048", "2048x4096", "4096x2048"], help="rows x columns")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--patterns", nargs="+", default=["unstructured", "2:4"])
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--output", type=Path, help="folder for a JSON file that is named after the hardware")
    parser.add_argument("--case", help=argparse.SUPPRESS)  # one case, in a process of its own
    arguments = parser.parse_args()
    if arguments.case is not None:
        print(run(**json.loads(arguments.case), threads=arguments.threads))
        return
    torch.set_num_threads(arguments.threads)
    table = Table("layer", "pattern", "case", "measured MiB", "documented MiB", "ratio", title=str(hardware()))
    results: list[dict[str, Any]] = []
    for shape in arguments.shapes:
        rows, cols = map(int, shape.split("x"))
        for pattern in arguments.patterns:
            for name in arguments.cases:
                case = {"rows": rows, "cols": cols, "pattern": pattern, "options": CASES[name]}
                command = [sys.executable, __file__, "--threads", str(arguments.threads), "--case", json.dumps(case)]
                measured = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout) / 2**20
                documented = SolverOptions.as_published(**CASES[name]).peak_bytes(rows, cols) / 2**20
                results.append(
                    {
                        "layer": shape,
                        "pattern": pattern,
                        "case": name,
                        "measured_mib": round(measured, 1),
                        "documented_mib": round(documented, 1),
                        "ratio": round(measured / documented, 3),
                    }
                )
                table.add_row(*(str(value) for value in results[-1].values()))
    Console(width=140).print(table)
    if arguments.output is not None:
        print(keep("memory", arguments.output, {"results": results}))


if __name__ == "__main__":
    main()
