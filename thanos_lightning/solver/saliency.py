"""Scores that say which weights matter least, and exact choices of the lowest scores.

The methods ``wanda`` and ``magnitude`` are such choices alone, since they leave the kept weights unchanged.

Legend (arXiv 2504.05346):
    W  (rows, cols)  weights as they are now, after the updates so far
    X_j              all values of input j; its norm comes from the Hessian's diagonal
    U                factor of the inverse Hessian, see linalg.py

A choice is a bool tensor, True = to be pruned. Frozen weights have to be pruned: they score -inf, so that they are
chosen before all others and take their share of the count. Every count is exact: among equal scores a fixed order
decides.
"""

import itertools
from collections.abc import Iterator
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from thanos_lightning.solver.linalg import Curvature
from thanos_lightning.solver.pattern import NM, Solvable, Structured, Unstructured

Saliency = Literal["wanda", "obs", "balanced"]
SALIENCIES: tuple[Saliency, ...] = get_args(Saliency)
# A prime, so that a sample of a row-major matrix does not run down one column.
_SAMPLE_STRIDE = 509
_SAMPLE_FROM = 2**17
_NARROW = 8


def scales(saliency: str, curvature: Curvature, block_size: int) -> Iterator[tuple[int, Float[Tensor, " left"]]]:
    """Yield the start of each block of columns, and s_j for all columns from there on. A weight scores |W_ij| s_j.

    s_j² is the cost of pruning a weight, divided by the weight's square: see ``SolverOptions``. H there is the Hessian
    of the columns from the block on.
    """
    U, norms = curvature.factor, curvature.norms
    starts = range(0, len(U), block_size)
    if saliency == "wanda":
        yield from ((start, norms[start:]) for start in starts)
        return
    # [H[start:, start:]⁻¹]_jj = ‖U[start:, j]‖², summed over blocks of rows of U from the last block up. (torch refuses
    # the cumsum of floats on CUDA under Trainer(deterministic=True).)
    below = list(itertools.accumulate(U[start : start + block_size].square().sum(0) for start in reversed(starts)))
    for start, squares in zip(starts, reversed(below), strict=True):
        obs = torch.where(curvature.dead, 0, 1 / squares.sqrt())[start:]
        yield start, obs if saliency == "obs" else (obs * norms[start:]).sqrt()


def importance(W: Float[Tensor, "rows cols"], norms: Float[Tensor, " cols"]) -> Float[Tensor, "rows cols"]:
    """|W_ij| ‖X_j‖: the score of Wanda and of Thanos (the paper's metric for a single weight)."""
    return W.abs() * norms


def conditional_importance(W: Float[Tensor, "rows cols"], pivots: Float[Tensor, " cols"]) -> Float[Tensor, "rows cols"]:
    """W_ij² / U_jj²: SparseGPT's score, the loss of removing one weight when only columns to its right adapt."""
    return (W / pivots).square()


def num_to_prune(pattern: Unstructured, frozen: Bool[Tensor, "rows cols"]) -> int:
    """How many weights of the layer go: as many as the pattern asks for, or all frozen ones if these are more."""
    return max(pattern.num_pruned(*frozen.shape), int(frozen.sum()))


def lowest(scores: Float[Tensor, "rows cols"], count: int, width: int | None = None) -> Bool[Tensor, "rows width"]:
    """Choose the ``count`` lowest of all scores, and return the choice in the first ``width`` columns, or in all.

    Scores may be -inf, but not NaN. Ties go to the first ``width`` columns, in row order.
    """
    block = scores if width is None else scores[:, :width]
    if count <= 0:
        return torch.zeros_like(block, dtype=torch.bool)
    if count >= scores.numel():
        return torch.ones_like(block, dtype=torch.bool)
    threshold = _kth_lowest(scores.flatten(), count)
    tied = block == threshold
    ties = count - (scores < threshold).count_nonzero()
    return (block < threshold) | (tied & (tied.flatten().cumsum(0).view_as(tied) <= ties))


