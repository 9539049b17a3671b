import math
import warnings
import weakref
from collections.abc import Callable

import pytest
import torch
from cases import METHODS, PATTERNS, hessian_of, layer, other_defaults, tokens, training_precision
from hypothesis import given, settings
from hypothesis import strategies as st

from thanos_lightning.solver import (
    NM,
    Channels,
    Experts,
    FactorizationError,
    HessianAccumulator,
    NonFiniteError,
    SolverError,
    Structured,
    Unstructured,
    linalg,
    prune,
)
from thanos_lightning.solver.hessian import Factors
from thanos_lightning.solver.layer import SolverOptions, losses_at, relative
from thanos_lightning.solver.ordering import search_order

methods, patterns = st.sampled_from(METHODS), st.sampled_from(PATTERNS)
shapes = st.tuples(st.integers(1, 12), st.integers(1, 6).map(lambda groups: 4 * groups))
property_based = settings(derandomize=True, max_examples=60)


@property_based
@given(methods, patterns, shapes, st.lists(st.floats(0.1, 1.0), max_size=3), st.integers(1, 30), st.integers(0, 3))
def test_counts_are_exact_zeros_stay_and_the_pattern_holds(method, pattern, shape, fractions, block_size, seed):
    weight, H = layer(*shape, seed)
    frozen = torch.zeros(shape, dtype=torch.bool)
    for fraction in [*sorted(fractions), 1.0]:
        step = pattern.with_sparsity(pattern.sparsity if fraction == 1.0 else pattern.sparsity * fraction)
        result = prune(weight, H.float(), step, method=method, block_size=block_size, frozen=frozen)
        assert not result.mask[frozen].any()
        assert int((~result.mask).sum()) == step.num_pruned(*shape)
        assert step.violations(result.mask) == 0
        assert torch.equal(result.weight != 0, result.mask)
        assert not torch.signbit(result.weight[~result.mask]).any()
        # Training moves the kept weights between events.
        weight, frozen = result.weight + 0.1 * torch.randn(shape) * result.mask, ~result.mask


@property_based
@given(methods, patterns, patterns, shapes, st.integers(0, 3), st.sampled_from([0, 3, 12]))
def test_frozen_weights_of_another_pattern_stay_zero(method, earlier, pattern, shape, seed, steps):
    weight, H = layer(*shape, seed)
    frozen = ~prune(weight, H, earlier, method=method).mask
    result = prune(weight, H, pattern, method=method, block_size=8, frozen=frozen, admm_steps=steps)
    assert not result.weight[frozen].any()
    assert not result.mask[frozen].any()
    assert pattern.violations(result.mask) == 0
    assert torch.isfinite(result.weight).all()


