import pytest
import torch
from cases import layer
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import damped

from thanos_lightning.solver import NM, Structured
from thanos_lightning.solver.linalg import curvature
from thanos_lightning.solver.saliency import (
    SALIENCIES,
    lowest,
    lowest_columns,
    lowest_in_groups,
    lowest_per_row,
    scales,
)


def drawn(data, rows, cols, values):
    return torch.tensor(data.draw(st.lists(values, min_size=rows * cols, max_size=rows * cols))).view(rows, cols)


few_values = st.integers(0, 3)  # so that ties are the rule


@settings(derandomize=True)
@given(st.data(), st.integers(1, 6), st.integers(1, 6))
def test_lowest_is_exact_with_ties(data, rows, cols):
    scores = drawn(data, rows, cols, few_values).float()
    count, width = data.draw(st.integers(0, rows * cols)), data.draw(st.integers(1, cols))
    chosen = lowest(scores, count)
    assert chosen.sum() == count
    if 0 < count < rows * cols:
        assert scores[chosen].max() <= scores[~chosen].min()
    # By blocks, the budget passed on, as many are chosen as at once.
    first = lowest(scores, count, width)
    rest = lowest(scores[:, width:], count - int(first.sum())) if width < cols else scores.new_zeros(0)
    assert first.sum() + rest.sum() == count


def test_lowest_of_many_is_the_same_with_and_without_the_sample():
    torch.manual_seed(0)
    scores = torch.randn(400, 400).square()
    hostile = torch.arange(160_000.0).view(400, 400)
    hostile.view(-1)[::509] = -1.0  # the sample sees one value only
    frozen = scores.masked_fill(torch.rand(400, 400) < 0.5, -torch.inf)
    for values in (scores, scores.floor(), hostile, frozen, frozen.double(), torch.zeros(400, 400)):
        for count in (1, 777, 80_000, 159_999):
            chosen = lowest(values, count)
            assert chosen.sum() == count
            assert values[chosen].max() <= values[~chosen].min()


@settings(derandomize=True)
@given(st.data(), st.integers(1, 6), st.integers(1, 6))
def test_lowest_per_row_is_even_and_exact(data, rows, cols):
    scores = drawn(data, rows, cols, few_values).float()
    frozen = drawn(data, rows, cols, st.booleans())
    count = data.draw(st.integers(int(frozen.sum()), rows * cols))
    chosen = lowest_per_row(scores.masked_fill(frozen, -torch.inf), frozen, count)
    assert chosen.sum() == count
    assert chosen[frozen].all()
    share = chosen.sum(1)
    free = share > frozen.sum(1)
    # Rows that lose more than their frozen weights lose no more than one above any row that could lose more.
    if free.any() and (share < cols).any():
        assert share[free].max() <= share[share < cols].min() + 1


def test_the_remainder_goes_to_the_lowest_next_score():
    scores = torch.tensor([[1.0, 5.0], [2.0, 4.0], [3.0, 6.0]])
    frozen = torch.zeros(3, 2, dtype=torch.bool)
    assert lowest_per_row(scores, frozen, 4).tolist() == [[True, False], [True, True], [True, False]]


def test_lowest_in_groups():
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0, 9.0, 9.0, 9.0, 9.0]] * 3)
    frozen = torch.zeros(3, 8, dtype=torch.bool)
    frozen[1, :3] = True
    frozen[2, 7] = True
    sparse_rows = torch.tensor([[True], [True], [False]])
    chosen = lowest_in_groups(scores.masked_fill(frozen, -torch.inf), frozen, sparse_rows, NM(2, 4))
    assert chosen.int().tolist() == [[1, 1, 0, 0, 1, 1, 0, 0], [1, 1, 1, 0, 1, 1, 0, 0], [0] * 7 + [1]]


def test_columns_of_least_energy_over_the_sparse_rows_after_those_with_frozen_weights():
    energy = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0], [100.0, 0.0, 0.0, 0.0]])
    frozen = torch.zeros(3, 4, dtype=torch.bool)
    sparse_rows = torch.tensor([[True], [True], [False]])
    half = Structured(0.5)
    assert lowest_columns(energy, frozen, sparse_rows, half).int().tolist() == [[1, 1, 0, 0]] * 2 + [[0] * 4]
    frozen[0, 3] = frozen[2, 2] = True
    assert lowest_columns(energy, frozen, sparse_rows, half).int().tolist() == [[1, 0, 0, 1]] * 2 + [[0, 0, 1, 0]]


@pytest.mark.parametrize("block_size", [1, 5, 8, 100])
def test_what_a_weight_costs(block_size):
    """Against the inverse of what is left, the first time a column is scored and later."""
    _, H = layer(1, 24)
    H[7] = H[:, 7] = 0
    known = curvature(H, 0.01)
    alive = ~known.dead
    by_saliency = {name: dict(scales(name, known, block_size)) for name in SALIENCIES}
    assert list(by_saliency["obs"]) == list(range(0, 24, block_size))
    for start, wanda in by_saliency["wanda"].items():
        torch.testing.assert_close(wanda, known.norms[start:])
        inverse = torch.linalg.inv(damped(H, 0.01)[start:, start:]).diagonal()
        obs = by_saliency["obs"][start]
        torch.testing.assert_close(obs[alive[start:]], inverse.rsqrt()[alive[start:]])
        torch.testing.assert_close(by_saliency["balanced"][start].square(), obs * wanda)
        assert not obs[~alive[start:]].any()
