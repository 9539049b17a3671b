import pytest
import torch

from thanos_lightning.solver.zeros import zero_where


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64, torch.uint8],
)
def test_pruned_entries_become_plus_zero_whatever_they_are(dtype):
    values = torch.tensor([[-1.0, float("nan"), 3.0, -0.0], [0.0, 5.0, 1e-7, 7.0]])
    if dtype.is_floating_point:
        values[1, 1] = float("inf") if dtype != torch.float8_e4m3fn else 448
    else:
        values = values.nan_to_num().abs()
    tensor = values.to(dtype)
    before = tensor.clone()
    drop = torch.tensor([[True, True, False, True], [False, True, True, False]])
    zero_where(tensor, drop)
    as_bytes = tensor.view(torch.uint8).view(2, 4, -1)
    assert not as_bytes[drop].any()
    assert torch.equal(as_bytes[~drop], before.view(torch.uint8).view(2, 4, -1)[~drop])


def test_pruned_entries_of_a_strided_tensor_that_is_trained():
    weight = torch.nn.Parameter(torch.full((3, 4), -2.0))
    drop = torch.eye(4, 3, dtype=torch.bool)
    assert zero_where(weight.t(), drop).dtype == weight.dtype
    assert torch.equal(weight == 0, drop.t())
    assert weight.grad is None
