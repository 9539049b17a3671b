"""Thanos on layers whose Hessians are near singular or badly scaled, at the default damping and at none."""

import pytest
import torch
from hessians import FAMILIES, TASKS, WIDEST, energy, layer, thanos
from reference import damped

from thanos_lightning.solver import prune

families = pytest.mark.parametrize("family", [*FAMILIES, WIDEST])
tasks = pytest.mark.parametrize("task", TASKS)
improvement = pytest.mark.parametrize(("refine_steps", "admm_steps"), [(0, 0), (10, 0), (0, 4), (2, 12)])
# Layers of 8 x 16 are one block, whatever its size.
small_families = pytest.mark.parametrize("family", [*FAMILIES, "one input times 1e6"])
patterns = pytest.mark.parametrize("pattern", dict.fromkeys(pattern for pattern, _ in TASKS.values()), ids=str)


@families
@tasks
@improvement
def test_a_layer_has_the_pattern_and_loses_no_more_than_by_wanda(family, task, refine_steps, admm_steps):
    (weight, inputs, H), pattern = layer(family), TASKS[task][0]
    result = thanos(family, task, refine_steps, admm_steps)
    assert torch.isfinite(result.weight).all()
    assert int((~result.mask).sum()) == pattern.num_pruned(*result.mask.shape)
    assert pattern.violations(result.mask) == 0
    # Of what the mask keeps, only the weights of dead inputs are zero.
    assert torch.equal(result.weight != 0, result.mask & inputs.any(0))
    assert result.loss <= prune(weight, H, pattern, method="wanda").loss


@small_families
@patterns
def test_for_the_mask_of_wanda_the_damped_loss_is_never_higher(family, pattern):
    """What Thanos promises exactly, and why the undamped loss can be higher."""
    for seed in range(6):
        (weight, H), alive = layer(family, 8, 16, seed).in_float64(), layer(family, 8, 16, seed).inputs.any(0)
        wanda = prune(weight, H, pattern, method="wanda")
        result = prune(weight, H, pattern, frozen=~wanda.mask)
        assert torch.equal(result.mask, wanda.mask)
        D = damped(H, 0.01)[alive][:, alive]
        changes = ((after.weight - weight)[:, alive] for after in (result, wanda))
        losses = [((change @ D) * change).sum() for change in changes]
        assert losses[0] <= losses[1] * (1 + 1e-9)


@families
@tasks
def test_the_loss_is_what_the_tokens_say(family, task):
    weight, inputs, _ = layer(family)
    result, dense = thanos(family, task, 0), energy(weight, inputs)
    lost = energy(result.weight.double() - weight.double(), inputs)
    assert result.loss / dense == pytest.approx(lost / dense, rel=1e-3, abs=torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("family", FAMILIES)
@tasks
@pytest.mark.filterwarnings("ignore:the Hessian is not positive definite")
def test_without_damping_the_weights_are_finite_and_the_sparsity_is_exact(family, task):
    pattern, result = TASKS[task][0], thanos(family, task, 0, damping=0.0)
    assert torch.isfinite(result.weight).all()
    assert int((~result.mask).sum()) == pattern.num_pruned(*result.mask.shape)
    assert pattern.violations(result.weight != 0) == 0


@pytest.mark.parametrize("family", ["low rank and noise", "8 tokens"])
@pytest.mark.parametrize("kind", ["refine_steps", "admm_steps"])
def test_on_a_singular_hessian_refinement_lets_no_weights_grow_and_does_not_raise_what_the_tokens_lose(family, kind):
    """Of 30 steps, the last ones come long after convergence."""
    weight, inputs, H = layer(family)
    for pattern, size in TASKS.values():
        start, refined = (prune(weight, H, pattern, block_size=size, **{kind: steps}).weight for steps in (0, 30))
        assert refined.norm() < 2 * weight.norm()
        assert energy(refined.double() - weight.double(), inputs) <= energy(start.double() - weight.double(), inputs)
