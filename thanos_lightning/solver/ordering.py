"""Search for an order of a layer's inputs in which an N:M pattern loses less.

Legend (Pool and Yu, Channel Permutations for N:M Sparsity, NeurIPS 2021; the assignment after Zhang et al.,
Plug-and-Play, ICLR 2024, who assign the channels of one place in all groups at a time):
    S       (rows, cols)    score of each weight
    groups  (cols / M, M)   inputs of each group: the order, cut into pieces of M
    B       (rows, groups)  N-th largest score of each row among the M - 1 inputs that a group retains in a round

A round takes one random input out of each group and assigns these inputs to the groups anew, so that the pattern keeps
most. In row r, group g with a new input c keeps its N - 1 largest scores and max(B_rg, S_rc). So the assignment
maximises the sum of Σ_r max(B_rg, S_rc), which is ½ Σ_r |B_rg - S_rc| plus a part that all assignments share. No round
makes the order worse, since each input may return to its group.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from thanos_lightning.solver.pattern import NM

# Number of groups that exchange inputs in a round. Time and memory grow with the square of this number.
_EXCHANGING = 128
# More rounds than _ROUNDS gained nothing. A search ends earlier if _PATIENCE rounds together reduce the lost score by
# less than _TOLERANCE of it.
_ROUNDS, _TOLERANCE, _PATIENCE = 15, 0.001, 4


def kept_share(scores: Float[Tensor, "rows cols"], pattern: NM) -> float:
    """The sum of the scores that an N:M pattern keeps, over the sum of all scores; 1 if all scores are zero.

    The scores must not be negative, and M has to divide cols.

    Examples:
        >>> kept_share(torch.tensor([[4.0, 3.0, 2.0, 0.0, 1.0, 0.0, 0.0, 0.0]]), NM(2, 4))
        0.8
    """
    kept = scores.view(len(scores), -1, pattern.m).topk(pattern.n, dim=2).values
    total = float(scores.sum(dtype=torch.float64))
    return float(kept.sum(dtype=torch.float64)) / total if total else 1.0


def search_order(scores: Float[Tensor, "rows cols"], pattern: NM) -> Int[Tensor, " cols"]:
    """Search for an order of the columns in which an N:M pattern keeps more of the scores than in the given order.

    Return place -> column, int64 on the CPU: the groups are consecutive columns of ``scores[:, order]``. Outlier rows
    are ignored. Raises ValueError if M does not divide cols, or scores are negative or not finite.

    Examples:
        >>> scores = torch.tensor([[4.0, 3.0, 2.0, 0.0, 1.0, 0.0, 0.0, 0.0]])
        >>> kept_share(scores[:, search_order(scores, NM(2, 4))], NM(2, 4))
        1.0
    """
    pattern.check_shape(*scores.shape)
    if not torch.isfinite(scores).all() or (scores < 0).any():
        raise ValueError("scores must be finite and not negative: give squares, such as those of W_ij ‖X_j‖")
    generator = torch.Generator().manual_seed(0)
    groups = torch.arange(scores.shape[1], device="cpu").view(-1, pattern.m)
    lost = [1 - kept_share(scores, pattern)]
    for _ in range(_ROUNDS):
        for some in torch.split(torch.randperm(len(groups), generator=generator, device="cpu"), _EXCHANGING):
            groups[some] = _exchange(scores, groups[some], pattern, generator)
        lost.append(1 - kept_share(scores[:, groups.flatten().to(scores.device)], pattern))
        if len(lost) > _PATIENCE and lost[-1] >= (1 - _TOLERANCE) * lost[-1 - _PATIENCE]:
            break
    return groups.flatten()


def _exchange(
    scores: Float[Tensor, "rows cols"], groups: Int[Tensor, "groups m"], pattern: NM, generator: torch.Generator
) -> Int[Tensor, "groups m"]:
    """Exchange inputs among some of the groups, in one round."""
    from scipy.optimize import linear_sum_assignment  # slow to import

    every = torch.arange(len(groups), device="cpu")
    place = torch.randint(pattern.m, (len(groups),), generator=generator, device="cpu")
    taken = groups[every, place]
    others = groups[torch.arange(pattern.m, device="cpu") != place.unsqueeze(1)].view(len(groups), pattern.m - 1)
    at_stake = scores[:, others.to(scores.device)].topk(pattern.n, dim=2).values[..., -1]
    distances = torch.cdist(at_stake.t().contiguous(), scores[:, taken.to(scores.device)].t().contiguous(), p=1)
    _, given = linear_sum_assignment(distances.double().cpu().numpy(), maximize=True)
    exchanged = groups.clone()
    exchanged[every, place] = taken[torch.from_numpy(given)]
    return exchanged
