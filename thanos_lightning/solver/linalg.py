"""Linear algebra of one layer: exact arithmetic, damping, the triangular factor, and batched solves.

Legend (arXiv 2504.05346, and Frantar and Alistarh, arXiv 2301.00774):
    H   (cols, cols)  damped Hessian, symmetric positive definite
    R   (cols, cols)  upper triangular with H = R Rᵀ
    U   (cols, cols)  upper triangular, U = R⁻¹, so that H⁻¹ = Uᵀ U. U is a factor of the inverse, not the inverse

Because R is *upper* triangular, the trailing blocks factor alone: H[i:, i:] = R[i:, i:] R[i:, i:]ᵀ, and so
(H[i:, i:])⁻¹ = U[i:, i:]ᵀ U[i:, i:] for every i. One factorisation serves every block of every method.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

# The largest damping to try: it adds the whole mean of the diagonal.
MAX_DAMPING = 1.0
# The first retry if damping=0 does not suffice, since ten times zero would not help.
_LEAST_RETRY = 1e-6
# Bound on the relative error of float32 products with unrounded factors, which is near 3e-7. With bf16 it is 2e-3.
_UNROUNDED = 5e-6
# LAPACK is slow on batches of small matrices. It is at its best up to this size; above we recurse. CPU only.
_CHOLESKY_LEAF = 16
# Single matrices are split into halves down to this size, since products are several times as fast as LAPACK. On CPUs
# the factorisation itself is split, elsewhere (not measured) only the inverse of the triangle.
_LEAF = 256
# Products with a symmetric matrix are computed in strips, which is little more than half the work.
_STRIPS, _LEAST_STRIP = 8, 128


class SolverError(ValueError):
    """A layer cannot be solved; the message says why and what to try next."""


class NonFiniteError(SolverError):
    """A weight or a Hessian holds NaN or Inf, or a solution does not fit the weight's dtype."""


class FactorizationError(SolverError):
    """A Cholesky factorisation failed: the damped Hessian is not positive definite.

    Every function of the solver that factors a matrix raises it where the matrix is not numerically positive definite.
    """


@contextmanager
def exact_arithmetic(device: torch.device, operands: torch.dtype = torch.float32) -> Iterator[None]:
    """Turn off gradients, autocast and the rounding of factors inside float32 products. Restore all at the end.

    ``operands`` is the dtype of all factors before they were widened to float32. Factors that fit a narrower type
    exactly (bf16 in bf16 on CPUs; bf16 and fp16 in TF32 on NVIDIA GPUs) are multiplied in it and summed in float32. The
    products are the same, several times faster.
    """
    with torch.no_grad(), torch.autocast(device.type, enabled=False), _highest_precision():
        # _highest_precision restores these switches
        if device.type == "cpu" and (operands == torch.bfloat16 or _has_no_rounding_kernel()):
            torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # type: ignore[attr-defined]
        elif operands in (torch.bfloat16, torch.float16) and device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = True
        yield


@functools.cache
def _has_no_rounding_kernel() -> bool:
    """Whether oneDNN leaves float32 factors unrounded even where it may round them to bf16.

    This is so on CPUs without AMX. There the permission to round only selects oneDNN in place of BLAS, which takes half
    of MKL's time on an AMD EPYC. The function measures what oneDNN does on this machine. Call it where float32 products
    are exact.
    """
    if not torch.backends.mkldnn.is_available() or torch.cpu._is_amx_tile_supported():  # type: ignore[no-untyped-call]
        return False
    # dtype and device are explicit, since the defaults of the first caller are unknown
    generator = torch.Generator("cpu").manual_seed(0)
    left = torch.randn(192, 512, generator=generator, dtype=torch.float32, device="cpu")
    right = torch.randn(512, 320, generator=generator, dtype=torch.float32, device="cpu")
    exact = left.double() @ right.double()
    backend: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before, backend.fp32_precision = backend.fp32_precision, "bf16"
    try:
        error = torch.linalg.norm(left @ right - exact) / torch.linalg.norm(exact)
    finally:
        backend.fp32_precision = before
    return bool(error < _UNROUNDED)


@contextmanager
def _highest_precision() -> Iterator[None]:
    # torch has two sets of switches, the second finer. Once a user has mixed the two sets, the getter of the old set
    # raises. Its setter never raises, and writes both sets. So we set the old one, then restore old (if read) and new.
    try:
        overall = torch.get_float32_matmul_precision()
    except RuntimeError:
        overall = None
    backends: list[Any] = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
    finer = [backend.fp32_precision for backend in backends]
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if overall is not None:
            torch.set_float32_matmul_precision(overall)
        for backend, value in zip(backends, finer, strict=True):
            backend.fp32_precision = value


@dataclass(frozen=True)
class Curvature:
    """What the methods need to know about a layer's inputs."""

    # U, upper triangular, with (H[i:, i:])⁻¹ = U[i:, i:]ᵀ U[i:, i:] for the damped H and every i
    factor: Float[Tensor, "cols cols"]
    norms: Float[Tensor, " cols"]  # ‖X_j‖ up to a common scale: the square root of the undamped diagonal
    dead: Bool[Tensor, " cols"]  # True for inputs that were always zero


