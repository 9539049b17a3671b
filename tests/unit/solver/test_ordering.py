import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thanos_lightning.solver import NM
from thanos_lightning.solver.ordering import _exchange, kept_share, search_order


def scores(seed, rows, cols):
    return torch.rand(rows, cols, generator=torch.Generator().manual_seed(seed)) ** 4


@settings(max_examples=30)
@given(
    st.integers(0, 2**16),
    st.integers(1, 9),
    st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 4), (4, 8)]),
    st.integers(1, 6),
)
def test_an_order_has_all_columns_once_and_keeps_no_less(seed, rows, pattern, groups):
    pattern = NM(*pattern)
    S = scores(seed, rows, groups * pattern.m)
    order = search_order(S, pattern)
    assert order.sort().values.tolist() == list(range(S.shape[1]))
    assert kept_share(S[:, order], pattern) >= kept_share(S, pattern) - 1e-6


def naive_kept(S, groups, pattern):
    return sum(sum(sorted(row[group].tolist())[-pattern.n :]) for row in S for group in groups)


@pytest.mark.parametrize("pattern", [NM(1, 2), NM(2, 4), NM(3, 4), NM(1, 4)])
@pytest.mark.parametrize("seed", range(5))
def test_a_round_gives_the_inputs_that_it_took_back_in_the_best_way(pattern, seed):
    S = scores(seed, 6, 4 * pattern.m).double()
    groups = torch.randperm(S.shape[1]).view(4, pattern.m)
    exchanged = _exchange(S, groups, pattern, torch.Generator().manual_seed(seed))
    # which places were drawn
    place = torch.randint(pattern.m, (4,), generator=torch.Generator().manual_seed(seed))
    taken = groups[range(4), place]
    best = 0.0
    for given_back in itertools.permutations(taken.tolist()):
        tried = groups.clone()
        tried[range(4), place] = torch.tensor(given_back)
        best = max(best, naive_kept(S, tried, pattern))
    assert naive_kept(S, exchanged, pattern) == pytest.approx(best)


def test_more_groups_than_are_exchanged_at_a_time(monkeypatch):
    monkeypatch.setattr("thanos_lightning.solver.ordering._EXCHANGING", 3)
    S = scores(0, 20, 64)
    order = search_order(S, NM(2, 4))
    assert order.sort().values.tolist() == list(range(64))
    assert kept_share(S[:, order], NM(2, 4)) > kept_share(S, NM(2, 4)) + 0.02


def test_what_can_not_be_searched():
    with pytest.raises(ValueError, match="divisible by 4"):
        search_order(torch.ones(2, 6), NM(2, 4))
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite and not negative"):
            search_order(torch.full((2, 8), bad), NM(2, 4))
