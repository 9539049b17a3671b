import pytest
import torch
from cases import layer
from reference import sparsegpt as reference_sparsegpt

from thanos_lightning.solver import NM, Structured, Unstructured, prune


@pytest.mark.parametrize("dead", [(), (4, 17)])
@pytest.mark.parametrize("block_size", [1, 8, 10, 24, 100])
def test_against_the_reference(block_size, dead):
    weight, H = layer(9, 24, dead=dead)
    for pattern, text in ((Unstructured(0.3), "0.3"), (Unstructured(0.65), "0.65"), (NM(2, 4), "2:4")):
        result = prune(weight.double(), H, pattern, method="sparsegpt", block_size=block_size)
        torch.testing.assert_close(result.weight, reference_sparsegpt(weight, H, text, block_size, 0.01))


def test_structured_columns_are_adapted_to_by_the_columns_to_their_right():
    weight, H = layer(4, 12)
    result = prune(weight.double(), H, Structured(0.25), method="sparsegpt", block_size=5)
    removed = (~result.mask).all(0)
    assert removed.sum() == 3
    first = int(removed.int().argmax())
    assert torch.equal(result.weight[:, :first], weight.double()[:, :first])
    assert not torch.equal(result.weight[:, first + 1 :], (weight.double() * result.mask)[:, first + 1 :])
