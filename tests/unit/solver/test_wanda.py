import torch
from cases import layer
from reference import wanda as reference_wanda

from thanos_lightning.solver import NM, Unstructured, prune


def test_against_the_reference():
    weight, H = layer(9, 24)
    result = prune(weight, H, Unstructured(0.5), method="wanda")
    torch.testing.assert_close(result.weight.double(), reference_wanda(weight, H, 12), rtol=0, atol=0)


def test_kept_weights_are_left_alone_to_the_last_bit():
    weight, H = layer(9, 24)
    weight = weight.double() + 1e-12
    result = prune(weight, H.float(), NM(2, 4), method="wanda")
    assert torch.equal(result.weight[result.mask], weight[result.mask])


def test_inputs_weigh_in():
    weight = torch.tensor([[1.0, 0.5]])
    H = torch.diag(torch.tensor([1.0, 100.0]))
    assert prune(weight, H, Unstructured(0.5), method="wanda").mask.tolist() == [[False, True]]
    assert prune(weight, H, Unstructured(0.5), method="magnitude").mask.tolist() == [[True, False]]
