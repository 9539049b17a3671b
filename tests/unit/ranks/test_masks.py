import io

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from thanos_lightning.ranks.masks import LayerMask, pack_bits, unpack_bits
from thanos_lightning.solver import NM, Structured, Unstructured

shapes = st.lists(st.integers(0, 9), max_size=4).map(tuple)
patterns = st.one_of(
    st.floats(0.01, 0.99).map(Unstructured),
    st.builds(
        lambda n, more, fraction: NM(n, n + more, fraction), st.integers(1, 8), st.integers(1, 8), st.floats(0, 0.99)
    ),
    st.builds(Structured, st.floats(0.01, 0.5), st.floats(0, 0.49)),
)


def random_mask(shape, seed):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5


@given(shape=shapes, seed=st.integers(0, 1000))
def test_bits_round_trip(shape, seed):
    mask = random_mask(shape, seed)
    packed = pack_bits(mask)
    assert packed.dtype == torch.uint8
    assert packed.shape == ((mask.numel() + 7) // 8,)
    unpacked = unpack_bits(packed, shape)
    assert unpacked.dtype == torch.bool
    assert unpacked.shape == mask.shape
    assert torch.equal(unpacked, mask)
    reverse = tuple(reversed(range(mask.dim())))  # in memory
    assert torch.equal(pack_bits(mask.permute(reverse).contiguous().permute(reverse)), packed)


def test_lowest_bit_is_first():
    assert pack_bits(torch.tensor([[False, True], [True, False]])).tolist() == [0b0110]
    assert pack_bits(torch.ones(9, dtype=torch.bool)).tolist() == [255, 1]


@given(shape=shapes, off=st.integers(-3, 3).filter(bool))
def test_wrong_number_of_bytes(shape, off):
    right = (torch.Size(shape).numel() + 7) // 8
    wrong = right + off
    assume(wrong >= 0)
    with pytest.raises(ValueError, match=rf"takes {right} bytes, but {wrong} were stored: .* damaged"):
        unpack_bits(torch.zeros(wrong, dtype=torch.uint8), shape)


@given(
    pattern=patterns, share=st.floats(0.1, 1), transposed=st.booleans(), rows=st.integers(1, 9), cols=st.integers(1, 9)
)
def test_state_round_trip_as_plain_values(pattern, share, transposed, rows, cols):
    """Of the last event, and of one before, which asks for a share of its sparsity."""
    pattern = pattern.with_sparsity(share * pattern.sparsity)
    mask = LayerMask.of(random_mask((rows, cols), rows), pattern, transposed)
    saved = io.BytesIO()
    torch.save(mask.state(), saved)
    restored = LayerMask.from_state(torch.load(io.BytesIO(saved.getvalue()), weights_only=True))
    assert torch.equal(restored.keep, mask.keep)
    assert restored.pattern == pattern
    assert restored.transposed is transposed
