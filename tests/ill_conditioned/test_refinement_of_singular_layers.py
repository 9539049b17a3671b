"""Steps on a Hessian that is singular up to rounding: 30 of each kind, by when they have long converged."""

import pytest
from hessians import TASKS, energy, layer

from thanos_lightning.solver import prune

steps_of = pytest.mark.parametrize("kind", ["refine_steps", "admm_steps"])
singular = pytest.mark.parametrize("family", ["low rank and noise", "8 tokens"])


@singular
@steps_of
def test_refined_weights_do_not_grow(family, kind):
    weight, _, H = layer(family)
    refined = [prune(weight, H, pattern, block_size=size, **{kind: 30}).weight for pattern, size in TASKS.values()]
    assert max(float(after.norm() / weight.norm()) for after in refined) < 2


@singular
@steps_of
def test_refinement_does_not_raise_what_the_tokens_lose(family, kind):
    weight, inputs, H = layer(family)
    for pattern, size in TASKS.values():
        start, refined = (prune(weight, H, pattern, block_size=size, **{kind: steps}).weight for steps in (0, 30))
        assert energy(refined.double() - weight.double(), inputs) <= energy(start.double() - weight.double(), inputs)
