"""A better mask: kept weights that matter little change places with pruned ones that are missed.

Legend (W0, W, H and R as in refine.py; i is a kept weight of a row, j a pruned one of the same row and group):
    c        what a weight costs per square: its loss when it goes, and the others adapt, is c_i W_i²; bringing one back
             gains R_j² / c_j. The others are few or many, and so c lies between H_jj (nothing adapts) and 1 / [H⁻¹]_jj
             (all adapt, Hassibi and Stork, 1993); taken is their geometric mean
    caution  factor of c, by row: exchanges that are made together disturb each other. It grows where that went wrong
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from thanos_lightning.solver import native
from thanos_lightning.solver.pattern import NM, Pattern, Structured
from thanos_lightning.solver.refine import refine
from thanos_lightning.solver.zeros import zero_where

# One exchange in each group and round: more at once disturb each other, fewer take more rounds.
_GROUP = 32
_CAUTION, _CALMER, _MORE_CAREFUL = 0.9, 0.95, 1.2


def improve(
    weight: Float[Tensor, "rows cols"],
    original: Float[Tensor, "rows cols"],
    hessian: Float[Tensor, "cols cols"],
    keep: Bool[Tensor, "rows cols"],
    frozen: Bool[Tensor, "rows cols"],
    pattern: Pattern,
    cost: Float[Tensor, " cols"],
    rounds: int,
    steps: int,
) -> tuple[Float[Tensor, "rows cols"], Bool[Tensor, "rows cols"]]:
    """Refine the weights, then in each round exchange and refine again; rows that got worse by it are put back.

    Each row keeps as many weights as it had, and so does each n:m group. Structured patterns have nothing to exchange.

    Args:
        weight: W, zero where not kept; not changed.
        original: W0.
        hessian: Undamped H.
        keep: True = kept.
        frozen: Weights that stay pruned.
        pattern: Where exchanges are allowed.
        cost: c.
        rounds: How often to exchange.
        steps: Conjugate gradient steps before the first round and after each exchange.

    Returns:
        The new weights, zero where not kept, and the new mask.
    """
    W, R = refine(weight, original, hessian, keep, steps)
    if isinstance(pattern, Structured):
        return W, keep
    losses = _row_losses(W, original, R)
    keep = keep.clone()
    caution = W.new_full((len(W), 1), _CAUTION)
    for number in range(rounds):
        tried = exchange(W, R, keep, frozen, cost, caution, pattern, scattered=number % 2 == 1)
        challenger, its_R = refine(zero_where(W.clone(), ~tried), original, hessian, tried, steps)
        its_losses = _row_losses(challenger, original, its_R)
        better = its_losses < losses
        losses = torch.where(better, its_losses, losses)
        better = better.unsqueeze(1)
        for new, old in ((challenger, W), (its_R, R), (tried, keep)):
            torch.where(better, new, old, out=old)
        caution *= torch.where(better, _CALMER, _MORE_CAREFUL)
    return W, keep


def exchange(
    W: Float[Tensor, "rows cols"],
    R: Float[Tensor, "rows cols"],
    keep: Bool[Tensor, "rows cols"],
    frozen: Bool[Tensor, "rows cols"],
    cost: Float[Tensor, " cols"],
    caution: Float[Tensor, "rows 1"],
    pattern: Pattern,
    scattered: bool = False,
) -> Bool[Tensor, "rows cols"]:
    """A mask in which each group has made the exchange that promises most, if it promises anything.

    Args:
        W: Weights, zero where not kept.
        R: See refine.py.
        keep: True = kept.
        frozen: Weights that stay pruned.
        cost: c.
        caution: Its factor.
        pattern: Its groups, where it is n:m; else groups of ``_GROUP`` columns.
        scattered: Whether columns of a group that is no n:m group lie far apart, and not side by side. What is left
            over by whole groups lies at the other end.
    """
    rows, cols = W.shape
    width = pattern.m if isinstance(pattern, NM) else min(_GROUP, cols)
    scattered = scattered and not isinstance(pattern, NM)
    used = slice(cols % width, cols) if scattered else slice(0, cols - cols % width)
    W, R, its_keep, frozen, cost = W[:, used], R[:, used], keep[:, used], frozen[:, used], cost[used]
    if native.usable(W):
        exchanged = native.exchange(W, R, its_keep, frozen, cost, caution, width, scattered)
        return (
            exchanged
            if used == slice(0, cols)
            else keep.clone().index_copy_(1, torch.arange(used.start, used.stop), exchanged)
        )

    def grouped(values: Tensor) -> Tensor:
        return values.reshape(rows, width, -1).mT if scattered else values.reshape(rows, -1, width)

    careful = cost * caution
    gains = torch.where(careful > 0, R.square() / careful, 0).masked_fill_(its_keep | frozen, -torch.inf)
    losses = (W.square() * careful).masked_fill_(~its_keep, torch.inf)
    gain, comes = grouped(gains).max(-1)
    loss, goes = grouped(losses).min(-1)
    groups = torch.arange(gain.shape[1], device=W.device)
    flipped = torch.zeros_like(keep)
    for one in (comes, goes):
        flipped.scatter_(
            1, used.start + (one * len(groups) + groups if scattered else groups * width + one), gain > loss
        )
    return keep ^ flipped


def exchange_cost(hessian: Float[Tensor, "cols cols"], factor: Float[Tensor, "cols cols"]) -> Float[Tensor, " cols"]:
    """c: the geometric mean of H_jj and 1 / [H⁻¹]_jj.

    Args:
        hessian: Undamped H.
        factor: U of the damped H, see linalg.py.
    """
    return (hessian.diagonal().clamp(min=0) / factor.square().sum(0)).sqrt()


def _row_losses(
    W: Float[Tensor, "rows cols"], original: Float[Tensor, "rows cols"], R: Float[Tensor, "rows cols"]
) -> Float[Tensor, " rows"]:
    losses: Tensor = torch.linalg.vecdot(original - W, R)
    return losses
