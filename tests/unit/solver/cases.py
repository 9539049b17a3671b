"""Layers that several solver tests draw from."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from thanos_lightning.solver import NM, Channels, Pattern, Structured, Unstructured

METHODS = ("thanos", "sparsegpt", "wanda", "magnitude")
PATTERNS: tuple[Pattern, ...] = (
    Unstructured(0.5),
    NM(2, 4),
    NM(1, 4, outlier_fraction=0.2),
    Structured(0.3),
    Structured(0.25, outlier_fraction=0.2),
    Channels(0.3),
)


def tokens(cols: int, seed: int = 0, count: int = 256) -> Tensor:
    """Correlated inputs of very different scales, float64."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(cols, cols, generator=generator, dtype=torch.float64)
    scales = torch.logspace(0, -1.5, cols, dtype=torch.float64)[torch.randperm(cols, generator=generator)]
    return (
        torch.randn(count, cols, generator=generator, dtype=torch.float64) @ (mixing * 0.3 + torch.eye(cols)) * scales
    )


def hessian_of(inputs: Tensor) -> Tensor:
    return 2 / len(inputs) * inputs.T @ inputs


def layer(rows: int, cols: int, seed: int = 0, dead: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
    """A float32 weight and a float64 Hessian, of inputs of which some are always 0."""
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed + 1))
    inputs = tokens(cols, seed)
    inputs[:, list(dead)] = 0
    return weight, hessian_of(inputs)


@contextmanager
def other_defaults() -> Iterator[None]:
    """What a tensor is that says nothing of itself: in bfloat16, and on a device without memory."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def training_precision() -> Iterator[None]:
    """What a training may let torch round. At the end it still does."""
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            yield
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
