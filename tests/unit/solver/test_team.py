import math
import warnings
from typing import Any

import pytest
import torch
from cases import METHODS, PATTERNS, layer
from hypothesis import given, settings
from hypothesis import strategies as st
from teams import ThreadTeam, outcomes, prune_together

import thanos_lightning.solver.thanos as thanos_module
from thanos_lightning.solver import (
    NM,
    FactorizationError,
    NonFiniteError,
    Pattern,
    PrunedLayer,
    Structured,
    Unstructured,
    prune,
)
from thanos_lightning.solver.factors import Factors
from thanos_lightning.solver.layer import SolverOptions, prune_rows
from thanos_lightning.solver.saliency import SALIENCIES, _kth_lowest_by_digits, lowest
from thanos_lightning.solver.team import Alone, TeammateError, split_rows

property_based = settings(derandomize=True)
methods, patterns = st.sampled_from(METHODS), st.sampled_from(PATTERNS)
EXTREMES = (0.0, -0.0, 1.0, -1.0, 1e-30, 3e38, math.inf, -math.inf)


def assert_same(split: PrunedLayer | list[Any], whole: PrunedLayer) -> None:
    assert isinstance(split, PrunedLayer), split
    assert torch.equal(split.mask, whole.mask)
    torch.testing.assert_close(split.weight, whole.weight)
    assert split.loss == pytest.approx(whole.loss, nan_ok=True)
    assert split.relative_loss == pytest.approx(whole.relative_loss, nan_ok=True)


def test_rows_are_split_evenly():
    assert split_rows(7, 3) == [3, 2, 2]
    assert split_rows(3, 3) == [1, 1, 1]
    assert split_rows(5, 1) == [5]


@settings(property_based, max_examples=60)
@given(st.data(), methods, patterns, st.integers(2, 4), st.integers(0, 2), st.integers(0, 3))
def test_a_team_prunes_as_one_process_does(data, method, pattern, members, refine_steps, seed):
    rows, cols = data.draw(st.integers(members, 13)), 4 * data.draw(st.integers(1, 6))
    weight, H = layer(rows, cols, seed)
    options = {"method": method, "block_size": data.draw(st.integers(1, 30)), "refine_steps": refine_steps}
    options |= {"saliency": data.draw(st.sampled_from(SALIENCIES)), "admm_steps": data.draw(st.integers(0, 2))}
    density = data.draw(st.sampled_from([0.0, 0.2, 0.6, 1.0]))
    frozen = torch.rand(rows, cols, generator=torch.Generator().manual_seed(seed)) < density
    for given_frozen in (None, frozen):
        whole = prune(weight, H, pattern, frozen=given_frozen, **options)
        assert_same(prune_together(members, weight, H, pattern, given_frozen, **options), whole)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("method", METHODS)
def test_in_float32_counts_are_the_same_and_masks_all_but(method, pattern):
    weight, H = layer(61, 64)
    whole = prune(weight, H.float(), pattern, method=method, block_size=16, refine_steps=2)
    split = prune_together(3, weight, H.float(), pattern, method=method, block_size=16, refine_steps=2)
    assert isinstance(split, PrunedLayer)
    assert split.mask.sum() == whole.mask.sum()
    assert pattern.violations(split.mask) == 0
    assert (split.mask == whole.mask).float().mean() >= 0.999
    assert split.loss == pytest.approx(whole.loss, rel=1e-3)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_magnitude_without_a_hessian_and_weights_with_many_ties(pattern):
    weight = layer(11, 8)[0].mul(2).round()
    assert_same(
        prune_together(3, weight, None, pattern, method="magnitude"), prune(weight, None, pattern, method="magnitude")
    )


def test_lowest_of_many_is_the_same_in_a_team():
    torch.manual_seed(0)
    scores = torch.randn(401, 400).square()
    hostile = torch.arange(160_400.0).view(401, 400)
    hostile.view(-1)[::509] = -1.0  # the sample sees one value only
    frozen = scores.masked_fill(torch.rand(401, 400) < 0.5, -torch.inf)
    for values in (scores, scores.floor(), hostile, frozen, frozen.double(), torch.zeros(401, 400)):
        for count in (1, 777, 80_000, 160_399, 160_400):
            for width in (None, 37):
                expected = lowest(values, count, Alone(401), width)
                parts = outcomes(
                    split_rows(401, 3), lambda team, v=values, k=count, w=width: lowest(v[team.own_rows], k, team, w)
                )
                assert torch.equal(torch.cat(parts), expected)


@settings(property_based, max_examples=60)
@given(st.data(), st.sampled_from([torch.float32, torch.float64]))
def test_any_value_is_found_by_digits(data, dtype):
    value = st.one_of(st.sampled_from(EXTREMES), st.floats(width=32, allow_nan=False))
    parts = [torch.tensor(part, dtype=dtype) for part in data.draw(st.lists(st.lists(value), min_size=2, max_size=3))]
    everything = torch.cat(parts).sort().values
    if len(everything) == 0:
        return
    k = data.draw(st.integers(1, len(everything)))
    found = outcomes([1] * len(parts), lambda team: _kth_lowest_by_digits(parts[team.index], k, team))
    assert all(value.dtype == dtype and value == everything[k - 1] for value in found)


