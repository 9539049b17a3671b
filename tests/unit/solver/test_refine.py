import itertools

import pytest
import torch
from cases import METHODS, PATTERNS, hessian_of, layer, tokens
from reference import optimum

from thanos_lightning.solver import NM, HessianAccumulator, Unstructured, prune
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
def test_each_step_helps_each_method(method, pattern):
    weight, H = layer(20, 16)
    masks, losses = [], []
    for steps in (0, 1, 3, 10, 100):
        pruned = prune(weight, H, pattern, method=method, block_size=4, refine_steps=steps)
        masks.append(pruned.mask)
        losses.append(pruned.loss)
        assert not pruned.weight[~pruned.mask].any()
    assert all(torch.equal(mask, masks[0]) for mask in masks)
    assert all(later <= earlier for earlier, later in itertools.pairwise(losses))
    assert losses[3] < 0.99 * losses[0]
    assert torch.isfinite(torch.tensor(losses)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_loss_never_gets_worse_after_rounding(dtype):
    weight, H = layer(32, 16)
    weight, H = weight.to(dtype), H.float()
    losses = [prune(weight, H, NM(2, 4), block_size=16, refine_steps=steps).loss for steps in (0, 1, 2, 5, 50, 500)]
    assert all(loss <= losses[0] for loss in losses)


def test_a_singular_hessian_and_converged_rows_give_no_nan():
    weight = torch.randn(5, 8)
    weight[2] = 0
    H = hessian_of(tokens(8, count=3))
    H[3] = H[:, 3] = 0
    pruned = prune(weight, H, Unstructured(0.3), refine_steps=50)
    assert torch.isfinite(pruned.weight).all()
    assert pruned.relative_loss < 1e-6
    assert prune(weight, torch.zeros(8, 8), Unstructured(0.3), method="magnitude", refine_steps=3).loss == 0


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("steps", [2, 50])
@pytest.mark.parametrize("admm_steps", [0, 4])
def test_the_loss_is_that_of_the_weights(dtype, steps, admm_steps):
    weight, H = layer(12, 24)
    weight, hessian = weight.to(dtype), H.to(torch.promote_types(dtype, torch.float32))
    pruned = prune(weight, hessian, NM(2, 4), refine_steps=steps, admm_steps=admm_steps)
    change = pruned.weight.double() - weight.double()
    expected, dense = (float(((one @ H) * one).sum()) / 2 for one in (change, weight.double()))
    assert pruned.loss == pytest.approx(expected, rel=1e-4)
    assert pruned.relative_loss == pytest.approx(expected / dense, rel=1e-4)


def test_the_loss_of_weights_that_need_not_lose_is_rounding():
    weight, H = torch.randn(6, 16), hessian_of(tokens(16, count=4)).float()
    pruned = prune(weight, H, Unstructured(0.5), refine_steps=200)
    change = (pruned.weight - weight).double()
    for loss in (pruned.loss, float(((change @ H.double()) * change).sum()) / 2):
        assert loss <= 1e-6 * float(((weight @ H) * weight).sum()) / 2


def test_row_losses_are_means_over_tokens():
    inputs = tokens(6, count=40)
    accumulator = HessianAccumulator(6)
    accumulator.update(inputs)
    change = torch.randn(3, 6)
    losses = row_losses(change, torch.zeros(3, 6), accumulator.compute())
    torch.testing.assert_close(residual_of(change, torch.zeros(3, 6), accumulator.compute())[1], losses)
    torch.testing.assert_close(losses, (inputs.float() @ change.T).square().mean(0), rtol=1e-4, atol=1e-6)