@pytest.mark.parametrize("method", METHODS)
def test_more_frozen_weights_than_asked_for_are_all_pruned_and_nothing_else(method):
    weight, H = layer(6, 8)
    frozen = torch.rand(6, 8) < 0.7
    assert torch.equal(prune(weight, H, Unstructured(0.1), method=method, frozen=frozen).mask, ~frozen)
    columns = torch.arange(8).expand(6, 8) < 4
    assert torch.equal(prune(weight, H, Channels(0.3), method=method, frozen=columns).mask, ~columns)
    everything = torch.ones(6, 8, dtype=torch.bool)
    for pattern in PATTERNS:
        result = prune(weight, H, pattern, method=method, frozen=everything, refine_steps=2)
        assert not result.mask.any()
        assert result.relative_loss == pytest.approx(1.0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("surroundings", [other_defaults, training_precision])
def test_torchs_defaults_and_the_precision_of_a_training_change_nothing(surroundings, method, pattern):
    weight, options = layer(150, 128)[0], SolverOptions(method, block_size=64, admm_steps=2, refine_steps=1)
    inputs = tokens(128).float().requires_grad_()

    def solved():
        accumulator = HessianAccumulator(128, device="cpu")
        accumulator.update(inputs)
        H, order = accumulator.compute(), search_order(weight.abs(), NM(2, 4))
        assert not H.requires_grad
        layers = [prune(weight, H, pattern, **vars(options), output_weights=G) for G in (None, outputs)]
        lost = losses_at(weight, Factors(H), [pattern], options) if method != "magnitude" else ([], H)
        return [H, order, *(layer.weight for layer in layers), *lost[0], lost[1]], [layer.loss for layer in layers]

    outputs = hessian_of(tokens(150)).float().diagonal()
    expected, losses = solved()
    with surroundings():
        found, again = solved()
    assert all(map(torch.equal, found, expected))
    assert again == losses


@property_based
@given(methods, patterns, st.sampled_from([1e-20, 1e-6, 0.3, 1e6, 1e20]), st.booleans(), st.sampled_from([0, 9]))
def test_neither_the_order_of_rows_nor_the_scale_of_the_hessian_matters(method, pattern, scale, dead, admm_steps):
    weight, H = layer(10, 16, dead=[3] if dead else [])
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    options = {"method": method, "block_size": 8, "admm_steps": admm_steps, "refine_steps": 2}
    once, other = (
        prune(*given, pattern, **options) for given in ((weight.double(), H), (weight.double()[order], scale * H))
    )
    assert torch.equal(once.mask[order], other.mask)
    torch.testing.assert_close(once.weight[order], other.weight)
    assert other.loss == pytest.approx(scale * once.loss)
    assert other.relative_loss == pytest.approx(once.relative_loss)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("steps", [(0, 0), (0, 2), (0, 50), (4, 2), (4, 50)])
@pytest.mark.parametrize("method", METHODS)
def test_losses_are_what_the_tokens_say(method, steps, dtype):
    inputs = tokens(16).float()
    accumulator = HessianAccumulator(16)
    accumulator.update(inputs)
    weight, H = layer(10, 16)[0].to(dtype), accumulator.compute().to(torch.promote_types(dtype, torch.float32))
    result = prune(weight, H, NM(2, 4), method=method, admm_steps=steps[0], refine_steps=steps[1])
    outputs, pruned_outputs = (inputs.double() @ w.double().T for w in (weight, result.weight))
    loss = (outputs - pruned_outputs).square().sum(1).mean()
    assert result.loss == pytest.approx(loss.item(), rel=1e-4)
    assert result.relative_loss == pytest.approx((loss / outputs.square().sum(1).mean()).item(), rel=1e-4)


ZOO: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {  # of the inputs of a layer
    "zero": torch.zeros_like,
    "one input alive": lambda X: X * (torch.arange(16) == 5),
    "one token": lambda X: X[:1],
    "constant inputs": torch.ones_like,
    "fewer tokens than inputs": lambda X: X[:5],
    "duplicated inputs": lambda X: X[:, :8].repeat(1, 2),
    "scales over 24 orders": lambda X: X * torch.logspace(-6, 6, 16),
    "hilbert": lambda X: torch.linspace(0, 1, len(X), dtype=X.dtype).unsqueeze(1) ** torch.arange(16),
    "tiny": lambda X: X * 3e-13,
    "huge": lambda X: X * 3e12,
    "one huge input": lambda X: X * torch.where(torch.arange(16) == 7, 1e5, 1.0),
}


@pytest.mark.parametrize("damping", [0.01, 1e-6])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ZOO)
@pytest.mark.filterwarnings("ignore:the Hessian is not positive definite")
def test_zoo_of_bad_hessians(name, method, damping):
    H = hessian_of(ZOO[name](tokens(16))).float()
    weight = layer(6, 16)[0]
    for pattern in PATTERNS:
        for refine_steps in (0, 4):
            result = prune(weight, H, pattern, method=method, block_size=8, damping=damping, refine_steps=refine_steps)
            assert int((~result.mask).sum()) == pattern.num_pruned(6, 16)
            assert torch.isfinite(result.weight).all()
            assert math.isfinite(result.loss)
            assert result.relative_loss >= 0
            # SparseGPT adapts to the right only: hardly damped, it can lose more than everything, in float64, too.
            if method != "sparsegpt" or damping == 0.01:
                assert result.relative_loss < 1.001


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(8, 16), (1, 1), (1, 8), (8, 1)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_weight_keeps_its_dtype_and_the_arguments_their_values(method, shape, dtype):
    weight, H = layer(*shape)
    weight = torch.nn.Parameter(weight.to(dtype))
    frozen = torch.rand(shape) < 0.2
    before = weight.detach().clone(), H.clone(), frozen.clone()
    result = prune(weight, H, Unstructured(0.5), method=method, frozen=frozen, refine_steps=1)
    assert int((~result.mask).sum()) == max(weight.numel() // 2, int(frozen.sum()))
    assert result.weight.dtype == dtype
    assert not result.weight.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(before, (weight, H, frozen), strict=True))


