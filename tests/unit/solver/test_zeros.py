import pytest
import torch

from thanos_lightning.solver.zeros import zero_where


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64, torch.uint8],
)
def test_pruned_entries_become_plus_zero_whatever_they_are(dtype):
    as_bytes = torch.randint(256, (200, 100, dtype.itemsize), dtype=torch.uint8)  # NaN and negative numbers among them
    before, drop = as_bytes.clone(), torch.rand(200, 100) < 0.5
    zero_where(as_bytes.view(dtype).squeeze(2), drop)
    assert not as_bytes[drop].any()
    assert torch.equal(as_bytes[~drop], before[~drop])
