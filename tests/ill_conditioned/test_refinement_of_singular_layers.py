"""Conjugate gradients on a Hessian that is singular up to rounding: 30 steps, by when they have long converged."""

import pytest
from hessians import TASKS, energy, layer

from thanos_lightning.solver import prune

singular = pytest.mark.parametrize("family", ["low rank and noise", "8 tokens"])


@singular
def test_refined_weights_do_not_grow(family):
    weight, _, H = layer(family)
    refined = [prune(weight, H, pattern, block_size=size, refine_steps=30).weight for pattern, size in TASKS.values()]
    assert max(float(after.norm() / weight.norm()) for after in refined) < 2


@singular
def test_refinement_does_not_raise_what_the_tokens_lose(family):
    weight, inputs, H = layer(family)
    for pattern, size in TASKS.values():
        start, refined = (prune(weight, H, pattern, block_size=size, refine_steps=steps).weight for steps in (0, 30))
        assert energy(refined.double() - weight.double(), inputs) <= energy(start.double() - weight.double(), inputs)