def curvature(hessian: Float[Tensor, "cols cols"], damping: float) -> Curvature:
    """Damp and factor an undamped H, which is symmetric positive semi-definite, in float32 or float64.

    ``damping`` is relative to mean(diag H).
    """
    return Curvature(
        factor=inverse_factor(damped(hessian, damping)), norms=input_norms(hessian), dead=hessian.diagonal() == 0
    )


def input_norms(hessian: Float[Tensor, "cols cols"]) -> Float[Tensor, " cols"]:
    """‖X_j‖ over the largest ‖X_k‖, from the diagonal of an undamped Hessian; all zero if H is zero."""
    norms = hessian.diagonal().clamp(min=0).sqrt()
    return norms / norms.max().clamp(min=torch.finfo(norms.dtype).tiny)


def damped(hessian: Float[Tensor, "cols cols"], damping: float) -> Float[Tensor, "cols cols"]:
    """H with ``damping`` times mean(diag H) added to its diagonal, and 1 on the diagonal of dead inputs.

    Row and column of a dead input (H_jj = 0) are zero, so that the 1 changes no solution and only makes H invertible.
    The mean counts a dead input as 0, so that the solution does not depend on the scale of H.
    """
    result = hessian.clone()
    result.diagonal().copy_(damped_diagonal(hessian, damping))
    return result


def damped_diagonal(hessian: Float[Tensor, "cols cols"], damping: float) -> Float[Tensor, " cols"]:
    """The diagonal of the damped H."""
    diagonal = hessian.diagonal()
    return torch.where(diagonal == 0, 1.0, diagonal + damping * diagonal.mean())


def damping_ladder(damping: float) -> Iterator[float]:
    """Yield the dampings to try in turn: the given one, then ten times more each, up to ``MAX_DAMPING``."""
    yield damping
    power = 1
    start = damping or _LEAST_RETRY / 10
    while (higher := round(start * 10**power, 12)) <= MAX_DAMPING:
        yield higher
        power += 1


