import itertools

import pytest
import torch
from cases import METHODS, PATTERNS, hessian_of, layer, tokens
from reference import optimum

from thanos_lightning.solver import NM, Unstructured, prune
from thanos_lightning.solver.refine import refine, residual_of, row_losses


def test_many_steps_reach_the_optimum_of_the_mask():
    weight, H = layer(6, 12)
    keep = prune(weight, H, Unstructured(0.5)).mask
    start = weight.double() * keep
    residual, _ = residual_of(start, weight.double(), H)
    refined = refine(start, residual, H, keep, steps=60)
    torch.testing.assert_close(refined, optimum(weight, H, keep))
    torch.testing.assert_close(residual, (weight.double() - refined) @ H)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("kind", "counts"), [("refine_steps", (0, 1, 3, 10, 100)), ("admm_steps", (0, 4, 16))])
def test_steps_help_each_method(kind, counts, method, pattern):
    weight, H = layer(20, 40)
    results = [prune(weight, H, pattern, method=method, block_size=8, **{kind: steps}) for steps in counts]
    losses = [result.loss for result in results]
    for result in results:
        assert not result.weight[~result.mask].any()
        assert pattern.violations(result.mask) == 0
        assert torch.equal(result.mask.sum(1), results[0].mask.sum(1))
        assert kind == "admm_steps" or torch.equal(result.mask, results[0].mask)
    assert max(losses[-2:]) < 0.99 * losses[0]
    assert kind == "admm_steps" or all(later <= earlier for earlier, later in itertools.pairwise(losses))


@pytest.mark.parametrize("kind", ["refine_steps", "admm_steps"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_loss_never_gets_worse_after_rounding(dtype, kind):
    weight, H = layer(32, 16)
    weight, H = weight.to(dtype), H.float()
    losses = [prune(weight, H, NM(2, 4), block_size=16, **{kind: steps}).loss for steps in (0, 1, 2, 5, 50, 500)]
    assert all(loss <= losses[0] for loss in losses)


def test_a_singular_hessian_and_converged_rows_give_no_nan():
    weight = torch.randn(5, 8)
    weight[2] = 0
    H = hessian_of(tokens(8, count=3))
    H[3] = H[:, 3] = 0
    pruned = prune(weight, H, Unstructured(0.3), refine_steps=50)
    change, dense = (pruned.weight - weight).double(), weight.double()
    assert ((change @ H) * change).sum() <= 1e-6 * ((dense @ H) * dense).sum()
    assert pruned.relative_loss < 1e-6


def test_a_dead_input_does_not_stop_the_others():
    inputs = tokens(8)
    inputs[:, 3] = 0
    weight, H = torch.randn(5, 8), hessian_of(inputs)
    start, refined = (prune(weight, H, Unstructured(0.5), method="wanda", refine_steps=steps) for steps in (0, 20))
    assert refined.loss < 0.9 * start.loss
    assert torch.equal(refined.weight[:, 3], start.weight[:, 3])


@pytest.mark.parametrize("value", [50.0, torch.nan])
def test_rows_that_got_worse_keep_what_they_had(value, monkeypatch):
    weight, H = layer(4, 8)
    start = prune(weight, H, NM(2, 4))

    def spoil(weight, residual, hessian, keep, steps):
        refined = refine(weight, residual, hessian, keep, steps)
        refined[1] = value * keep[1]
        return refined

    monkeypatch.setattr("thanos_lightning.solver.layer.refine", spoil)
    result = prune(weight, H, NM(2, 4), refine_steps=5)
    assert (result.weight == start.weight).all(1).tolist() == [False, True, False, False]
    assert result.loss < start.loss
    assert result.loss == pytest.approx(float(row_losses(result.weight, weight, H).sum()))
