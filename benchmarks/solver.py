"""Time and reconstruction error of the solver on layers of several shapes, beside what it replaces.

    python benchmarks/solver.py
    python benchmarks/solver.py --shapes 512x512 --threads 1 --output benchmarks/results

"naive" is the algorithm as the paper prints it and its authors run it: every block of columns inverts the Hessian of
what is left, and rows of that inverse are gathered for every row of the weight; the systems are solved as one padded
batch. It is vectorised and in float32 like the rest, and gets the memory it needs in chunks. It runs once, and only on
layers of up to 2048 columns.

"column loop" is SparseGPT as its paper prints it, a column at a time in eager torch. "sparsegpt" is this package's,
which has the columns in rows and shares the factorisation with Thanos; it also computes the losses that it returns, as
all methods of the package do.

"floor" is the time of 4b³/3 + c·b² + p³·c·b·B²/3 FLOPs at the rate of a large float32 product on this machine: factor
the Hessian of b columns, update c rows once, and solve the systems of blocks of B columns of which the fraction p goes.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from machine import add_device, hardware, keep
from rich.console import Console
from rich.table import Table
from torch import Tensor

from thanos_lightning.report.stopwatch import finish
from thanos_lightning.solver import NM, HessianAccumulator, Pattern, Unstructured, prune

DAMPING, BLOCK = 0.01, 128
GATHER_BYTES = 512 * 2**20
NAIVE_COLUMNS = 2048
METHODS: dict[str, dict[str, Any]] = {
    "thanos": {},
    "thanos, admm_steps=8": {"saliency": "balanced", "admm_steps": 8},
    "thanos, refine_steps=10": {"refine_steps": 10},
    "sparsegpt": {"method": "sparsegpt"},
    "sparsegpt, refine_steps=10": {"method": "sparsegpt", "refine_steps": 10},
    "wanda": {"method": "wanda"},
}


def correlated_layer(rows: int, size: int) -> tuple[Tensor, Tensor]:
    """A weight, and the Hessian of inputs with a spectrum of 1/k and, as in language models, a few large channels."""
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(size, size)).Q
    spectrum = torch.arange(1, size + 1).float().rsqrt()
    channels = torch.ones(size)
    channels[torch.randperm(size)[: size // 100]] = 8.0
    accumulator = HessianAccumulator(size)
    for _ in range(8):
        accumulator.update((torch.randn(2 * size, size) * spectrum) @ basis.T * channels)
    return torch.randn(rows, size) * 0.02, accumulator.compute()


def naive(weight: Tensor, hessian: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Thanos with one inverse per block and one gathered piece of it per row. Returns weight and keep mask."""
    W, H = weight.clone(), hessian.clone()
    norms = H.diagonal().sqrt()
    H.diagonal().add_(DAMPING * H.diagonal().mean())
    pruned = torch.zeros_like(W, dtype=torch.bool)
    left = pattern.num_pruned(*W.shape)
    for start in range(0, W.shape[1], BLOCK):
        stop = min(start + BLOCK, W.shape[1])
        inverse = torch.linalg.inv(H[start:, start:])
        scores = W[:, start:].abs() * norms[start:]
        if isinstance(pattern, NM):
            groups = scores[:, : stop - start].unflatten(1, (-1, pattern.m))
            order = groups.argsort(dim=2)[..., : pattern.m - pattern.n]
            block = torch.zeros_like(groups, dtype=torch.bool).scatter_(2, order, True).flatten(1)
        else:
            everywhere = torch.zeros(scores.numel(), dtype=torch.bool)
            everywhere[scores.flatten().sort().indices[:left]] = True
            block = everywhere.view_as(scores)[:, : stop - start]
            left -= int(block.sum())
        pruned[:, start:stop] = block
        counts = block.sum(1)
        most = int(counts.max())
        columns = block.int().argsort(dim=1, descending=True, stable=True)[:, :most]
        padding = torch.arange(most) >= counts.unsqueeze(1)
        chunk = max(1, GATHER_BYTES // (4 * most * inverse.shape[1]))
        for first in range(0, len(W), chunk):
            rows = slice(first, first + chunk)
            index, pad = columns[rows], padding[rows]
            R = inverse[index].masked_fill_(pad.unsqueeze(2), 0)
            systems = R.gather(2, index.unsqueeze(1).expand(-1, most, -1)).masked_fill_(pad.unsqueeze(1), 0)
            systems.diagonal(dim1=1, dim2=2).masked_fill_(pad, 1)
            values = W[rows, start:].gather(1, index).masked_fill_(pad, 0)
            multipliers = torch.linalg.solve(systems.mT, values)
            W[rows, start:] -= (multipliers.unsqueeze(1) @ R).squeeze(1)
        W[:, start:stop].masked_fill_(block, 0)
    return W, ~pruned


def column_loop(weight: Tensor, hessian: Tensor, pattern: Pattern) -> Tensor:
    """SparseGPT, algorithm 1 of arXiv 2301.00774."""
    W, H = weight.clone(), hessian.clone()
    H.diagonal().add_(DAMPING * H.diagonal().mean())
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    for start in range(0, W.shape[1], BLOCK):
        stop = min(start + BLOCK, W.shape[1])
        block, U = W[:, start:stop].clone(), factor[start:stop, start:stop]
        scores = (block / U.diagonal()).square()
        errors, pruned = torch.zeros_like(block), torch.zeros_like(block, dtype=torch.bool)
        if not isinstance(pattern, NM):
            pruned = scores <= scores.flatten().sort().values[int(pattern.sparsity * scores.numel()) - 1]
        for column in range(stop - start):
            if isinstance(pattern, NM) and column % pattern.m == 0:
                group = slice(column, column + pattern.m)
                scores = (block[:, group] / U.diagonal()[group]).square()
                lowest = scores.topk(pattern.m - pattern.n, dim=1, largest=False).indices
                pruned[:, group] = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, lowest, True)
            error = torch.where(pruned[:, column], block[:, column], 0) / U[column, column]
            block[:, column:] -= error.unsqueeze(1) @ U[column, column:].unsqueeze(0)
            errors[:, column] = error
        W[:, start:stop] = block.masked_fill(pruned, 0)
        W[:, stop:] -= errors @ factor[start:stop, stop:]
    return W