def _indefinite(lowest_eigenvalue: float) -> torch.Tensor:
    return torch.full((4, 4), -(1 - lowest_eigenvalue) / 3, dtype=torch.float64).fill_diagonal_(1.0)


@pytest.mark.parametrize("method", ["thanos", "sparsegpt"])
@pytest.mark.parametrize(
    ("lowest_eigenvalue", "damping", "enough"),
    [(-0.05, 0.01, 0.1), (-0.5, 0.01, 1.0), (-5e-7, 0.0, 1e-6), (-5e-6, 0.0, 1e-5)],
)
def test_a_failed_factorisation_is_tried_again_with_more_damping(lowest_eigenvalue, damping, enough, method):
    weight, H = layer(3, 4)[0], _indefinite(lowest_eigenvalue)
    with pytest.warns(UserWarning, match=rf"damping={damping:g}; {enough:g} was used"):
        retried = prune(weight, H, NM(2, 4), method=method, damping=damping)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        asked = prune(weight, H, NM(2, 4), method=method, damping=enough)
    assert torch.equal(retried.weight, asked.weight)


@pytest.mark.filterwarnings("ignore:the Hessian is not positive definite")
def test_the_matrices_of_a_failed_attempt_are_gone_in_the_next(monkeypatch):
    factored = linalg.inverse_factor
    damped = []

    def factor(matrix):
        assert all(earlier() is None for earlier in damped)
        damped.append(weakref.ref(matrix))
        return factored(matrix)

    monkeypatch.setattr(linalg, "inverse_factor", factor)
    prune(layer(3, 4)[0], _indefinite(-0.05), NM(2, 4))
    assert len(damped) == 2


@pytest.mark.parametrize("damping", [0.0, 0.01, 0.3, 1.5])
def test_at_the_end_of_the_ladder_is_an_error_that_says_what_to_do(damping):
    with pytest.raises(FactorizationError, match=r"even with 1\S* times the mean .* HessianAccumulator"):
        prune(layer(3, 4)[0], _indefinite(-5.0), NM(2, 4), damping=damping)
    assert issubclass(FactorizationError, SolverError)
    assert issubclass(SolverError, ValueError)


def test_a_result_beyond_the_dtype_is_an_error():
    weight = torch.tensor([[50000.0, 60000.0]], dtype=torch.float16)
    H = torch.ones(2, 2) + 1e-3 * torch.eye(2)
    with pytest.raises(NonFiniteError, match=r"overflow torch\.float16"):
        prune(weight, H, Unstructured(0.5), damping=1e-4)
    with pytest.raises(NonFiniteError, match=r"overflow torch\.float16"):
        losses_at(weight, Factors(H), [Unstructured(0.5)], SolverOptions(damping=1e-4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": torch.ones(8)}, "not a non-empty floating-point matrix"),
        ({"weight": torch.ones(0, 8)}, "not a non-empty"),
        ({"weight": torch.ones(3, 8, dtype=torch.int64)}, "floating-point matrix"),
        ({"weight": torch.full((3, 8), math.nan)}, "weight holds NaN"),
        ({"hessian": torch.ones(8, 4)}, r"hessian of shape \(8, 4\)"),
        ({"hessian": torch.eye(8, dtype=torch.int64)}, "dtype torch.int64"),
        ({"hessian": torch.full((8, 8), math.nan)}, "hessian holds NaN"),
        ({"hessian": torch.eye(8) + torch.ones(8, 8).triu()}, "not symmetric"),
        ({"hessian": torch.eye(8, device="meta")}, "hessian is on meta"),
        ({"hessian": None}, "needs a Hessian"),
        ({"hessian": None, "method": "magnitude", "refine_steps": 1}, "needs a Hessian"),
        ({"frozen": torch.zeros(3, 8)}, "has to be bool"),
        ({"frozen": torch.zeros(3, 4, dtype=torch.bool)}, r"weight's shape \(3, 8\)"),
        ({"frozen": torch.zeros(3, 8, dtype=torch.bool, device="meta")}, "frozen is on meta"),
        ({"output_weights": torch.ones(8)}, r"output_weights has shape \(8,\) .* one number for each of the 3 rows"),
        ({"output_weights": torch.ones(3, dtype=torch.int64)}, "has to be floating-point"),
        ({"output_weights": torch.tensor([1.0, 0.0, 1.0])}, "not finite and positive"),
        ({"output_weights": torch.ones(3, device="meta")}, "output_weights is on meta"),
        ({"pattern": NM(2, 3)}, r"divisible by 3, and a \(3, 8\) weight has 8"),
        ({"pattern": Structured(0.9)}, "all 8 columns"),
        ({"pattern": Experts(0.5)}, r"Experts\(sparsity=0.5\) is for all experts of a mixture together"),
    ],
)
def test_bad_input(arguments, message):
    valid = {"weight": torch.ones(3, 8), "hessian": torch.eye(8), "pattern": NM(2, 4)}
    valid |= arguments
    with pytest.raises(ValueError, match=message):
        prune(valid.pop("weight"), valid.pop("hessian"), valid.pop("pattern"), **valid)


