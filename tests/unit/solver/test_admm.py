import pytest
import torch
from cases import METHODS, hessian_of, layer, tokens
from reference import admm, damped

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
    shared, D = shared_by(H, steps), damped(H, 0.01)
    cost = (D.diagonal() / torch.linalg.inv(D).diagonal()).sqrt()
    expected, mask = admm(start.weight, weight, H, start.mask, frozen, pattern.group_width(36), shared.rho, cost)
    W, keep = improved(start.weight, weight, H, start.mask, pattern, steps, frozen)
    # Between the ends M is interpolated, and not that of its penalty
    assert (keep == mask).double().mean() >= (1.0 if shared.last is None else 0.98)
    if torch.equal(keep, mask):
        torch.testing.assert_close(W, expected, rtol=1e-9 if shared.last is None else 0.02, atol=1e-9)


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
