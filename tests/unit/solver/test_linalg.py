import contextlib

import pytest
import torch
from cases import layer, other_defaults

from thanos_lightning.solver import FactorizationError
from thanos_lightning.solver.linalg import (
    _has_no_rounding_kernel,
    _highest_precision,
    damped,
    exact_arithmetic,
    inverse,
    inverse_factor,
    solve_subsets,
)


@pytest.mark.parametrize("n", [1, 7, 8, 9, 33])
def test_halves_are_as_good_as_the_whole(n, monkeypatch):
    H = damped(layer(1, n)[1], 0.01)
    monkeypatch.setattr("thanos_lightning.solver.linalg._LEAF", 4)
    U = inverse_factor(H)
    assert torch.equal(U, U.triu())
    assert (U.diagonal() > 0).all()
    torch.testing.assert_close(U.mT @ U, torch.linalg.inv(H))
    torch.testing.assert_close(inverse(H), torch.linalg.inv(H))


@pytest.mark.parametrize("budget", [1, 20_000])
def test_solve_subsets(budget, monkeypatch):
    monkeypatch.setattr("thanos_lightning.solver.linalg._systems_at_a_time", lambda device: budget)
    H = damped(layer(1, 40)[1], 0.01)
    members = torch.rand(30, 40) < torch.rand(30, 1)
    members[0], members[1] = False, True
    rhs = torch.randn(30, 40, dtype=torch.float64)
    x = solve_subsets(H, members, rhs)
    assert not x[~members].any()
    for row in range(30):
        s = members[row]
        torch.testing.assert_close(x[row, s], torch.linalg.solve(H[s][:, s], rhs[row, s]))


@pytest.mark.parametrize("leaf", [1, 8])
@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("invert", [inverse_factor, inverse])
def test_what_is_not_positive_definite_is_refused(invert, place, leaf, monkeypatch):
    monkeypatch.setattr("thanos_lightning.solver.linalg._LEAF", leaf)
    matrix = torch.eye(3)
    matrix[place, place] = -1
    with pytest.raises(FactorizationError, match="pivot"):
        invert(matrix)
    with pytest.raises(FactorizationError, match="pivot"):
        invert(torch.ones(3, 3) - 2 * torch.eye(3))


def _precision_state() -> list[object]:
    state: list[object] = []
    try:
        state.append(torch.get_float32_matmul_precision())
    except RuntimeError:
        state.append("mixed")
    return [*state, torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision]


def _error_of_a_product() -> float:
    left, right = torch.randn(200, 700), torch.randn(700, 300)
    exact = left.double() @ right.double()
    return float(torch.linalg.norm(left @ right - exact) / torch.linalg.norm(exact))


@pytest.mark.parametrize("rounds", [True, False])
def test_a_kernel_that_rounds_is_found_out(rounds, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    multiply = torch.Tensor.__matmul__

    def kernel(left, right):
        if rounds and left.dtype == torch.float32 and torch.backends.mkldnn.matmul.fp32_precision == "bf16":
            left, right = left.bfloat16(), right.bfloat16()
        return multiply(left.double(), right.double())

    monkeypatch.setattr(torch.Tensor, "__matmul__", kernel)
    before = _precision_state()
    with other_defaults(), _highest_precision():
        assert _has_no_rounding_kernel.__wrapped__() is not rounds
    assert _precision_state() == before


@pytest.fixture
def restored_precision():
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("legacy", ["highest", "high", "medium"])
@pytest.mark.parametrize("finer", [None, "tf32"])
@pytest.mark.usefixtures("restored_precision")
def test_precision_switches_are_restored_even_where_old_and_new_are_mixed(legacy, finer):
    torch.set_float32_matmul_precision(legacy)
    if finer is not None:
        torch.backends.cuda.matmul.fp32_precision = finer
    before = _precision_state()
    with contextlib.suppress(KeyError), exact_arithmetic(torch.device("cpu")):
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert _error_of_a_product() < 1e-6
        assert not torch.is_grad_enabled()
        raise KeyError
    assert _precision_state() == before
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("operands", "device", "unrounded", "tf32", "on_cpus"),
    [
        (torch.float32, "cuda", True, False, "ieee"),
        (torch.bfloat16, "cuda", True, True, "ieee"),
        (torch.float16, "cuda", True, True, "ieee"),
        (torch.bfloat16, "cpu", False, False, "bf16"),
        (torch.float32, "cpu", True, False, "bf16"),
        (torch.float32, "cpu", False, False, "ieee"),
    ],
)
@pytest.mark.usefixtures("restored_precision")
def test_factors_are_rounded_only_to_what_they_fit(operands, device, unrounded, tf32, on_cpus, monkeypatch):
    monkeypatch.setattr("thanos_lightning.solver.linalg._has_no_rounding_kernel", lambda: unrounded)
    before = _precision_state()
    with exact_arithmetic(torch.device(device), operands=operands):
        assert torch.backends.cuda.matmul.allow_tf32 == tf32
        assert torch.backends.mkldnn.matmul.fp32_precision == on_cpus
    assert _precision_state() == before
