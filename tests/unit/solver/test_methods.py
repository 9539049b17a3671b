"""Each method against its reference, and what is its own."""

import math
from pathlib import Path

import pytest
import torch
from cases import PATTERNS, layer
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import channels, damped, optimum, sparsegpt, thanos_nm, thanos_structured, thanos_unstructured, wanda
from safetensors import safe_open

from thanos_lightning.solver import NM, Channels, HessianAccumulator, Structured, Unstructured, parse_pattern, prune

GOLDEN = sorted((Path(__file__).parents[2] / "data").glob("*.safetensors"))


def test_the_golden_layers_are_there():
    assert len(GOLDEN) == 6


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_layers(path):
    """What the paper's authors' code gave for the same layers, float32."""
    with safe_open(path, "pt") as file:
        weight, inputs, expected = (file.get_tensor(name) for name in ("weight", "inputs", "expected"))
        case = file.metadata()
    accumulator = HessianAccumulator(inputs.shape[1])
    accumulator.update(inputs)
    pattern = parse_pattern(case["pattern"], float(case["sparsity"]), float(case["outlier_fraction"]))
    result = prune(
        weight, accumulator.compute(), pattern, block_size=int(case["block_size"]), damping=float(case["percdamp"])
    )
    agree = (result.weight != 0) == (expected != 0)
    assert agree.float().mean() >= 0.999
    assert ((result.weight - expected) * agree).norm() < 1e-5 * expected.norm()
    assert int((~result.mask).sum()) == pattern.num_pruned(*weight.shape)
    assert pattern.violations(expected != 0) == 0


@pytest.mark.parametrize("dead", [(), (4, 17)])
@pytest.mark.parametrize("block_size", [1, 5, 8, 24, 100])
def test_thanos_against_the_reference(block_size, dead):
    weight, H = layer(9, 24, dead=dead)
    weight[3, ::3] *= 100  # an outlier that would choose other columns
    for pattern, expected in (
        (Unstructured(0.35), thanos_unstructured(weight, H, 0.35, block_size, 0.01)),
        (Unstructured(0.7), thanos_unstructured(weight, H, 0.7, block_size, 0.01)),
        (NM(2, 4), thanos_nm(weight, H, 2, 4, 0.0, block_size, 0.01)),
        (NM(1, 8, 0.3), thanos_nm(weight, H, 1, 8, 0.3, block_size, 0.01)),
        (Structured(0.3), thanos_structured(weight, H, 0.3, 0.0, 0.01)),
        (Structured(0.4, 0.3), thanos_structured(weight, H, 0.4, 0.3, 0.01)),
        (Channels(0.3), channels(weight, H, 7, 0.01)),
        (Channels(0.8), channels(weight, H, 19, 0.01)),
    ):
        result = prune(weight.double(), H, pattern, block_size=block_size)
        torch.testing.assert_close(result.weight, expected)
        in_float32 = prune(weight, H.float(), pattern, block_size=block_size)
        torch.testing.assert_close(in_float32.weight, expected.float(), rtol=1e-3, atol=1e-4)


@settings(derandomize=True, max_examples=60)
@given(
    st.integers(1, 7), st.integers(1, 12), st.floats(0.05, 0.95), st.integers(0, 5), st.sampled_from([0.0, 0.2, 0.8])
)
def test_one_block_gives_the_exact_optimum_of_its_mask(rows, cols, sparsity, seed, density):
    """Also of what is frozen: sets of each row from no pattern at all, as an earlier event with another one left."""
    weight, H = layer(rows, cols, seed)
    frozen = torch.rand(rows, cols, generator=torch.Generator().manual_seed(seed)) < density
    for pattern in (Unstructured(sparsity), Channels(sparsity)):
        result = prune(weight.double(), H, pattern, block_size=cols, frozen=frozen)
        assert not result.mask[frozen].any()
        torch.testing.assert_close(result.weight, optimum(weight, damped(H, 0.01), result.mask))


@pytest.mark.parametrize("dead", [(), (4, 17)])
@pytest.mark.parametrize("block_size", [1, 8, 10, 24, 100])
def test_sparsegpt_against_the_reference(block_size, dead):
    weight, H = layer(9, 24, dead=dead)
    for pattern, text in ((Unstructured(0.3), "0.3"), (Unstructured(0.65), "0.65"), (NM(2, 4), "2:4")):
        result = prune(weight.double(), H, pattern, method="sparsegpt", block_size=block_size)
        torch.testing.assert_close(result.weight, sparsegpt(weight, H, text, block_size, 0.01))


def test_columns_of_sparsegpt_are_adapted_to_by_the_columns_to_their_right():
    weight, H = layer(4, 12)
    result = prune(weight.double(), H, Structured(0.25), method="sparsegpt", block_size=5)
    removed = (~result.mask).all(0)
    assert removed.sum() == 3
    first = int(removed.int().argmax())
    assert torch.equal(result.weight[:, :first], weight.double()[:, :first])
    assert not torch.equal(result.weight[:, first + 1 :], (weight.double() * result.mask)[:, first + 1 :])


def test_wanda_against_the_reference_to_the_last_bit():
    weight, H = layer(9, 24)
    weight = weight.double() + 1e-12
    assert torch.equal(prune(weight, H.float(), Unstructured(0.5), method="wanda").weight, wanda(weight, H, 12))


def test_by_magnitude_the_smallest_of_the_layer_go():
    weight = torch.tensor([[1.0, -5.0], [-0.5, 0.25]])
    assert prune(weight, None, Unstructured(0.5), method="magnitude").weight.tolist() == [[1.0, -5.0], [0.0, 0.0]]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_to_magnitude_the_hessian_changes_nothing_but_the_loss(pattern):
    weight, H = layer(20, 16)
    weight = weight.double() + 1e-12
    with_hessian, without = (prune(weight, h, pattern, method="magnitude") for h in (H.float(), None))
    assert torch.equal(with_hessian.mask, without.mask)
    assert torch.equal(with_hessian.weight, weight * without.mask)
    assert torch.equal(without.weight, weight * without.mask)
    assert with_hessian.loss > 0
    assert math.isnan(without.loss)
    assert math.isnan(without.relative_loss)
