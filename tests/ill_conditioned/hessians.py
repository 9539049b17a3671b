"""Layers with near-singular and badly scaled Hessians, and Hessians of a given condition number."""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from thanos_lightning.solver import NM, HessianAccumulator, Pattern, PrunedLayer, Structured, Unstructured, prune

ROWS, COLS = 48, 256
# One name for each pattern and block size; Thanos prunes structured patterns in one block, whatever is asked.
TASKS: dict[str, tuple[Pattern, int]] = {
    "unstructured-b128": (Unstructured(0.5), 128),
    "unstructured-b32": (Unstructured(0.5), 32),
    "2:4-b128": (NM(2, 4), 128),
    "2:4-b32": (NM(2, 4), 32),
    "structured": (Structured(0.3), 128),
}
FAMILIES = (
    "low rank and noise",
    "half rank and noise",
    "scales of 1e-6 to 1e6, shuffled",
    "scales of 1e-6 to 1e6, ascending",
    "scales of 1e-6 to 1e6, descending",
    "all times 1e-6",
    "all times 1e6",
    "each input twice, far apart",
    "each input twice, side by side",
    "one input, copied",
    "a fifth dead",
    "four fifths dead",
    "a common mean of 100",
    "8 tokens",
)
WIDEST = "8 tokens for 2,000 inputs"
# The kinds of spectrum that `conditioned` knows; of the first two the Hessian is regular without damping, too.
REGULAR = ("geometric", "two steps")
KINDS = (*REGULAR, "8 tokens", "64 tokens")


class Layer(NamedTuple):
    weight: Tensor
    inputs: Tensor  # (tokens, cols)
    hessian: Tensor  # as calibration gives it; all three are float32

    def in_float64(self) -> tuple[Tensor, Tensor]:
        inputs = self.inputs.double()
        return self.weight.double(), 2 / len(inputs) * inputs.T @ inputs


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(count: int, cols: int, seed: int) -> Tensor:
    """Correlated inputs whose scales differ by 30, as in tests/unit/solver/cases.py."""
    scales = torch.logspace(0, -1.5, cols, dtype=torch.float64)[_shuffled(cols, seed)]
    return randn(count, cols, seed=seed) @ (0.3 * randn(cols, cols, seed=seed + 1000) + torch.eye(cols)) * scales


def _shuffled(cols: int, seed: int) -> Tensor:
    return torch.randperm(cols, generator=torch.Generator().manual_seed(seed + 2000))


def _inputs(family: str, cols: int, seed: int) -> Tensor:
    X = tokens(512, cols, seed)
    scales = torch.logspace(-6, 6, cols, dtype=torch.float64)
    if family.endswith("rank and noise"):
        rank = cols // (16 if family.startswith("low") else 2)
        factors = randn(512, rank, seed=seed), randn(rank, cols, seed=seed + 1000)
        return factors[0] @ factors[1] + 1e-6 * randn(512, cols, seed=seed + 3000)
    if family.startswith("scales"):
        order = {"shuffled": _shuffled(cols, seed), "ascending": slice(None), "descending": torch.arange(cols).flip(0)}
        return X * scales[order[family.split()[-1]]]
    if family.startswith("all times"):
        return X * float(family.split()[-1])
    if family == "each input twice, far apart":
        X[:, cols // 2 :] = X[:, : cols // 2]
    elif family == "each input twice, side by side":
        X[:, 1::2] = X[:, ::2]
    elif family == "one input, copied":
        X[:] = X[:, :1]
    elif family.endswith("dead"):
        X[:, _shuffled(cols, seed + 1)[: cols * {"a": 1, "four": 4}[family.split()[0]] // 5]] = 0
    elif family == "one input times 1e6":
        X[:, 7] *= 1e6
    elif family == "a common mean of 100":
        X += 100
    else:
        return X[:8]
    return X


@cache
def layer(family: str, rows: int = ROWS, cols: int = COLS, seed: int = 0) -> Layer:
    if family == WIDEST:
        rows, cols = 32, 2000
    inputs = tokens(8, cols, seed) if family == WIDEST else _inputs(family, cols, seed)
    accumulator = HessianAccumulator(cols)
    accumulator.update(inputs.float())
    return Layer(randn(rows, cols, seed=seed + 9).float(), inputs.float(), accumulator.compute())


@cache
def thanos(family: str, task: str, refine_steps: int, admm_steps: int = 0, damping: float = 0.01) -> PrunedLayer:
    (weight, _, H), (pattern, block_size) = layer(family), TASKS[task]
    return prune(
        weight, H, pattern, block_size=block_size, admm_steps=admm_steps, refine_steps=refine_steps, damping=damping
    )


@cache
def conditioned(kind: str, condition: float, cols: int = COLS, seed: int = 0) -> tuple[Tensor, float]:
    """A float64 Hessian and a damping, such that the damped Hessian has this condition number."""
    if kind in REGULAR:
        basis = torch.linalg.qr(randn(cols, cols, seed=seed)).Q
        indices = torch.arange(cols, dtype=torch.float64)
        eigenvalues = condition ** (-indices / (cols - 1))
        if kind == "two steps":
            eigenvalues = torch.where(indices < cols // 4, 1.0, 1 / condition)
        H = basis * eigenvalues @ basis.T
        return (H + H.T) / 2, 0.0
    X = randn(int(kind.split()[0]), cols, seed=seed)
    H = 2 / len(X) * X.T @ X
    largest = float(torch.linalg.eigvalsh(H)[-1])
    return H, largest / float(H.diagonal().mean()) / (condition - 1)


def energy(change: Tensor, inputs: Tensor) -> float:
    """The mean over tokens of ‖ΔW x‖², in float64 and from the tokens themselves."""
    return float((inputs.double() @ change.double().T).square().sum(1).mean())
