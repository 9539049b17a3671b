import itertools

import pytest
import torch
from cases import METHODS, PATTERNS, hessian_of, layer, tokens
from reference import admm, damped, optimum

from thanos_lightning.solver import NM, FactorizationError, Structured, Unstructured, prune
from thanos_lightning.solver.admm import alternate, penalties, weight_costs
from thanos_lightning.solver.linalg import curvature
from thanos_lightning.solver.refine import residual_of


def shared_by(H, steps, damping=0.01):
    return penalties(H, weight_costs(H, curvature(H, damping).factor, damping), damping, steps)


def improved(weight, original, H, keep, pattern, steps, frozen=None):
    residual, _ = residual_of(weight, original, H)
    frozen = torch.zeros_like(keep) if frozen is None else frozen
    return alternate(weight, original, residual, keep, frozen, pattern, shared_by(H, steps))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("method", METHODS)
def test_it_helps_each_method(method, pattern):
    weight, H = layer(20, 40)
    results = [prune(weight, H, pattern, method=method, block_size=8, admm_steps=steps) for steps in (0, 4, 16)]
    losses = [result.loss for result in results]
    assert max(losses[1:]) < 0.99 * losses[0]
    for result in results:
        assert not result.weight[~result.mask].any()
        assert pattern.violations(result.mask) == 0
        assert torch.equal(result.mask.sum(1), results[0].mask.sum(1))


@pytest.mark.parametrize("method", ["thanos", "wanda"])
@pytest.mark.parametrize("pattern", [NM(2, 4), NM(4, 8), Unstructured(0.5), Unstructured(0.7)])
def test_more_steps_are_better_on_average(pattern, method):
    layers = [layer(48, 256, seed) for seed in range(2)]
    losses = [
        sum(
            prune(weight, H, pattern, method=method, admm_steps=n, refine_steps=2).relative_loss for weight, H in layers
        )
        for n in (0, 4, 12)
    ]
    assert losses[1] < 0.8 * losses[0]
    assert losses[2] < 0.95 * losses[1]


def test_structured_patterns_take_conjugate_gradient_steps_instead():
    weight, H = layer(20, 40)
    result = prune(weight, H, Structured(0.3, 0.2), admm_steps=3, refine_steps=2)
    refined = prune(weight, H, Structured(0.3, 0.2), refine_steps=5)
    assert torch.equal(result.weight, refined.weight)


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 3), NM(3, 36), Unstructured(0.4)])
@pytest.mark.parametrize("steps", [1, 2, 6, 7, 20])
def test_the_steps_are_the_textbook_s(steps, pattern):
    weight, H = layer(9, 36, seed=steps)
    weight = weight.double()
    start = prune(weight, H, pattern, block_size=12)
    frozen = ~start.mask & (torch.rand(9, 36, generator=torch.Generator().manual_seed(0)) < 0.3)
    shared = shared_by(H, steps)
    expected, mask = admm(start.weight, weight, H, start.mask, frozen, pattern.group_width(36), shared.rho, shared.cost)
    W, keep = improved(start.weight, weight, H, start.mask, pattern, steps, frozen)
    # Between the ends M is interpolated, and not that of its penalty
    assert (keep == mask).double().mean() >= (1.0 if shared.last is None else 0.98)
    if torch.equal(keep, mask):
        torch.testing.assert_close(W, expected, rtol=1e-9 if shared.last is None else 0.02, atol=1e-9)


def test_the_penalty_grows_by_seven_in_a_hundred_up_to_its_last_value():
    _, H = layer(1, 24)
    ratios = {steps: torch.tensor(shared_by(H, steps).rho) for steps in (1, 2, 6, 7, 12, 40)}
    assert len({round(float(rho[-1]), 9) for rho in ratios.values()}) == 1
    assert all(len(rho) == steps for steps, rho in ratios.items())
    for steps in (2, 6, 7, 12):
        torch.testing.assert_close(ratios[steps][1:] / ratios[steps][:-1], torch.full((steps - 1,), 1.07))
    # more steps don't begin ever lower
    assert float(ratios[40][0] / ratios[40][-1]) == pytest.approx(0.35 / 1.1)


@pytest.mark.parametrize("steps", [1, 6, 7, 30])
def test_m_is_that_of_the_damped_hessian(steps):
    inputs = tokens(24)
    inputs[:, 5] = 0
    H = hessian_of(inputs)
    shared = shared_by(H, steps, damping=0.05)
    D = damped(H, 0.05)
    torch.testing.assert_close(shared.cost, (D.diagonal() / torch.linalg.inv(D).diagonal()).sqrt())
    assert shared.dead.nonzero().tolist() == [[5]]
    assert (shared.last is None) == (steps <= 6)
    ends = (shared.rho[0], shared.rho[-1]) if steps > 6 else [(shared.rho[0] * shared.rho[-1]) ** 0.5] * 2
    room = torch.empty_like(H)
    for rho, end in zip((shared.rho[0], shared.rho[-1]), ends, strict=True):
        C = torch.diag(end * shared.cost)
        torch.testing.assert_close(shared.towards_last(rho, room), C @ torch.linalg.inv(D + C))


