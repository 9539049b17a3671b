"""The methods as their papers print them: float64, one inverse per block, one row at a time. Slow, and obvious.

Nothing here is shared with the package. A choice is bool, True = pruned.
"""

import math

import torch
from torch import Tensor


def damped(H: Tensor, damping: float) -> Tensor:
    H = H.double().clone()
    mean = H.diagonal().mean()
    for j in range(len(H)):
        H[j, j] = 1.0 if H[j, j] == 0 else H[j, j] + damping * mean
    return H


def _start(W: Tensor, H: Tensor) -> tuple[Tensor, Tensor]:
    W = W.double().clone()
    W[:, H.diagonal() == 0] = 0
    return W, H.double().diagonal().sqrt()


def _outliers(W: Tensor, norms: Tensor, fraction: float) -> set[int]:
    energy = (W * norms).square().sum(1).tolist()
    by_energy = sorted(range(len(W)), key=lambda i: -energy[i])
    return set(by_energy[: math.floor(fraction * len(W))])


def _remove_jointly(W: Tensor, Hd: Tensor, start: int, pruned: Tensor) -> None:
    """The joint update of arXiv 2504.05346 for each row: w <- w - u R̂⁻¹ R, R = H⁻¹[q], R̂ = R[:, q], u = w[q]."""
    inverse = torch.linalg.inv(Hd[start:, start:])
    for i in range(len(W)):
        q = pruned[i].nonzero().flatten()
        if len(q) == 0:
            continue
        R = inverse[q]
        multipliers = torch.linalg.solve(R[:, q].T, W[i, start + q])
        W[i, start:] -= multipliers @ R
        W[i, start + q] = 0


def thanos_unstructured(W: Tensor, H: Tensor, sparsity: float, block: int, damping: float) -> Tensor:
    (W, norms), Hd = _start(W, H), damped(H, damping)
    left = int(sparsity * W.numel())
    for start in range(0, W.shape[1], block):
        scores = W[:, start:].abs() * norms[start:]
        everywhere = torch.zeros(scores.numel(), dtype=torch.bool)
        everywhere[scores.flatten().argsort(stable=True)[:left]] = True
        pruned = everywhere.view_as(scores)[:, :block]
        left -= int(pruned.sum())
        _remove_jointly(W, Hd, start, pruned)
    return W


def thanos_nm(W: Tensor, H: Tensor, n: int, m: int, outlier_fraction: float, block: int, damping: float) -> Tensor:
    (W, norms), Hd = _start(W, H), damped(H, damping)
    outliers = _outliers(W, norms, outlier_fraction)
    block = math.ceil(block / m) * m
    for start in range(0, W.shape[1], block):
        scores = W[:, start : start + block].abs() * norms[start : start + block]
        pruned = torch.zeros_like(scores, dtype=torch.bool)
        for i in range(len(W)):
            for group in range(0, scores.shape[1], m):
                if i not in outliers:
                    pruned[i, group + scores[i, group : group + m].argsort(stable=True)[: m - n]] = True
        _remove_jointly(W, Hd, start, pruned)
    return W


def thanos_structured(W: Tensor, H: Tensor, sparsity: float, outlier_fraction: float, damping: float) -> Tensor:
    (W, norms), Hd = _start(W, H), damped(H, damping)
    others = [i for i in range(len(W)) if i not in _outliers(W, norms, outlier_fraction)]
    energy = (W[others] * norms).square().sum(0)
    columns = energy.argsort(stable=True)[: math.ceil(sparsity * W.shape[1] / (1 - outlier_fraction))]
    pruned = torch.zeros_like(W, dtype=torch.bool)
    for i in others:
        pruned[i, columns] = True
    _remove_jointly(W, Hd, 0, pruned)
    return W


def channels(W: Tensor, H: Tensor, count: int, damping: float) -> Tensor:
    """Removes one column after the other: the geometric mean of what it costs if all others adapt, or none."""
    (W0, norms), Hd = _start(W, H), damped(H, damping)
    gone: list[int] = []

    def best_without(columns: list[int]) -> Tensor:
        keep = torch.ones_like(W0, dtype=torch.bool)
        keep[:, columns] = False
        return optimum(W0, Hd, keep)

    for _ in range(count):
        now = best_without(gone)
        base = float(((W0 - now) @ Hd * (W0 - now)).sum())
        costs = {}
        for j in set(range(W.shape[1])) - set(gone):
            without = best_without([*gone, j])
            adapted = max(0.0, float(((W0 - without) @ Hd * (W0 - without)).sum()) - base)
            costs[j] = adapted * float(now[:, j].square().sum()) * float(norms[j]) ** 2
        gone.append(min(sorted(costs), key=lambda j: costs[j]))
    return best_without(gone)


