from pathlib import Path

import pytest
import torch
from cases import layer
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import channels, damped, optimum, thanos_nm, thanos_structured, thanos_unstructured
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
def test_against_the_reference(block_size, dead):
    weight, H = layer(9, 24, dead=dead)
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


@settings(derandomize=True, max_examples=30)
@given(st.integers(1, 7), st.integers(1, 12), st.floats(0.05, 0.95), st.integers(0, 5))
def test_one_block_gives_the_exact_optimum_of_its_mask(rows, cols, sparsity, seed):
    weight, H = layer(rows, cols, seed)
    result = prune(weight.double(), H, Unstructured(sparsity), block_size=cols)
    torch.testing.assert_close(result.weight, optimum(weight, damped(H, 0.01), result.mask))


@settings(derandomize=True, max_examples=30)
@given(st.integers(0, 1000), st.floats(0.0, 1.0))
def test_frozen_sets_of_any_shape_are_solved_jointly(seed, density):
    """Per-row sets from no pattern at all, as they come from an earlier event with another pattern."""
    weight, H = layer(6, 10, seed)
    frozen = torch.rand(6, 10, generator=torch.Generator().manual_seed(seed)) < density
    result = prune(weight.double(), H, Structured(0.2), frozen=frozen)
    assert not result.mask[frozen].any()
    torch.testing.assert_close(result.weight, optimum(weight, damped(H, 0.01), result.mask))