def _kth_lowest(values: Float[Tensor, " n"], k: int) -> Float[Tensor, ""]:
    """The k-th lowest value (from 1), exactly.

    A sorted sample brackets the value, and only the values in the bracket are searched (Floyd and Rivest, 1975). On a
    CPU this is several times faster than ``kthvalue`` of all values. If the sample misleads, all values are searched.
    """
    if len(values) >= _SAMPLE_FROM:
        low, high = _brackets(values[::_SAMPLE_STRIDE].sort().values, k / len(values))
        inside = (values >= low) & (values <= high)
        below, within = torch.stack([(values < low).count_nonzero(), inside.count_nonzero()]).tolist()
        if below < k <= below + within:
            values, k = values[inside], k - below
    # torch refuses kthvalue on CUDA under Trainer(deterministic=True)
    return values.kthvalue(k).values if values.device.type == "cpu" else values.sort().values[k - 1]


def _brackets(sample: Float[Tensor, " n"], share: float) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Two values of a sorted sample. The value that exceeds ``share`` of all values most likely lies between them."""
    position, margin = round(share * len(sample)), round(2 * len(sample) ** 0.5) + 1
    return sample[max(0, position - margin)], sample[min(len(sample) - 1, position + margin)]


def lowest_per_row(
    scores: Float[Tensor, "rows cols"], frozen: Bool[Tensor, "rows cols"], count: int
) -> Bool[Tensor, "rows cols"]:
    """Choose the lowest scores of each row, equally many per row up to one, and ``count`` in total.

    If the number of rows does not divide the count, the remainder goes to the rows whose next weight scores lowest. A
    row with more frozen weights than its share loses all of them, and the other rows share the rest of the count. The
    count is at least the number of frozen weights in the layer. Scores are -inf where frozen.
    """
    ranks = ranks_in_groups(scores).long().masked_fill_(frozen, -1)
    totals = torch.bincount(ranks.flatten() + 1, minlength=scores.shape[1] + 1).cumsum(0)
    # The last rank that the count covers in all rows; rank -1 holds the frozen weights.
    full = int((totals <= count).sum()) - 2
    chosen = ranks <= full
    remainder = count - int(totals[full + 1])
    return chosen | lowest(scores.masked_fill(ranks != full + 1, torch.inf), remainder)


def lowest_in_groups(
    scores: Float[Tensor, "rows cols"],
    frozen: Bool[Tensor, "rows cols"],
    sparse_rows: Bool[Tensor, "rows 1"],
    pattern: NM,
) -> Bool[Tensor, "rows cols"]:
    """The m - n lowest of every m consecutive scores of the sparse rows, and every frozen weight.

    Scores are -inf where frozen, and m divides their width. Sparse rows come from ``choose_sparse_rows``.
    """
    ranks = ranks_in_groups(scores.reshape(-1, pattern.m))
    return ((ranks < pattern.m - pattern.n).view_as(scores) & sparse_rows) | frozen


def ranks_in_groups(groups: Float[Tensor, "groups width"]) -> Integer[Tensor, "groups width"]:
    """The rank of each score in its group, 0 for the lowest. Of equal scores the first has the lower rank.

    Narrow groups are ranked by comparing each pair of columns: torch sorts them over three times as slowly on CPUs.
    """
    width = groups.shape[1]
    if width > _NARROW:
        order = groups.argsort(dim=1, stable=True)
        places = torch.arange(width, dtype=torch.int32, device=groups.device).expand_as(order)
        return torch.empty_like(places).scatter_(1, order, places)
    columns = groups.mT.contiguous()
    ranks = torch.zeros_like(columns, dtype=torch.uint8)
    for right in range(width):
        for left in range(right):
            first = columns[left] <= columns[right]
            ranks[right] += first
            ranks[left] += ~first
    return ranks.mT.contiguous()


def choose_sparse_rows(
    energy: Float[Tensor, "rows cols"], frozen: Bool[Tensor, "rows cols"], pattern: NM | Structured
) -> Bool[Tensor, "rows 1"]:
    """True for the rows that follow the pattern, False for the outliers, which stay dense (h_i in the paper).

    Outliers are the rows of most energy. Rows with frozen weights become outliers only if there are too few other rows,
    and the rows with the fewest frozen weights come first. ``energy`` is W_ij² ‖X_j‖², or the method's own score in its
    place.
    """
    sparse_rows = torch.ones(len(energy), dtype=torch.bool, device=energy.device)
    if (num_dense := pattern.num_dense_rows(len(energy))) > 0:
        by_energy = energy.sum(1).argsort(descending=True, stable=True)
        order = by_energy[frozen.sum(1)[by_energy].argsort(stable=True)]
        sparse_rows[order[:num_dense]] = False
    return sparse_rows.unsqueeze(1)


def lowest_columns(
    energy: Float[Tensor, "rows cols"],
    frozen: Bool[Tensor, "rows cols"],
    sparse_rows: Bool[Tensor, "rows 1"],
    pattern: Structured,
) -> Bool[Tensor, "rows cols"]:
    """The columns of least energy over the sparse rows (v_j in the paper), and every frozen weight.

    Columns that hold frozen weights in sparse rows come first. Energy and sparse rows are as in ``choose_sparse_rows``.
    """
    by_energy = (energy * (sparse_rows & ~frozen)).sum(0).argsort(stable=True)
    touched = (frozen & sparse_rows).any(0)
    order = by_energy[touched[by_energy].logical_not().to(torch.uint8).argsort(stable=True)]
    columns = torch.zeros(energy.shape[1], dtype=torch.bool, device=energy.device)
    columns[order[: pattern.num_columns(energy.shape[1])]] = True
    return (columns & sparse_rows) | frozen


def choose_regular(
    scores: Float[Tensor, "rows cols"], frozen: Bool[Tensor, "rows cols"], pattern: NM | Structured
) -> Bool[Tensor, "rows cols"]:
    """Choose all weights that an n:m or structured pattern prunes, by fixed scores that scale with |W|.

    Their squares are the energy.
    """
    energy = scores.square()
    sparse_rows = choose_sparse_rows(energy, frozen, pattern)
    if isinstance(pattern, NM):
        return lowest_in_groups(scores.masked_fill(frozen, -torch.inf), frozen, sparse_rows, pattern)
    return lowest_columns(energy, frozen, sparse_rows, pattern)


def wanda(
    W: Float[Tensor, "rows cols"], norms: Float[Tensor, " cols"], frozen: Bool[Tensor, "rows cols"], pattern: Solvable
) -> Bool[Tensor, "rows cols"]:
    """Choose by |W_ij| ‖X_j‖ within each row (Sun et al., arXiv 2306.11695). ``norms`` are ‖X_j‖ up to a common scale.

    An unstructured pattern prunes equally many weights per row, up to one.
    """
    scores = importance(W, norms)
    if isinstance(pattern, Unstructured):
        return lowest_per_row(scores.masked_fill(frozen, -torch.inf), frozen, num_to_prune(pattern, frozen))
    return choose_regular(scores, frozen, pattern)


def magnitude(
    W: Float[Tensor, "rows cols"], frozen: Bool[Tensor, "rows cols"], pattern: Solvable
) -> Bool[Tensor, "rows cols"]:
    """Choose by |W_ij| (Han et al., arXiv 1506.02626). An unstructured pattern compares all weights of the layer."""
    scores = W.abs()
    if isinstance(pattern, Unstructured):
        return lowest(scores.masked_fill(frozen, -torch.inf), num_to_prune(pattern, frozen))
    return choose_regular(scores, frozen, pattern)
