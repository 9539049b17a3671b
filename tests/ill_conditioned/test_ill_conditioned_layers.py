"""Thanos on layers whose Hessians are near singular or badly scaled, at the default damping and at none."""

import pytest
import torch
from hessians import FAMILIES, TASKS, WIDEST, energy, layer, thanos
from reference import damped

from thanos_lightning.solver import prune

families = pytest.mark.parametrize("family", [*FAMILIES, WIDEST])
tasks = pytest.mark.parametrize("task", TASKS)
# Layers of 8 x 16 are one block, whatever its size.
small_families = pytest.mark.parametrize("family", [*FAMILIES, "one input times 1e6"])
patterns = pytest.mark.parametrize("pattern", dict.fromkeys(pattern for pattern, _ in TASKS.values()), ids=str)


@families
@tasks
@pytest.mark.parametrize(
    ("steps", "damping"), [((0, 0), 0.01), ((10, 0), 0.01), ((0, 4), 0.01), ((2, 12), 0.01), ((0, 0), 0.0)]
)
@pytest.mark.filterwarnings("ignore:the Hessian is not positive definite")
def test_a_layer_has_the_pattern_and_loses_what_the_tokens_say_and_no_more_than_by_wanda(family, task, steps, damping):
    (weight, inputs, H), pattern = layer(family), TASKS[task][0]
    result = thanos(family, task, *steps, damping)
    assert torch.isfinite(result.weight).all()
    assert int((~result.mask).sum()) == pattern.num_pruned(*result.mask.shape)
    assert pattern.violations(result.mask) == 0
    # Of what the mask keeps, only the weights of dead inputs are zero.
    assert torch.equal(result.weight != 0, result.mask & inputs.any(0))
    if damping > 0:
        assert result.loss <= prune(weight, H, pattern, method="wanda").loss
        dense, lost = energy(weight, inputs), energy(result.weight.double() - weight.double(), inputs)
        # the Hessian is summed in fp32, in an order that the CPU chooses
        rounding = 2 * torch.finfo(torch.float32).eps
        assert result.loss / dense == pytest.approx(lost / dense, rel=1e-3, abs=rounding)


@small_families
@patterns
def test_small_layers_lose_more_than_by_wanda_only_where_next_to_nothing_is_lost(family, pattern):
    """Thanos minimises the damped loss; where inputs differ by many orders, the damping outweighs most of them.

    Of 900 layers of 8 x 16 (300 of each pattern) whose inputs range from 1e-6 to 1e6, 15 to 20 lose more than by Wanda,
    at most 1.09 times as much, and 9 where one input is 1e6 times the others, at most 1.19 times; then Wanda, too,
    loses less than 1e-11 of the layer's energy. Below 1e-15 it is rounding: in float64, Thanos loses less.
    """
    for seed in range(6):
        weight, _, H = layer(family, 8, 16, seed)
        wanda, result = prune(weight, H, pattern, method="wanda"), prune(weight, H, pattern)
        slack = 1.25 if wanda.relative_loss < 1e-10 else 1.0
        assert result.relative_loss <= max(slack * wanda.relative_loss, 1e-15)


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


@pytest.mark.parametrize("family", ["low rank and noise", "8 tokens"])
@pytest.mark.parametrize("kind", ["refine_steps", "admm_steps"])
def test_steps_neither_grow_the_weights_nor_raise_what_the_tokens_lose(family, kind):
    """Of a Hessian that is singular up to rounding. After 30 of each kind, they have long converged."""
    weight, inputs, H = layer(family)
    for pattern, size in TASKS.values():
        start, refined = (prune(weight, H, pattern, block_size=size, **{kind: steps}).weight for steps in (0, 30))
        assert refined.norm() < 2 * weight.norm()
        assert energy(refined.double() - weight.double(), inputs) <= energy(start.double() - weight.double(), inputs)