def relative_loss(pruned: Tensor, weight: Tensor, hessian: Tensor) -> float:
    """tr(ΔW H ΔWᵀ) / tr(W H Wᵀ)."""
    change = pruned - weight
    return float(((change @ hessian) * change).sum() / ((weight @ hessian) * weight).sum())


def median_seconds(run: Callable[[], Tensor], repeats: int) -> tuple[float, Tensor]:
    """The median of several runs, and the last result."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        result = run()
        finish(result.device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds), result


def product_rate() -> float:
    """FLOPs a second of a 2048 x 2048 x 2048 product in float32."""
    left, right = torch.randn(2, 2048, 2048)
    return 2 * 2048**3 / median_seconds(lambda: left @ right, 9)[0]


def floor_seconds(rows: int, cols: int, rate: float) -> float:
    """See the module's docstring; both patterns remove half."""
    return (4 * cols**3 / 3 + rows * cols**2 + 0.5**3 * rows * cols * BLOCK**2 / 3) / rate


def measure(rows: int, cols: int, repeats: int, rate: float) -> list[dict[str, str | float]]:
    """All methods on one layer, in one process."""
    weight, hessian = correlated_layer(rows, cols)
    floor = floor_seconds(rows, cols, rate)
    results: list[dict[str, str | float]] = []
    for pattern in (Unstructured(0.5), NM(2, 4)):
        contestants: dict[str, Callable[[], Tensor]] = {
            name: partial(lambda p, options: prune(weight, hessian, p, **options).weight, pattern, options)
            for name, options in METHODS.items()
        }
        contestants["column loop"] = partial(column_loop, weight, hessian, pattern)
        if cols <= NAIVE_COLUMNS:
            contestants["naive"] = partial(lambda p: naive(weight, hessian, p)[0], pattern)
        measured = {name: median_seconds(run, 1 if name == "naive" else repeats) for name, run in contestants.items()}
        for name, (seconds, pruned) in measured.items():
            results.append(
                {
                    "layer": f"{rows}x{cols}",
                    "pattern": pattern.name,
                    "method": name,
                    "seconds": round(seconds, 4),
                    "of the floor": round(seconds / floor, 2),
                    **{
                        f"{other} / it": round(measured[other][0] / seconds, 2) if other in measured else None
                        for other in ("sparsegpt", "column loop", "naive")
                    },
                    "relative loss": round(relative_loss(pruned, weight, hessian), 6),
                    "zeros": round(float((pruned == 0).float().mean()), 6),
                }
            )
    return results


def main() -> None:
    """Measure, print, and write where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes", nargs="+", default=["2048x2048", "576x1536", "1536x576", "4096x4096"], help="rows x columns"
    )
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--repeats", type=int, default=5, help="median of so many runs (the naive one runs once)")
    parser.add_argument("--output", type=Path, help="folder for a JSON file that is named after the hardware")
    add_device(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_default_device(arguments.device)

    machine, rate, results = hardware(arguments.device), product_rate(), []
    for shape in arguments.shapes:
        rows, cols = map(int, shape.split("x"))
        measured = measure(rows, cols, arguments.repeats, rate)
        results += measured
        table = Table(title=f"{shape}, block size {BLOCK}, {rate / 1e9:.0f} GFLOP/s, {machine}")
        for column in measured[0]:
            table.add_column(column, justify="left" if column in ("layer", "pattern", "method") else "right")
        for row in measured:
            table.add_row(*(str(value) for value in row.values()))
        Console(width=160).print(table)
    if arguments.output is not None:
        document = {"block_size": BLOCK, "product_gflops": round(rate / 1e9, 1), "results": results}
        print(keep("solver", arguments.output, document, arguments.device))


if __name__ == "__main__":
    main()
