import itertools

import pytest
import torch
from cases import METHODS, PATTERNS, hessian_of, layer, tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from thanos_lightning.solver import NM, FactorizationError, Structured, Unstructured, prune
from thanos_lightning.solver.admm import weight_costs
from thanos_lightning.solver.coupled import couple, coupled_loss
from thanos_lightning.solver.factors import Factors
from thanos_lightning.solver.layer import SolverOptions, prune_rows
from thanos_lightning.solver.linalg import damped, inverse_factor
from thanos_lightning.solver.team import Alone

DAMPING = 0.01
SETTINGS = {"saliency": "balanced", "admm_steps": 8, "refine_steps": 2, "damping": DAMPING}


def output_factor(rows, seed=0):
    """Correlated gradients, with their mean added."""
    return with_mean(hessian_of(tokens(rows, seed + 100, count=64)))


def with_mean(G):
    return G + G.diagonal().mean() * torch.eye(len(G))


def coupled(W0, H, G, pruned, pattern, frozen=None, **steps):
    cost = weight_costs(H, inverse_factor(damped(H, DAMPING)), DAMPING)
    frozen = torch.zeros_like(pruned.mask) if frozen is None else frozen
    return couple(pruned.weight, W0, pruned.mask, frozen, H, G, cost, pattern, damping=DAMPING, **steps)


def naive_loss(change, G, H):
    flat = change.flatten()
    return float(flat @ torch.kron(G, damped(H, DAMPING)) @ flat) / 2


def best_weights(W0, G, H, keep):
    """By the normal equations of all kept weights of the layer together."""
    A = torch.kron(G, damped(H, DAMPING))
    free = keep.flatten()
    solved = torch.zeros_like(W0).flatten()
    solved[free] = torch.linalg.solve(A[free][:, free], (A @ W0.flatten())[free])
    return solved.view_as(W0)


def test_the_loss_is_that_of_the_kronecker_product():
    (W0, H), G = layer(5, 8), output_factor(5)
    change = W0.double()
    assert coupled_loss(change, G, damped(H, DAMPING)) == pytest.approx(naive_loss(change, G, H))


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5), Structured(0.25)])
def test_refinement_ends_at_the_solution_of_the_normal_equations(pattern):
    (W0, H), G = layer(6, 16), output_factor(6)
    W0 = W0.double()
    pruned = prune(W0, H, pattern)
    W, keep = coupled(W0, H, G, pruned, pattern, admm_steps=0, refine_steps=400)
    assert torch.equal(keep, pruned.mask)
    torch.testing.assert_close(W, best_weights(W0, G, H, keep), rtol=1e-6, atol=1e-8)


@settings(max_examples=25)
@given(
    st.integers(0, 2**16), st.integers(1, 9), st.sampled_from([NM(2, 4), NM(1, 4, 0.2), NM(4, 8), Unstructured(0.6)])
)
def test_steps_keep_counts_and_frozen_weights_and_never_lose_more(seed, rows, pattern):
    (W0, H), G = layer(rows, 16, seed), output_factor(rows, seed)
    W0 = W0.double()
    frozen = torch.rand(rows, 16, generator=torch.Generator().manual_seed(seed)) < 0.2
    pruned = prune(W0, H, pattern, frozen=frozen, **SETTINGS)
    W, keep = coupled(W0, H, G, pruned, pattern, frozen, admm_steps=12, refine_steps=4)
    width = pattern.group_width(16)
    assert torch.equal(keep.view(-1, width).sum(1), pruned.mask.view(-1, width).sum(1))
    assert not (keep & frozen).any()
    assert not W[~keep].any()
    assert naive_loss(W - W0, G, H) <= naive_loss(pruned.weight - W0, G, H) * (1 + 1e-9)


def test_small_layers_come_near_the_best_of_all_masks():
    """Of all 2:4 masks of two rows of four, each with its best weights."""
    ratios, alone = [], []
    halves = [torch.tensor([i in chosen for i in range(4)]) for chosen in itertools.combinations(range(4), 2)]
    for seed in range(30):
        (W0, H), G = layer(2, 4, seed), output_factor(2, seed)
        G[0, 1] = G[1, 0] = 0.8 * (G[0, 0] * G[1, 1]).sqrt()
        W0 = W0.double()
        best = min(
            naive_loss(best_weights(W0, G, H, torch.stack(rows)) - W0, G, H)
            for rows in itertools.product(halves, halves)
        )
        pruned = prune(W0, H, NM(2, 4), **SETTINGS)
        W, _ = coupled(W0, H, G, pruned, NM(2, 4), admm_steps=24, refine_steps=14)
        ratios.append(naive_loss(W - W0, G, H) / best)
        alone.append(naive_loss(best_weights(W0, G, H, pruned.mask) - W0, G, H) / best)
    assert min(ratios) > 1 - 1e-6
    assert sum(ratios) / 30 < 1.1
    assert sum(ratios) < 0.9 * sum(alone)


def test_dead_inputs_get_no_weights():
    W0, _ = layer(6, 16)
    X = tokens(16)
    X[:, 3] = 0
    H, G = hessian_of(X), output_factor(6)
    pruned = prune(W0.double(), H, NM(2, 4), **SETTINGS, output_weights=G)
    assert not pruned.weight[:, 3].any()
    assert torch.isfinite(pruned.weight).all()


# through the one door


