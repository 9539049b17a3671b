"""Layers with near-singular and badly scaled Hessians, and Hessians of a given condition number."""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import pytest
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


def _low_rank(X: Tensor, rank: int, seed: int) -> Tensor:
    count, cols = X.shape
    exact = randn(count, rank, seed=seed) @ randn(rank, cols, seed=seed + 1000)
    return exact + 1e-6 * randn(count, cols, seed=seed + 3000)


def _scales(X: Tensor) -> Tensor:
    return torch.logspace(-6, 6, X.shape[1], dtype=torch.float64)


# What becomes of the inputs X (tokens, cols) of a layer
FAMILIES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "low rank and noise": lambda X, seed: _low_rank(X, X.shape[1] // 16, seed),
    "half rank and noise": lambda X, seed: _low_rank(X, X.shape[1] // 2, seed),
    "scales of 1e-6 to 1e6, shuffled": lambda X, seed: X * _scales(X)[_shuffled(X.shape[1], seed)],
    "scales of 1e-6 to 1e6, ascending": lambda X, _: X * _scales(X),
    "scales of 1e-6 to 1e6, descending": lambda X, _: X * _scales(X).flip(0),
    "all times 1e-6": lambda X, _: X * 1e-6,
    "all times 1e6": lambda X, _: X * 1e6,
    "each input twice, far apart": lambda X, _: X[:, : X.shape[1] // 2].repeat(1, 2),
    "each input twice, side by side": lambda X, _: X[:, ::2].repeat_interleave(2, dim=1),
    "one input, copied": lambda X, _: X[:, :1].expand_as(X),
    "a fifth dead": lambda X, seed: X.index_fill(1, _shuffled(X.shape[1], seed + 1)[: X.shape[1] // 5], 0),
    "four fifths dead": lambda X, seed: X.index_fill(1, _shuffled(X.shape[1], seed + 1)[: X.shape[1] * 4 // 5], 0),
    "a common mean of 100": lambda X, _: X + 100,
    "8 tokens": lambda X, _: X[:8],
}
WIDEST = "8 tokens for 2,000 inputs"
OTHERS: dict[str, Callable[[Tensor, int], Tensor]] = {
    WIDEST: lambda X, _: X[:8],
    "one input times 1e6": lambda X, _: X.index_copy(1, torch.tensor([7]), X[:, 7:8] * 1e6),
}


@cache
def layer(family: str, rows: int = ROWS, cols: int = COLS, seed: int = 0) -> Layer:
    if family == WIDEST:
        rows, cols = 32, 2000
    inputs = (FAMILIES | OTHERS)[family](tokens(512, cols, seed), seed)
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
        H, damping = (H + H.T) / 2, 0.0
    else:
        X = randn(int(kind.split()[0]), cols, seed=seed)
        H = 2 / len(X) * X.T @ X
        damping = float(torch.linalg.eigvalsh(H)[-1] / H.diagonal().mean()) / (condition - 1)
    D = H + damping * H.diagonal().mean() * torch.eye(cols, dtype=torch.float64)
    assert float(torch.linalg.cond(D)) == pytest.approx(condition, rel=1e-3)
    return H, damping


def energy(change: Tensor, inputs: Tensor) -> float:
    """The mean over tokens of ‖ΔW x‖², in float64 and from the tokens themselves."""
    return float((inputs.double() @ change.double().T).square().sum(1).mean())
