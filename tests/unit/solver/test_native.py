"""The C code against the torch code that it stands for, and how it is built."""

import multiprocessing
import os
import shutil
import subprocess
import warnings

import pytest
import torch
from cases import METHODS, PATTERNS, layer
from hypothesis import given, settings
from hypothesis import strategies as st
from require import without

from thanos_lightning.solver import NM, FactorizationError, Unstructured, native, prune
from thanos_lightning.solver.admm import Iterates
from thanos_lightning.solver.linalg import solve_subsets
from thanos_lightning.solver.saliency import importance, lowest_in_groups, lowest_weighted

property_based = settings(derandomize=True, max_examples=80)


@pytest.fixture(scope="module", autouse=True)
def needs_compiler():
    if shutil.which(os.environ.get("CC", "cc")) is None:
        without("the solver's C code needs a C compiler (apt-get install g++): there is none")


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """As in a new process of a user whose cache is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.compiled.cache_clear()
    yield tmp_path / "thanos_lightning" / "native"
    native.compiled.cache_clear()


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def in_torch(function, *arguments, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "compiled", lambda: None)
        return function(*arguments, **options)


def test_it_is_built_here():
    assert native.usable(torch.ones(1))
    assert not native.usable(torch.ones(1, dtype=torch.float64))
    assert not native.usable(torch.ones(1, device="meta"))


@property_based
@given(st.integers(1, 40), st.integers(1, 70), st.floats(0, 1), st.integers(0, 9))
def test_solve_subsets(rows, n, density, seed):
    matrix = layer(1, n, seed)[1].float() + torch.eye(n)
    members = torch.rand(rows, n, generator=generator(seed)) < density
    rhs = torch.randn(rows, n, generator=generator(seed))
    solutions = solve_subsets(matrix, members, rhs)
    assert not solutions[~members].any()
    torch.testing.assert_close(solutions, in_torch(solve_subsets, matrix, members, rhs), rtol=1e-4, atol=1e-5)
    for row, its in enumerate(members):
        torch.testing.assert_close(matrix[its][:, its] @ solutions[row, its], rhs[row, its], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("bad", [float("nan"), -1.0, 0.0])
@pytest.mark.parametrize("row", [0, 16, 30])
def test_a_system_that_is_not_positive_is_noticed(bad, row):
    matrix = torch.eye(9)
    matrix[5, 5] = bad
    members = torch.ones(31, 9, dtype=torch.bool)
    members[:, 5] = False
    solve_subsets(matrix, members, torch.ones(31, 9))
    members[row, 5] = True
    with pytest.raises(FactorizationError):
        solve_subsets(matrix, members, torch.ones(31, 9))
    with pytest.raises(FactorizationError):
        in_torch(solve_subsets, matrix, members, torch.ones(31, 9))


def test_systems_too_large_to_interleave_are_left_to_torch(monkeypatch):
    matrix, rhs = layer(1, 40)[1].float() + torch.eye(40), torch.ones(3, 40)
    members = torch.ones(3, 40, dtype=torch.bool)
    expected = solve_subsets(matrix, members, rhs)
    monkeypatch.setattr(native, "LARGEST", 39)
    monkeypatch.setattr(native, "solve_subsets", None)
    torch.testing.assert_close(solve_subsets(matrix, members, rhs), expected)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_threads_share_the_rows(threads):
    before = torch.get_num_threads()
    weight, H = layer(37, 32)
    expected = prune(weight, H.float(), Unstructured(0.5), admm_steps=7, refine_steps=1)
    torch.set_num_threads(threads)
    try:
        again = prune(weight, H.float(), Unstructured(0.5), admm_steps=7, refine_steps=1)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(again.mask, expected.mask)
    torch.testing.assert_close(again.weight, expected.weight)


@property_based
@given(st.integers(1, 30), st.integers(1, 40), st.floats(0, 1), st.integers(0, 9))
def test_bracket(rows, cols, frozen_share, seed):
    W = torch.randn(rows, cols + 3, generator=generator(seed))[:, 3:]  # rows that are not side by side
    scale = torch.rand(cols, generator=generator(seed))
    frozen = torch.rand(rows, cols, generator=generator(seed + 1)) < frozen_share
    scores = importance(W, scale).masked_fill(frozen, -torch.inf)
    low, high = scores.flatten()[:2].aminmax() if scores.numel() > 1 else (scores.min(), scores.max())
    below, inside = native.bracket(W, frozen, scale, float(low), float(high))
    assert below == (scores < low).sum()
    assert torch.equal(inside.sort().values, scores[(scores >= low) & (scores <= high)].sort().values)


@settings(property_based, max_examples=30)
@given(st.integers(1, 3), st.floats(0, 1), st.sampled_from([0.0, 0.2, 0.9]), st.integers(0, 9))
def test_lowest_weighted(levels, share, frozen_share, seed):
    """Large enough for the C code, with few different scores: many ties."""
    W = torch.randint(-levels, levels + 1, (130, 140), generator=generator(seed)).float()
    scale = torch.randint(1, 3, (140,), generator=generator(seed)).float()
    frozen = torch.rand(130, 140, generator=generator(seed)) < frozen_share
    count = int(frozen.sum()) + round(share * int((~frozen).sum()))
    arguments = (W, scale, frozen, count)
    chosen = lowest_weighted(*arguments, width=140)
    assert chosen.sum() == count
    assert torch.equal(chosen, in_torch(lowest_weighted, *arguments, width=140))
    assert torch.equal(lowest_weighted(*arguments, width=9), in_torch(lowest_weighted, *arguments, width=9))


@property_based
@given(st.integers(1, 9), st.integers(1, 5), st.sampled_from([(1, 2), (2, 4), (4, 8), (1, 7)]), st.integers(0, 9))
def test_lowest_in_groups(rows, groups, nm, seed):
    pattern = NM(*nm)
    scores = torch.randint(0, 4, (rows, groups * pattern.m), generator=generator(seed)).float()
    frozen = torch.rand(scores.shape, generator=generator(seed)) < 0.2
    sparse_rows = torch.rand(rows, 1, generator=generator(seed)) < 0.8
    arguments = (scores.masked_fill(frozen, -torch.inf), frozen, sparse_rows, pattern)
    assert torch.equal(lowest_in_groups(*arguments), in_torch(lowest_in_groups, *arguments))


@settings(property_based, max_examples=150)
@given(
    st.integers(1, 9), st.integers(1, 5), st.sampled_from([1, 3, 4, 8, 31, 32, 77]), st.booleans(), st.integers(0, 9)
)  # fmt: skip
def test_project(rows, groups, width, tied, seed):
    cols = groups * width
    moved, original, U, from_original = torch.randn(4, rows, cols, generator=generator(seed))
    scale = torch.rand(cols, generator=generator(seed))
    if tied:  # sums are exact, and many scores equal
        moved, original, U, from_original = (one.round() for one in (moved, original, U, from_original))
        scale = torch.ones(cols)
    scale[::5] = 0
    keep, frozen = torch.rand(2, rows, cols, generator=generator(seed + 1)) < 0.5
    keep &= ~frozen
    before = keep.clone()
    both = [[one.clone() for one in (moved, original, U, from_original, keep)] for _ in range(2)]
    for run, (its_moved, *updated) in zip((lambda f, *to: f(*to), in_torch), both, strict=True):
        run(Iterates(*updated, frozen, scale, width, relaxation=1.5).project, its_moved, 0.5)
    (_, _, U, from_original, keep), (_, _, its_U, its_from_original, its_keep) = both
    assert torch.equal(keep, its_keep)
    assert torch.equal(keep.view(-1, width).sum(1), before.view(-1, width).sum(1))
    assert not (keep & frozen).any()
    torch.testing.assert_close(U, its_U)
    torch.testing.assert_close(from_original, its_from_original)


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5)])
def test_tensors_with_gaps_are_pruned_as_their_copies(pattern):
    weight, H = layer(36, 48)
    H = H.float()
    expected = prune(weight, H, pattern, admm_steps=4, refine_steps=1)
    of_wide, of_large = weight.repeat(1, 2)[:, :48], H.repeat_interleave(2, 0).repeat_interleave(2, 1)[::2, ::2]
    for tensors in ((weight.T.contiguous().T, H), (of_wide, H), (weight, of_large)):
        result = prune(*tensors, pattern, admm_steps=4, refine_steps=1)
        assert torch.equal(result.mask, expected.mask)
        torch.testing.assert_close(result.weight, expected.weight)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("method", METHODS)
def test_a_layer_is_pruned_as_in_torch(method, pattern):
    weight, H = layer(150, 128)
    options = {"method": method, "block_size": 64, "admm_steps": 3, "refine_steps": 2}
    compiled = prune(weight, H.float(), pattern, **options)
    plain = in_torch(prune, weight, H.float(), pattern, **options)
    assert compiled.mask.sum() == plain.mask.sum()
    assert (compiled.mask == plain.mask).float().mean() > 0.999
    assert compiled.loss == pytest.approx(plain.loss, rel=1e-3)


# How it is built


def test_it_is_built_once_for_each_kind_of_cpu(fresh, monkeypatch):
    assert native.usable(torch.ones(1))
    (built,) = fresh.iterdir()
    changed = built.stat().st_mtime_ns
    native.compiled.cache_clear()
    assert native.usable(torch.ones(1))
    assert [*fresh.iterdir()] == [built]
    assert built.stat().st_mtime_ns == changed
    monkeypatch.setattr(native, "_cpu", lambda: "another")
    native.compiled.cache_clear()
    assert native.usable(torch.ones(1))
    assert len([*fresh.iterdir()]) == 2


@pytest.mark.parametrize("mode", [0o707, None])
def test_what_others_could_have_written_is_not_loaded(fresh, monkeypatch, mode):
    assert native.usable(torch.ones(1))
    (built,) = fresh.iterdir()
    built.unlink()  # not written over, since this process runs it
    built.write_bytes(b"another user's")
    if mode is None:
        monkeypatch.setattr(os, "getuid", lambda: 12345)
    else:
        fresh.chmod(mode)
    native.compiled.cache_clear()
    assert native.usable(torch.ones(1))
    assert built.read_bytes() == b"another user's"


def _solve_in_a_new_process(folder: str) -> float:
    import os

    os.environ["XDG_CACHE_HOME"] = folder
    return float(solve_subsets(torch.eye(2) * 2, torch.ones(1, 2, dtype=torch.bool), torch.ones(1, 2)).sum())


def test_processes_may_build_it_at_the_same_time(tmp_path):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.map(_solve_in_a_new_process, [str(tmp_path)] * 2) == pytest.approx([1.0, 1.0])
    assert len([*(tmp_path / "thanos_lightning" / "native").glob("*.so")]) == 1


@pytest.mark.parametrize(
    ("compiler", "words"), [("/nowhere/cc", "No such file or directory: '/nowhere/cc'"), ("false", "false says")]
)
def test_without_a_compiler_the_torch_code_does_it_and_says_so(fresh, monkeypatch, compiler, words):
    monkeypatch.setenv("CC", compiler)
    weight, H = layer(9, 16)
    with pytest.warns(UserWarning, match=f"can't be built.*{words}.*Install a C compiler"):
        slow = prune(weight, H.float(), NM(2, 4), admm_steps=1)
    assert NM(2, 4).violations(slow.mask) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        prune(weight, H.float(), NM(2, 4), admm_steps=1)


def test_an_optimisation_that_a_compiler_lacks_is_left_out(fresh, monkeypatch, tmp_path):
    compiler = tmp_path / "cc"
    compiler.write_text('#!/bin/sh\nfor flag in "$@"; do [ "$flag" = -fopenmp ] && exit 1; done\nexec cc "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    assert native.usable(torch.ones(1))


def test_it_can_be_switched_off(fresh, monkeypatch):
    monkeypatch.setenv(native.SWITCH, "0")
    monkeypatch.setattr(subprocess, "run", None)
    assert not native.usable(torch.ones(1))
