"""The solver on an accelerator: no tensor is left on the CPU, and the results are those of the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import METHODS, PATTERNS, layer
from pretend import DEVICE

from thanos_lightning.solver import Pattern, PrunedLayer
from thanos_lightning.solver.hessian import Factors
from thanos_lightning.solver.layer import SolverOptions, prune_layer

ROWS, COLS = 24, 40


@pytest.fixture
def deterministic() -> Iterator[None]:
    """A trainer may ask for such kernels."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("saliency", "steps"), [("obs", 0), ("balanced", 3)])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("with_frozen", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_a_layer_is_pruned_as_on_the_cpu(
    method: str, pattern: Pattern, with_frozen: bool, weighted: bool, saliency: str, steps: int, dtype: torch.dtype
) -> None:
    if method == "magnitude":
        steps = 0  # it takes none
    options = SolverOptions(method, 16, saliency=saliency, admm_steps=steps, refine_steps=steps)
    (weight, hessian), generator = layer(ROWS, COLS), torch.Generator().manual_seed(5)
    frozen = torch.rand(ROWS, COLS, generator=generator) < 0.1 if with_frozen else None
    output_weights = torch.rand(ROWS, generator=generator) + 0.1 if weighted else None

    def solve(device: torch.device | str) -> PrunedLayer:
        given = [weight.to(dtype), hessian.float(), frozen, output_weights]
        there: list[Any] = [None if one is None else one.to(device) for one in given]
        inputs = Factors(there[1]) if options.needs_statistics else None
        return prune_layer(there[0], inputs, pattern, options, there[2], there[3])

    cpu, there = solve("cpu"), solve(DEVICE)
    assert there.weight.device == there.mask.device == DEVICE
    assert torch.equal(there.mask.cpu(), cpu.mask)
    # steps of conjugate gradients grow what two orders of summing round
    rounding = 1e-3 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(there.weight.cpu(), cpu.weight, rtol=rounding, atol=rounding / 3)
    assert there.loss == pytest.approx(cpu.loss, rel=1e-4, nan_ok=True)
    assert there.relative_loss == pytest.approx(cpu.relative_loss, rel=1e-4, nan_ok=True)
