import itertools

import pytest
import torch
from cases import METHODS, PATTERNS, hessian_of, layer, tokens
from reference import optimum

from thanos_lightning.solver import NM, Unstructured, prune
from thanos_lightning.solver.exchange import exchange, exchange_cost, improve
from thanos_lightning.solver.linalg import curvature


def rounds(weight, H, pattern, number, **options):
    return prune(weight, H, pattern, block_size=8, refine_steps=5, exchange_rounds=number, **options)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("method", METHODS)
def test_each_round_helps_each_method(method, pattern):
    weight, H = layer(20, 40)
    results = [rounds(weight, H, pattern, number, method=method) for number in (0, 1, 2, 8)]
    assert all(later.loss <= earlier.loss for earlier, later in itertools.pairwise(results))
    for result in results:
        assert not result.weight[~result.mask].any()
        assert pattern.violations(result.mask) == 0
        assert torch.equal(result.mask.sum(1), results[0].mask.sum(1))
    if pattern in PATTERNS[:3]:
        assert results[-1].loss < 0.97 * results[0].loss
    else:  # structured: whole columns
        assert torch.equal(results[-1].mask, results[0].mask)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_after_rounding_it_is_not_worse_than_the_method(dtype):
    weight, H = layer(32, 64)
    losses = [rounds(weight.to(dtype), H.float(), NM(2, 4), number).loss for number in (1, 4)]
    assert max(losses) < prune(weight.to(dtype), H.float(), NM(2, 4), block_size=8).loss


def test_frozen_weights_stay_pruned():
    weight, H = layer(12, 32)
    frozen = torch.rand(12, 32, generator=torch.Generator().manual_seed(3)) < 0.3
    for pattern in (Unstructured(0.5), NM(2, 4)):
        result = rounds(weight, H, pattern, 4, frozen=frozen)
        assert not result.mask[frozen].any()
        assert rounds(weight, H, pattern, 0, frozen=frozen).loss > result.loss


def test_uncorrelated_inputs_end_with_the_best_mask():
    """There the loss of a weight is W² H_jj, whatever the others do, and the best of each group are known."""
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    diagonal = torch.rand(64, generator=torch.Generator().manual_seed(1)) + 0.1
    worst = (weight.square() * diagonal).view(6, -1, 4).argsort(dim=2).argsort(dim=2).view(6, 64) < 2
    H = torch.diag(diagonal)
    none = torch.zeros_like(worst)
    cost = exchange_cost(H, curvature(H, 0.0).factor)
    torch.testing.assert_close(cost, diagonal)
    W, keep = improve(weight * worst, weight, H, worst, none, NM(2, 4), cost, rounds=4, steps=1)
    assert torch.equal(keep, ~worst)
    torch.testing.assert_close(W, weight * keep)


def test_weights_are_the_best_for_the_mask_after_enough_steps():
    weight, H = layer(6, 16)
    result = prune(weight.double(), H, Unstructured(0.5), refine_steps=40, exchange_rounds=3)
    torch.testing.assert_close(result.weight, optimum(weight, H, result.mask))


def test_one_exchange_in_each_group_and_only_where_it_pays():
    W = torch.tensor([[1.0, 3.0, 0.0, 0.0, 5.0, 5.0, 0.0, 0.0]])
    R = torch.tensor([[0.0, 0.0, 2.0, 2.5, 0.0, 0.0, 2.0, 2.0]])
    keep = W != 0
    none, ones, one = torch.zeros_like(keep), torch.ones(8), torch.ones(1, 1)
    assert exchange(W, R, keep, none, ones, one, NM(2, 4)).int().tolist() == [[0, 1, 0, 1, 1, 1, 0, 0]]
    # gains fall and losses rise with c, and a dead input gains nothing
    assert torch.equal(exchange(W, R, keep, none, ones * 2, one * 2, NM(2, 4)), keep)
    dead = torch.tensor([1.0, 1.0, 1.0, 0.0] * 2)
    assert exchange(W, R, keep, none, dead, one, NM(2, 4)).int().tolist() == [[0, 1, 1, 0, 1, 1, 0, 0]]


@pytest.mark.parametrize("scattered", [False, True])
def test_columns_that_no_group_takes_wait_for_the_other_kind_of_groups(scattered):
    W, R = torch.zeros(1, 70), torch.ones(1, 70)
    W[0, :35] = 0.1
    keep = W != 0
    changed = exchange(
        W, R, keep, torch.zeros_like(keep), torch.ones(70), torch.ones(1, 1), Unstructured(0.5), scattered
    ) ^ keep  # fmt: skip
    assert changed.sum() > 0
    assert not (changed[0, :6] if scattered else changed[0, 64:]).any()


def test_a_singular_hessian_and_dead_inputs():
    inputs = tokens(32, count=8)
    inputs[:, [3, 20]] = 0
    weight = torch.randn(9, 32, generator=torch.Generator().manual_seed(0))
    for H in (hessian_of(inputs), hessian_of(inputs).float()):
        result = rounds(weight, H, NM(2, 4), 6)
        assert torch.isfinite(result.weight).all()
        assert result.loss <= rounds(weight, H, NM(2, 4), 0).loss
