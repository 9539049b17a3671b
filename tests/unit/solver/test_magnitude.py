import math

import pytest
import torch
from cases import PATTERNS, layer

from thanos_lightning.solver import NM, Unstructured, prune


def test_the_smallest_of_the_layer_go():
    weight = torch.tensor([[1.0, -5.0], [-0.5, 0.25]])
    assert prune(weight, None, Unstructured(0.5), method="magnitude").weight.tolist() == [[1.0, -5.0], [0.0, 0.0]]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_hessian_changes_nothing_but_the_loss(pattern):
    weight, H = layer(20, 16)
    with_hessian, without = (prune(weight, h, pattern, method="magnitude") for h in (H, None))
    assert torch.equal(with_hessian.mask, without.mask)
    assert torch.equal(with_hessian.weight, without.weight)
    assert with_hessian.loss > 0
    assert math.isnan(without.loss)
    assert math.isnan(without.relative_loss)


def test_other_methods_need_a_hessian():
    for settings in ({"method": "thanos"}, {"method": "magnitude", "refine_steps": 1}):
        with pytest.raises(ValueError, match="needs a Hessian"):
            prune(torch.ones(2, 4), None, NM(2, 4), **settings)