@pytest.mark.parametrize("at_a_time", [5 * 24, 2**22])
@pytest.mark.parametrize("options", [{"admm_steps": 3}, {"admm_steps": 6, "refine_steps": 2}, {"refine_steps": 3}])
def test_rows_that_were_pruned_before_stay_and_others_improve_some_at_a_time_as_all_at_once(
    options, at_a_time, monkeypatch
):
    weight, H = (one.double() for one in layer(37, 24))
    half = prune(weight, H, NM(2, 4, outlier_fraction=0.5), **options)
    dense = half.mask.all(dim=1)
    assert dense.sum() == 18
    torch.testing.assert_close(half.weight[dense], weight[dense])
    alone = prune(half.weight[dense], H, NM(2, 4), **options)
    monkeypatch.setattr("thanos_lightning.solver.layer._IMPROVED_AT_A_TIME", at_a_time)
    monkeypatch.setattr("thanos_lightning.solver.layer._ROWS_AT_A_TIME", 1)
    split = prune(half.weight[dense], H, NM(2, 4), **options)
    assert torch.equal(split.mask, alone.mask)
    torch.testing.assert_close(split.weight, alone.weight)
    whole = prune(half.weight, H, NM(2, 4), **options, frozen=~half.mask)
    assert torch.equal(whole.mask[~dense], half.mask[~dense])
    assert torch.equal(whole.mask[dense], alone.mask)
    torch.testing.assert_close(whole.weight[~dense], half.weight[~dense])
    torch.testing.assert_close(whole.weight[dense], alone.weight)
    assert whole.loss == pytest.approx(alone.loss)


@property_based
@given(methods, patterns, shapes, st.integers(0, 3), st.booleans())
def test_output_weights_are_those_of_scaled_rows(method, pattern, shape, seed, improved):
    weight, H = layer(*shape, seed)
    weights = 10 ** torch.empty(shape[0], dtype=torch.float64).uniform_(-2, 2)
    options = {"method": method, "admm_steps": 4 * improved, "refine_steps": 2 * improved}
    result = prune(weight.double(), H.double(), pattern, **options, output_weights=weights)
    scale = weights.sqrt().unsqueeze(1)
    scaled = prune(weight.double() * scale, H.double(), pattern, **options)
    assert torch.equal(result.mask, scaled.mask)
    torch.testing.assert_close(result.weight * scale, scaled.weight)
    error = weight.double() - result.weight
    assert result.loss == pytest.approx(0.5 * float((error @ H.double() * error).sum()))


@property_based
@given(methods, patterns, shapes, st.integers(0, 3), st.booleans())
def test_losses_at_several_patterns_are_those_of_each(method, pattern, shape, seed, weighted):
    weight, H = layer(*shape, seed)
    weights = torch.rand(shape[0], generator=torch.Generator().manual_seed(seed)) + 0.1 if weighted else None
    tried = [pattern, pattern.with_sparsity(pattern.sparsity / 2)]
    options = SolverOptions(method, 8, saliency="wanda", admm_steps=2, refine_steps=1)
    losses, dense = losses_at(weight, Factors(H.float()), tried, options, weights)
    for one, lost in zip(tried, losses, strict=True):
        alone = prune(weight, H.float(), one, method=method, block_size=8, output_weights=weights)
        assert float(lost.sum()) == pytest.approx(alone.loss, rel=1e-5, abs=1e-8)
        assert relative(float(lost.sum()), float(dense.sum())) == pytest.approx(alone.relative_loss, rel=1e-5)
