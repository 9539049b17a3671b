import math

import pytest
import torch
from cases import PATTERNS, layer
from reference import wanda as reference_wanda

from thanos_lightning.solver import NM, Unstructured, prune


def test_wanda_against_the_reference():
    weight, H = layer(9, 24)
    result = prune(weight, H, Unstructured(0.5), method="wanda")
    torch.testing.assert_close(result.weight.double(), reference_wanda(weight, H, 12), rtol=0, atol=0)


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_kept_weights_are_left_alone_to_the_last_bit(method):
    weight, H = layer(9, 24)
    weight = weight.double() + 1e-12
    result = prune(weight, H.float(), NM(2, 4), method=method)
    assert torch.equal(result.weight[result.mask], weight[result.mask])


def test_by_magnitude_the_smallest_of_the_layer_go():
    weight = torch.tensor([[1.0, -5.0], [-0.5, 0.25]])
    assert prune(weight, None, Unstructured(0.5), method="magnitude").weight.tolist() == [[1.0, -5.0], [0.0, 0.0]]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_to_magnitude_the_hessian_changes_nothing_but_the_loss(pattern):
    weight, H = layer(20, 16)
    with_hessian, without = (prune(weight, h, pattern, method="magnitude") for h in (H, None))
    assert torch.equal(with_hessian.mask, without.mask)
    assert torch.equal(with_hessian.weight, without.weight)
    assert with_hessian.loss > 0
    assert math.isnan(without.loss)
    assert math.isnan(without.relative_loss)
