import pytest
import torch

from thanos_lightning.solver import HessianAccumulator


def test_the_mean_is_over_the_counted_tokens_of_all_batches_in_any_shape():
    inputs, mask, single = torch.randn(12, 5, 4, dtype=torch.float64), torch.rand(12, 5) < 0.6, torch.randn(4)
    inputs[~mask] = torch.nan  # what padding holds does not matter
    with torch.inference_mode():
        first, second = HessianAccumulator(4), HessianAccumulator(4)
        first.update(inputs[:5], mask[:5])
    second.update(inputs[5:].view(7, 1, 5, 4), mask[5:].view(7, 1, 5))
    second.update(single)
    first.merge(second)
    counted = torch.cat([inputs[mask], single.unsqueeze(0)]).float()
    assert first.num_tokens == len(counted)
    torch.testing.assert_close(first.compute(), 2 / len(counted) * counted.T @ counted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 127, 128, 129, 300, 1100])
def test_strips_make_the_whole_product(dtype, width):
    inputs = torch.randn(700, width).to(dtype)
    accumulator = HessianAccumulator(width)
    accumulator.update(inputs)
    exact = inputs.double().T @ inputs.double()
    assert torch.equal(accumulator.sum, accumulator.sum.T)
    torch.testing.assert_close(accumulator.sum.double(), exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max()))
    assert not accumulator.triangle.tril(-max(128, -(-width // 8))).any()


def test_bad_input():
    accumulator = HessianAccumulator(2)
    accumulator.update(torch.ones(3, 2), torch.zeros(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="no token was counted"):
        accumulator.compute()
    with pytest.raises(ValueError, match="in_features=0"):
        HessianAccumulator(0)
    with pytest.raises(ValueError, match="in_features=2"):
        accumulator.update(torch.ones(3, 4))
    with pytest.raises(ValueError, match="one entry per token"):
        accumulator.update(torch.ones(3, 2), torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="has to be bool"):
        accumulator.update(torch.ones(3, 2), torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="widths 2 and 3"):
        accumulator.merge(HessianAccumulator(3))