def sparsegpt(W: Tensor, H: Tensor, choose: str, block: int, damping: float) -> Tensor:
    """Algorithm 1 of arXiv 2301.00774; ``choose`` is "2:4", or a sparsity as text for equal shares of each block."""
    (W, _), Hd = _start(W, H), damped(H, damping)
    rows, cols = W.shape
    U = torch.linalg.cholesky(torch.linalg.inv(Hd), upper=True)
    pruned = torch.zeros_like(W, dtype=torch.bool)
    given = 0
    for j in range(cols):
        if choose == "2:4" and j % 4 == 0:
            for i in range(rows):
                pruned[i, j + (W[i, j : j + 4] / U.diagonal()[j : j + 4]).square().argsort()[:2]] = True
        if choose != "2:4" and j % block == 0:
            stop = min(j + block, cols)
            count = int(int(float(choose) * W.numel()) * (rows * stop) // W.numel()) - given
            given += count
            scores = (W[:, j:stop] / U.diagonal()[j:stop]).square()
            part = torch.zeros(scores.numel(), dtype=torch.bool)
            part[scores.flatten().argsort()[:count]] = True
            pruned[:, j:stop] = part.view_as(scores)
        for i in range(rows):
            if pruned[i, j]:
                W[i, j:] -= W[i, j] / U[j, j] * U[j, j:]
                W[i, j] = 0
    return W


def wanda(W: Tensor, H: Tensor, per_row: int) -> Tensor:
    W, norms = W.double().clone(), H.double().diagonal().sqrt()
    for i in range(len(W)):
        W[i, (W[i].abs() * norms).argsort()[:per_row]] = 0
    return W


def optimum(W: Tensor, H: Tensor, keep: Tensor) -> Tensor:
    """The best weights for a mask: min tr((X - W) H (X - W)ᵀ) over X that are zero where not kept."""
    W, H = W.double(), H.double()
    best = torch.zeros_like(W)
    for i in range(len(W)):
        k = keep[i].nonzero().flatten()
        best[i, k] = torch.linalg.lstsq(H[k][:, k], (H[k] @ W[i]).unsqueeze(1), driver="gelsd").solution.squeeze(1)
    return best


def admm(
    start: Tensor,
    original: Tensor,
    hessian: Tensor,
    keep: Tensor,
    frozen: Tensor,
    width: int,
    penalties: list[float],
    cost: Tensor,
    relaxation: float = 1.3,
) -> tuple[Tensor, Tensor]:
    """Over-relaxed ADMM in scaled form (Boyd et al., 2011, sections 3.1.1 and 3.4.3), row by row, from a pruned weight.

    Where penalties differ by less than a factor of 0.7, X is solved for with their geometric mean.
    """
    D = damped(hessian.double(), 0.01)
    nearly_constant = penalties[0] >= 0.7 * penalties[-1]
    result, mask = torch.zeros_like(original, dtype=torch.float64), torch.zeros_like(keep)
    for row in range(len(original)):
        w0, z = original[row].double(), start[row].double()
        its_mask = keep[row].clone()
        u = torch.where(its_mask, 0.0, (w0 - z) @ hessian.double() / (penalties[0] * cost))
        for step, penalty in enumerate(penalties):
            solved_with = (penalties[0] * penalties[-1]) ** 0.5 if nearly_constant else penalty
            C = torch.diag(solved_with * cost)
            x = torch.linalg.solve(D + C, D @ w0 + C @ (z - u))
            total = relaxation * x + (1 - relaxation) * z + u
            scores = torch.where(frozen[row], -1.0, cost * total.square())
            for first in range(0, len(w0), width):
                group = slice(first, first + width)
                count = int(its_mask[group].sum())
                its_mask[group] = False
                its_mask[first + scores[group].argsort(descending=True, stable=True)[:count]] = True
            z = torch.where(its_mask, total, 0.0)
            u = total - z
            if step + 1 < len(penalties):
                u = u * penalty / penalties[step + 1]
        result[row], mask[row] = z, its_mask
    return result, mask