# What fails on one member, fails on all


def shares_of(method: str, pattern: Pattern) -> int:
    """How often the members share something."""
    weight, H = layer(7, 8)
    number = 0

    def work(team: ThreadTeam) -> None:
        nonlocal number
        options = SolverOptions.as_published(method, block_size=4, refine_steps=1)
        prune_rows(weight[team.own_rows], Factors(H), pattern, options, None, team)
        number = team.shared

    assert outcomes(split_rows(7, 3), work) == [None] * 3
    return number


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("method", METHODS)
def test_a_member_that_fails_anywhere_ends_all(method, pattern):
    weight, H = layer(7, 8)
    for call in range(1, shares_of(method, pattern) + 1):
        for errors in (
            {1: MemoryError("no")},
            {0: RuntimeError("no"), 2: MemoryError("no"), 1: FactorizationError("no")},
        ):
            faults = {(member, call): error for member, error in errors.items()}
            parts = prune_together(3, weight, H, pattern, faults=faults, method=method, block_size=4, refine_steps=1)
            for member, part in enumerate(parts):
                if isinstance(errors.get(member), (MemoryError, RuntimeError)):
                    assert part is errors[member]
                else:
                    assert isinstance(part, TeammateError)


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4, 0.2), Structured(0.25)])
@pytest.mark.parametrize("method", ["thanos", "sparsegpt"])
def test_a_factorisation_that_fails_on_one_member_is_tried_again_by_all(method, pattern):
    weight, H = layer(7, 8)
    expected = prune(weight, H, pattern, method=method, block_size=4, damping=0.1)
    retried = 0
    for call in range(1, shares_of(method, pattern) + 1):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            faults = {(1, call): FactorizationError("no")}
            split = prune_together(3, weight, H, pattern, faults=faults, method=method, block_size=4)
        if isinstance(split, PrunedLayer):
            retried += 1
            assert_same(split, expected)
            assert [str(w.message).split(": ")[0] for w in caught] == [
                "the Hessian is not positive definite with damping=0.01; 0.1 was used"
            ]
        else:  # where nothing is factored
            assert [type(part) for part in split] == [FactorizationError] * 3
    assert retried > 0


def test_between_two_meetings_too(monkeypatch):
    """Members with two rows fail in their second block, in which nothing is shared."""
    weight, H = layer(7, 16)
    real = thanos_module._prune_block

    def prune_block(W: torch.Tensor, factor: torch.Tensor, start: int, pruned: torch.Tensor) -> None:
        if len(W) == 2 and start == 4:
            raise error
        real(W, factor, start, pruned)

    monkeypatch.setattr(thanos_module, "_prune_block", prune_block)
    error: Exception = torch.OutOfMemoryError("tried to allocate 1 PiB")
    parts = prune_together(3, weight, H, NM(2, 4), block_size=4)
    assert isinstance(parts[0], TeammateError)
    assert parts[1:] == [error, error]
    error = FactorizationError("no")  # always, so that the ladder ends
    for part in prune_together(3, weight, H, NM(2, 4), block_size=4):
        assert isinstance(part, FactorizationError)
        assert "even with 1 times the mean" in str(part)


def test_what_only_one_member_can_see():
    weight, H = layer(7, 8)
    weight[4, 2] = torch.nan
    first, second, third = prune_together(3, weight, H, Unstructured(0.5))
    assert isinstance(second, NonFiniteError)
    assert isinstance(first, TeammateError)
    assert isinstance(third, TeammateError)


def test_the_same_retry_as_one_process_makes():
    weight, H = layer(5, 4)[0], torch.full((4, 4), -0.35).fill_diagonal_(1.0)
    with pytest.warns(UserWarning, match=r"damping=0.01; 0.1 was used") as caught:
        split = prune_together(2, weight, H, NM(2, 4))
    assert len(caught) == 1
    assert_same(split, prune(weight, H, NM(2, 4), damping=0.1))
    for part in prune_together(2, weight, H - 5, NM(2, 4)):
        assert isinstance(part, FactorizationError)


def test_stages_inside_of_stages_meet_once():
    def work(team: ThreadTeam) -> int:
        for number in range(3):
            try:
                with team.stage(), team.stage():
                    team.share(torch.zeros(2))
                    if team.index == number:
                        raise FactorizationError("no")
                    team.share(torch.zeros(3))
            except FactorizationError:
                continue
        return team.gathered

    first, second, third = outcomes([1, 1, 1], work)
    assert first == second == third == 3 * 3


def test_an_exchange_that_fails_is_not_told_by_another_one():
    def work(team: ThreadTeam) -> None:
        with team.stage(), team.exchange():
            raise ConnectionError("lost")

    assert [str(error) for error in outcomes([1, 1], work)] == ["lost", "lost"]


def test_alone():
    team = Alone(3)
    assert team.num_rows == 3
    assert team.own_rows == slice(0, 3)
    assert team.total(torch.tensor([1, 2])).tolist() == [1, 2]
    assert team.every_row(torch.arange(3)).tolist() == [0, 1, 2]
    with pytest.raises(MemoryError), team.stage():
        raise MemoryError
