import pytest
import torch
from cases import training_precision

from thanos_lightning.solver import HessianAccumulator


def test_mean_over_counted_tokens_in_any_shape():
    inputs = torch.randn(3, 5, 4)
    mask = torch.rand(3, 5) < 0.6
    inputs[~mask] = torch.nan  # what padding holds does not matter
    accumulator = HessianAccumulator(4)
    accumulator.update(inputs, mask)
    counted = inputs[mask]
    assert accumulator.num_tokens == len(counted)
    torch.testing.assert_close(accumulator.compute(), 2 / len(counted) * counted.T @ counted)


def test_batches_and_merge_are_additions():
    inputs = torch.randn(12, 4, dtype=torch.float64)
    whole, first, second = HessianAccumulator(4), HessianAccumulator(4), HessianAccumulator(4)
    whole.update(inputs)
    first.update(inputs[:5])
    second.update(inputs[5])
    second.update(inputs[6:].view(6, 1, 4))
    first.merge(second)
    assert first.num_tokens == whole.num_tokens == 12
    torch.testing.assert_close(first.sum, whole.sum)


def test_squares_are_float32_under_autocast_and_medium_precision():
    inputs = torch.randn(512, 64, requires_grad=True)
    exact, disturbed = HessianAccumulator(64), HessianAccumulator(64)
    exact.update(inputs)
    with training_precision():
        disturbed.update(inputs)
    assert torch.equal(exact.sum, disturbed.sum)
    assert not exact.sum.requires_grad


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


def test_born_in_inference_mode_grows_outside():
    with torch.inference_mode():
        accumulator = HessianAccumulator(2)
        accumulator.update(torch.ones(1, 2))
    accumulator.update(torch.ones(1, 2))
    assert accumulator.num_tokens == 2


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