def test_its_scale_changes_nothing():
    weight, H = layer(8, 24)
    results = [prune(weight.double(), H * factor, NM(2, 4), admm_steps=9) for factor in (1, 2.0**40, 2.0**-40)]
    for result in results[1:]:
        assert torch.equal(result.mask, results[0].mask)
        torch.testing.assert_close(result.weight, results[0].weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_after_rounding_it_is_not_worse_than_the_method(dtype):
    weight, H = layer(32, 64)
    losses = [prune(weight.to(dtype), H.float(), NM(2, 4), block_size=8, admm_steps=n).loss for n in (0, 1, 4, 100)]
    assert all(loss <= losses[0] for loss in losses)
    assert max(losses[2:]) < losses[0]


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5)])
def test_frozen_weights_stay_pruned(pattern):
    weight, H = layer(12, 32)
    frozen = torch.rand(12, 32, generator=torch.Generator().manual_seed(3)) < 0.3
    start, result = (prune(weight, H, pattern, frozen=frozen, admm_steps=steps) for steps in (0, 12))
    assert not result.mask[frozen].any()
    assert result.loss < start.loss
    assert not torch.equal(result.mask, start.mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("steps", [4, 8, 20])
def test_uncorrelated_inputs_end_with_hardly_less_than_the_best_mask(dtype, steps):
    """There the loss of a weight is W² H_jj, whatever the others do, and the best of each group are known."""
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    diagonal = (torch.rand(64, generator=torch.Generator().manual_seed(1)) + 0.1).to(dtype)
    scores = weight.square() * diagonal
    lowest = scores.view(6, -1, 4).argsort(dim=2).argsort(dim=2).view(6, 64) < 2
    for start in (lowest, ~lowest):
        _, keep = improved(weight * start, weight, torch.diag(diagonal), start, NM(2, 4), steps)
        assert (scores * ~keep).sum() <= 1.01 * (scores * lowest).sum()
        assert (scores * lowest).sum() < 0.2 * scores.sum()


def test_weights_are_the_best_for_the_mask_after_refinement():
    weight, H = layer(6, 16)
    result = prune(weight.double(), H, Unstructured(0.5), admm_steps=8, refine_steps=100)
    torch.testing.assert_close(result.weight, optimum(weight, H, result.mask))


def test_rows_that_it_makes_worse_are_refined_from_where_the_method_left_them(monkeypatch):
    weight, H = layer(6, 24)

    def spoil(weight, original, residual, keep, frozen, pattern, shared):
        W, mask = alternate(weight, original, residual, keep, frozen, pattern, shared)
        W[2], W[4] = 50.0 * mask[2], torch.nan
        return W, mask

    whole = prune(weight, H, NM(2, 4), admm_steps=8, refine_steps=3)
    refined = prune(weight, H, NM(2, 4), refine_steps=3)
    monkeypatch.setattr("thanos_lightning.solver.layer.alternate", spoil)
    result = prune(weight, H, NM(2, 4), admm_steps=8, refine_steps=3)
    for row in range(6):
        expected = refined if row in (2, 4) else whole
        torch.testing.assert_close(result.weight[row], expected.weight[row])
        assert torch.equal(result.mask[row], expected.mask[row])
    assert result.loss < refined.loss


def test_refinement_after_it_never_raises_the_loss():
    weight, H = layer(16, 32)
    losses = [prune(weight, H, NM(2, 4), admm_steps=6, refine_steps=steps).loss for steps in (0, 1, 2, 8)]
    assert all(later <= earlier for earlier, later in itertools.pairwise(losses))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_a_singular_hessian_and_dead_inputs(method, dtype):
    inputs = tokens(32, count=8)
    dead = [3, 20, *range(24, 32)]
    inputs[:, dead] = 0
    weight = torch.randn(9, 32, generator=torch.Generator().manual_seed(0))
    H = 1e-6 * hessian_of(inputs).to(dtype)
    for pattern in (NM(2, 4), Unstructured(0.6)):
        start, result = (prune(weight, H, pattern, method=method, admm_steps=steps) for steps in (0, 9))
        assert torch.isfinite(result.weight).all()
        assert result.loss <= start.loss
        changed = (result.mask != start.mask).any(1)
        assert changed.any()
        assert not result.weight[changed][:, dead].any()


def test_what_is_no_second_moment_is_an_error():
    weight, H = layer(4, 8)
    H[0, 1] = H[1, 0] = 10 * H.diagonal().max()
    with pytest.raises(FactorizationError, match="not positive definite"):
        prune(weight, H, NM(2, 4), method="magnitude", admm_steps=1)
    with pytest.raises(FactorizationError, match="far below zero"):
        penalties(H, H.diagonal(), 0.01, 1)