def cholesky(matrix: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """The lower triangular L with L Lᵀ = ``matrix``."""
    factored = torch.linalg.cholesky_ex(matrix)
    _refuse_failed(bool(factored.info))
    lower: Tensor = factored.L
    return lower


def _refuse_failed(failed: bool) -> None:
    if failed:
        raise FactorizationError("the Cholesky factorisation met a pivot that is not positive")


def inverse_factor(hessian: Float[Tensor, "cols cols"]) -> Float[Tensor, "cols cols"]:
    """The upper triangular U with (H[i:, i:])⁻¹ = U[i:, i:]ᵀ U[i:, i:] for every i.

    Equivalent to ``torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)``, without forming the inverse.
    """
    n = len(hessian)
    if n <= _LEAF or hessian.device.type != "cpu":
        # Reversing both axes turns the lower Cholesky factor into the upper one that we want: H = R Rᵀ.
        return _inverse_of_triangle(cholesky(hessian.flip(0, 1)).flip(0, 1))
    half = n // 2
    rest = inverse_factor(hessian[half:, half:])
    right = hessian[:half, half:] @ rest.mT  # R[:half, half:]
    top = inverse_factor(torch.addmm(hessian[:half, :half], right, right.mT, alpha=-1))
    return _triangle(top, right, rest)


def _inverse_of_triangle(R: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """R⁻¹ of an upper triangular R."""
    n = len(R)
    if n <= _LEAF:
        inverse: Tensor = torch.linalg.solve_triangular(R, torch.eye(n, dtype=R.dtype, device=R.device), upper=True)
        return inverse
    half = n // 2
    top, rest = _inverse_of_triangle(R[:half, :half]), _inverse_of_triangle(R[half:, half:])
    return _triangle(top, R[:half, half:], rest)


def _triangle(
    top: Float[Tensor, "left left"], right: Float[Tensor, "left below"], rest: Float[Tensor, "below below"]
) -> Float[Tensor, "n n"]:
    """Invert an upper triangular matrix, from the inverses of its diagonal blocks and its upper right block."""
    half, n = right.shape[0], right.shape[0] + right.shape[1]
    result = right.new_zeros(n, n)
    result[:half, :half], result[half:, half:] = top, rest
    torch.mm(top @ right, rest, out=result[:half, half:]).neg_()
    return result


def inverse(matrix: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """Invert a symmetric positive definite matrix, with less work than `inverse_factor`.

    It should not be nearly singular: the inverse loses as many digits as two factorisations do.
    """
    n = len(matrix)
    if n <= _LEAF or matrix.device.type != "cpu":
        return torch.cholesky_inverse(cholesky(matrix))
    # by the Schur complement of the first half
    half = n // 2
    first = inverse(matrix[:half, :half])
    moved = first @ matrix[:half, half:]
    result = torch.empty_like(matrix)
    result[half:, half:] = inverse(torch.addmm(matrix[half:, half:], matrix[half:, :half], moved, alpha=-1))
    corner = moved @ result[half:, half:]
    torch.addmm(first, corner, moved.mT, out=result[:half, :half])
    torch.neg(corner, out=result[:half, half:])
    result[half:, :half] = result[:half, half:].mT
    return result


def quadratic_forms(vectors: Float[Tensor, "rows n"], matrix: Float[Tensor, "n n"]) -> Float[Tensor, " rows"]:
    """Compute x A xᵀ for each row x and a symmetric A. Only strips of A from the diagonal down are multiplied."""
    n = len(matrix)
    width = max(_LEAST_STRIP, -(-n // _STRIPS))
    total = vectors.new_zeros(len(vectors))
    for start in range(0, n, width):
        stop = min(start + width, n)
        own = vectors[:, start:stop]
        moved = own @ matrix[start:stop, start:stop]
        if stop < n:
            moved.addmm_(vectors[:, stop:], matrix[stop:, start:stop], alpha=2)
        total += torch.linalg.vecdot(moved, own)
    return total


def _factor_batch(matrices: Float[Tensor, "batch n n"]) -> Bool[Tensor, " batch"]:
    """Factor each matrix by Cholesky in place, into the lower triangle. True where that failed."""
    n = matrices.shape[-1]
    if n <= _CHOLESKY_LEAF or matrices.device.type != "cpu":
        lower, info = torch.linalg.cholesky_ex(matrices)
        matrices.copy_(lower)
        failed: Tensor = info != 0
        return failed
    half = n // 2
    top, corner, rest = matrices[:, :half, :half], matrices[:, half:, :half], matrices[:, half:, half:]
    failed = _factor_batch(top)
    # `solved` is contiguous. A batched product of views would fall back to one product at a time.
    solved = torch.linalg.solve_triangular(top.mT, corner, upper=True, left=False)
    corner.copy_(solved)
    rest.sub_(solved @ solved.mT)
    return failed | _factor_batch(rest)


def _systems_at_a_time(device: torch.device) -> int:
    """Bytes of systems to gather: they should fit the cache of a CPU; elsewhere kernel launches are the cost."""
    return (4 if device.type == "cpu" else 64) * 2**20


def subsets_bytes(rows: int, size: float, device: torch.device) -> float:
    """Estimate what ``solve_subsets`` takes for sets of one size in float32: indices, systems and their factors.

    On CPUs most of the factors replace the systems.
    """
    return (2.8 if device.type == "cpu" else 3.75) * min(4 * rows * size**2, _systems_at_a_time(device))


def solve_subsets(
    matrix: Float[Tensor, "n n"], members: Bool[Tensor, "rows n"], rhs: Float[Tensor, "rows n"]
) -> Float[Tensor, "rows n"]:
    """Solve matrix[s, s] x[s] = rhs[s] for each row, where s is the set of its members; x is zero elsewhere.

    The systems are gathered without gaps, in chunks of rows with sets of similar size. Smaller systems of a chunk are
    padded with the identity. The systems of a chunk take ``_systems_at_a_time`` bytes at most, unless one system alone
    exceeds it. The matrix is symmetric positive definite. Sets may have any size.
    """
    sizes, order = members.sum(1).sort(descending=True)
    counts = sizes.tolist()
    n, largest, padding = len(matrix), counts[0], counts[0] - counts[-1]
    # The padding points to an identity block that follows the matrix.
    extended = torch.eye(n + padding, dtype=matrix.dtype, device=matrix.device)
    extended[:n, :n] = matrix
    index_dtype = torch.int32 if extended.numel() < 2**31 else torch.int64
    column = members.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[order, :largest]
    beyond = torch.arange(largest, device=matrix.device) - sizes.unsqueeze(1)
    column = torch.where(beyond < 0, column, n + beyond)
    values = torch.cat([rhs, rhs.new_zeros(len(rhs), padding)], dim=1)[order].gather(1, column)
    solution = torch.zeros_like(values)
    budget = _systems_at_a_time(matrix.device) // matrix.element_size()
    start = 0
    while start < len(counts) and counts[start] > 0:
        size = counts[start]
        stop = start + max(1, budget // size**2)
        index = column[start:stop, :size].to(index_dtype)
        flat = (index.unsqueeze(2) * len(extended) + index.unsqueeze(1)).flatten()
        systems = extended.flatten().index_select(0, flat).view(-1, size, size)
        failed = _factor_batch(systems)
        halfway = torch.linalg.solve_triangular(systems, values[start:stop, :size, None], upper=False)
        solution[start:stop, :size] = torch.linalg.solve_triangular(systems.mT, halfway, upper=True).squeeze(-1)
        _refuse_failed(bool(failed.any()))
        start = stop
    scattered = rhs.new_zeros(len(rhs), n + padding).scatter_(1, column, solution)
    return torch.empty_like(rhs).index_copy_(0, order, scattered[:, :n])