@pytest.mark.parametrize("pattern", PATTERNS[:-1])  # of channels the update is the same
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_coupled_rows_lose_less_of_what_is_coupled(pattern, dtype):
    (W0, H), G = layer(24, 32), hessian_of(tokens(24, 100, count=64)).float()
    W0, H = W0.to(dtype), H.float()
    by_diagonal = prune(W0, H, pattern, **SETTINGS, output_weights=G.diagonal())
    coupled = prune(W0, H, pattern, **SETTINGS, output_weights=G)
    assert pattern.violations(coupled.mask) == 0
    assert not coupled.weight[~coupled.mask].any()
    assert coupled.weight.dtype == dtype
    of = {
        name: naive_loss((p.weight - W0).float(), with_mean(G), H) for name, p in (("d", by_diagonal), ("j", coupled))
    }
    assert of["j"] < 0.98 * of["d"]
    change = (coupled.weight.float() - W0.float()).double()
    assert coupled.loss == pytest.approx(float(((change @ H.double()) * change).sum()) / 2, rel=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_and_any_layout_of_the_weight(method):
    (W0, H), G = layer(12, 16), output_factor(12)
    options = {**SETTINGS, "method": method}
    straight, turned = (prune(W, H.float(), NM(2, 4), **options, output_weights=G) for W in (W0, W0.T.contiguous().T))
    assert torch.equal(straight.mask, turned.mask)
    torch.testing.assert_close(straight.weight, turned.weight)
    by_diagonal = prune(W0, H.float(), NM(2, 4), **options, output_weights=G.diagonal())
    assert naive_loss(straight.weight.double() - W0, G, H) < naive_loss(by_diagonal.weight.double() - W0, G, H)


def test_structured_layers_without_refinement_are_coupled_by_their_other_steps():
    (W0, H), G = layer(12, 16), output_factor(12)
    options = {**SETTINGS, "refine_steps": 0}
    coupled = prune(W0.double(), H, Structured(0.25), **options, output_weights=G)
    alone = prune(W0.double(), H, Structured(0.25), **options, output_weights=G.diagonal())
    assert torch.equal(coupled.mask, alone.mask)
    assert naive_loss(coupled.weight - W0, with_mean(G), H) < 0.99 * naive_loss(alone.weight - W0, with_mean(G), H)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_scale_of_what_couples_rows_changes_nothing(dtype):
    (W0, H), G = layer(8, 16), output_factor(8).to(dtype)
    W0, H = W0.to(dtype), H.to(dtype)
    once, more = (prune(W0, H, NM(2, 4), **SETTINGS, output_weights=scale * G) for scale in (1, 2.0**-100))
    assert torch.equal(once.mask, more.mask)
    torch.testing.assert_close(once.weight, more.weight)


@pytest.mark.parametrize("method", METHODS)
def test_the_scale_of_the_hessian_changes_nothing_where_inputs_are_dead(method):
    W0, _ = layer(8, 16)
    X = tokens(16)
    X[:, 5] = 0
    H, G = hessian_of(X), output_factor(8)
    pattern, options = NM(2, 4, 0.25), {**SETTINGS, "method": method}
    once, more = (prune(W0.double(), scale * H, pattern, **options, output_weights=G) for scale in (1, 2.0**-30))
    assert torch.equal(once.mask, more.mask)
    torch.testing.assert_close(once.weight, more.weight)


def test_without_steps_the_diagonal_counts():
    (W0, H), G = layer(8, 16), output_factor(8)
    for method, hessian in (("thanos", H), ("magnitude", None)):
        plain = prune(
            W0, hessian, Unstructured(0.5), method=method, output_weights=G.diagonal() + 0.01 * G.diagonal().mean()
        )
        coupled = prune(W0, hessian, Unstructured(0.5), method=method, output_weights=G)
        assert torch.equal(plain.weight, coupled.weight)


def test_outputs_that_the_loss_hardly_feels_are_pruned_first():
    """The mean that couples rows safely must not hide this."""
    (W0, H), G = layer(16, 16), torch.diag(torch.tensor([1.0] * 8 + [1e-3] * 8))
    coupled = prune(W0, H.float(), Unstructured(0.5), **SETTINGS, output_weights=G)
    assert coupled.mask[8:].float().mean() < 0.5 * coupled.mask[:8].float().mean()


def test_a_member_of_a_team_has_not_all_rows():
    (W0, H), G = layer(8, 16), output_factor(4)
    options = SolverOptions(**SETTINGS)

    class Half(Alone):
        num_rows = 8

    with pytest.raises(ValueError, match="couples the 8 rows of the layer: solve it on one process"):
        prune_rows(W0[:4], Factors(H.float()), NM(2, 4), options, None, Half(4), G.float())


def test_what_can_not_join_rows():
    W0, H = layer(8, 16)
    lopsided = torch.eye(8)
    lopsided[0, 1] = 0.5
    for wrong, message in (
        (torch.ones(8, 7), r"shape \(8, 7\) .* has to be a floating-point \(8, 8\)"),
        (torch.eye(8, dtype=torch.int64), r"has to be a floating-point \(8, 8\)"),
        (torch.full((8, 8), torch.nan), "not a finite symmetric matrix"),
        (lopsided, "not a finite symmetric matrix"),
        (torch.eye(8, device="meta"), "output_weights is on meta"),
        (torch.zeros(8, 8), "a diagonal >= 0 that is not all zero"),
        (torch.diag(torch.tensor([1.0] * 7 + [-1.0])), "a diagonal >= 0"),
    ):
        with pytest.raises(ValueError, match=message):
            prune(W0, H, NM(2, 4), **SETTINGS, output_weights=wrong)
    indefinite = torch.eye(8) + 5 * (torch.ones(8, 8) - torch.eye(8))
    with pytest.raises(FactorizationError, match="output_weights"):
        prune(W0, H, NM(2, 4), **SETTINGS, output_weights=indefinite)
