import itertools

import pytest
import torch
from cases import METHODS, PATTERNS, hessian_of, layer, tokens
from reference import optimum

from thanos_lightning.solver import NM, Structured, Unstructured, prune, sweep


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("method", METHODS)
def test_each_sweep_helps_each_method(method, pattern, monkeypatch):
    monkeypatch.setattr(sweep, "_BLOCK", 16)
    weight, H = layer(20, 40)
    results = [prune(weight, H, pattern, method=method, block_size=8, sweeps=number) for number in (0, 1, 2, 6)]
    assert all(later.loss <= earlier.loss for earlier, later in itertools.pairwise(results))
    assert results[-1].loss < 0.98 * results[0].loss
    for result in results:
        assert not result.weight[~result.mask].any()
        assert pattern.violations(result.mask) == 0
        assert torch.equal(result.mask.sum(1), results[0].mask.sum(1))


def test_without_an_exchange_many_sweeps_reach_the_optimum_of_the_mask(monkeypatch):
    monkeypatch.setattr(sweep, "_BLOCK", 5)
    weight, H = layer(7, 24)
    result = prune(weight.double(), H, Structured(0.4, 0.2), sweeps=2000)
    torch.testing.assert_close(result.weight, optimum(weight, H, result.mask), rtol=1e-5, atol=1e-6)


def test_one_block_is_solved_at_once():
    """As wide as the layer, it leaves nothing to later sweeps but exchanges."""
    weight, H = layer(7, 24)
    result = prune(weight.double(), H, Structured(0.4), method="wanda", sweeps=1)
    best = prune(weight.double(), H, Structured(0.4), method="wanda", refine_steps=100)
    assert torch.equal(result.mask, best.mask)
    assert result.loss == pytest.approx(best.loss, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_after_rounding_it_is_not_worse_than_the_method(dtype):
    weight, H = layer(32, 64)
    losses = [prune(weight.to(dtype), H.float(), NM(2, 4), sweeps=number).loss for number in (0, 1, 30)]
    assert max(losses[1:]) < losses[0]


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5)])
def test_frozen_weights_stay_pruned(pattern):
    weight, H = layer(12, 32)
    frozen = torch.rand(12, 32, generator=torch.Generator().manual_seed(3)) < 0.3
    start, result = (prune(weight, H, pattern, frozen=frozen, sweeps=number) for number in (0, 4))
    assert not result.mask[frozen].any()
    assert result.loss < start.loss
    assert not torch.equal(result.mask, start.mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_singular_hessian_and_dead_inputs(dtype, monkeypatch):
    monkeypatch.setattr(sweep, "_BLOCK", 16)
    inputs = tokens(32, count=8)
    inputs[:, [3, 20, *range(24, 32)]] = 0
    weight = torch.randn(9, 32, generator=torch.Generator().manual_seed(0))
    H = hessian_of(inputs).to(dtype)
    for pattern in (NM(2, 4), Unstructured(0.6)):
        start, result = (prune(weight, H, pattern, sweeps=number) for number in (0, 5))
        assert torch.isfinite(result.weight).all()
        assert result.loss <= start.loss


def test_a_block_that_cannot_be_solved_stays_as_it_is():
    weight, H = layer(4, 8)
    H[0, 1] = H[1, 0] = 10 * H.diagonal().max()  # no second moment, and not positive definite
    keep = torch.ones(4, 8, dtype=torch.bool)
    W, mask = sweep.sweep(weight.double(), weight.double(), H, keep, ~keep, Unstructured(0.5), sweeps=2)
    assert torch.equal(W, weight.double())
    assert torch.equal(mask, keep)


def test_what_a_weight_costs_where_its_block_adapts():
    _, H = layer(1, 12)
    H[4] = H[:, 4] = 0
    A = sweep._pulled(H)
    assert torch.equal(A - torch.diag(A.diagonal()), H - torch.diag(H.diagonal()))
    torch.testing.assert_close(A.diagonal()[:4], H.diagonal()[:4] * 1.001)
    torch.testing.assert_close(sweep._cost(A).square(), A.diagonal() / torch.linalg.inv(A).diagonal())
