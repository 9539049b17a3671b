"""Time and reconstruction error of the solver on one 2048x2048 layer, beside what it replaces.

    python benchmarks/solver.py
    python benchmarks/solver.py --size 512 --threads 1 --output benchmarks/results

"naive" is the algorithm as the paper prints it and its authors run it: every block of columns inverts the Hessian of
what is left, and rows of that inverse are gathered for every row of the weight; the systems are solved as one padded
batch. It is vectorised and in float32 like the rest, and gets the memory it needs in chunks.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from machine import hardware, keep
from rich.console import Console
from rich.table import Table
from torch import Tensor

from thanos_lightning.solver import NM, HessianAccumulator, Pattern, Unstructured, prune

DAMPING, BLOCK = 0.01, 128
GATHER_BYTES = 512 * 2**20


def correlated_layer(size: int) -> tuple[Tensor, Tensor]:
    """A weight, and the Hessian of inputs with a spectrum of 1/k and, as in language models, a few large channels."""
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(size, size)).Q
    spectrum = torch.arange(1, size + 1).float().rsqrt()
    channels = torch.ones(size)
    channels[torch.randperm(size)[: size // 100]] = 8.0
    accumulator = HessianAccumulator(size)
    for _ in range(8):
        accumulator.update((torch.randn(2 * size, size) * spectrum) @ basis.T * channels)
    return torch.randn(size, size) * 0.02, accumulator.compute()


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


def relative_loss(pruned: Tensor, weight: Tensor, hessian: Tensor) -> float:
    """tr(ΔW H ΔWᵀ) / tr(W H Wᵀ)."""
    change = pruned - weight
    return float(((change @ hessian) * change).sum() / ((weight @ hessian) * weight).sum())


def best_seconds(run: Callable[[], Tensor], repeats: int) -> tuple[float, Tensor]:
    """The shortest of several runs, and the last result."""
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        result = run()
        best = min(best, time.perf_counter() - started)
    return best, result


def measure(size: int, repeats: int) -> list[dict[str, str | float]]:
    """All methods on one layer, in one process."""
    weight, hessian = correlated_layer(size)
    results: list[dict[str, str | float]] = []
    for pattern in (Unstructured(0.5), NM(2, 4)):
        contestants: dict[str, Callable[[], Tensor]] = {
            "thanos": lambda p=pattern: prune(weight, hessian, p, block_size=BLOCK).weight,
            "thanos, refine_steps=10": lambda p=pattern: (
                prune(weight, hessian, p, block_size=BLOCK, refine_steps=10).weight
            ),
            "sparsegpt": lambda p=pattern: prune(weight, hessian, p, block_size=BLOCK, method="sparsegpt").weight,
            "sparsegpt, refine_steps=10": lambda p=pattern: (
                prune(weight, hessian, p, block_size=BLOCK, method="sparsegpt", refine_steps=10).weight
            ),
            "wanda": lambda p=pattern: prune(weight, hessian, p, method="wanda").weight,
            "naive": lambda p=pattern: naive(weight, hessian, p)[0],
        }
        for name, run in contestants.items():
            seconds, pruned = best_seconds(run, 1 if name == "naive" else repeats)
            results.append(
                {
                    "pattern": pattern.name,
                    "method": name,
                    "seconds": round(seconds, 3),
                    "relative_loss": round(relative_loss(pruned, weight, hessian), 6),
                    "zeros": round(float((pruned == 0).float().mean()), 6),
                }
            )
    return results


def main() -> None:
    """Measure, print, and write where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=2048, help="rows and columns of the layer")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--repeats", type=int, default=5, help="best of so many runs (the naive one runs once)")
    parser.add_argument("--output", type=Path, help="folder for a JSON file that is named after the hardware")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    results = measure(arguments.size, arguments.repeats)
    machine = hardware()
    table = Table(title=f"{arguments.size}x{arguments.size}, block size {BLOCK}, {machine}")
    for column in ("pattern", "method", "seconds", "relative loss", "zeros"):
        table.add_column(column, justify="left" if column in ("pattern", "method") else "right")
    for row in results:
        table.add_row(*(str(value) for value in row.values()))
    Console(width=120).print(table)
    if arguments.output is not None:
        print(keep("solver", arguments.output, {"size": arguments.size, "block_size": BLOCK, "results": results}))


if __name__ == "__main__":
    main()
