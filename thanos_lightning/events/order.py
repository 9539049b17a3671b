"""The channels of feed-forward blocks in an order in which N:M loses less, right before the first event.

N:M keeps N of each M neighbours, and a block computes the same whatever order its channels have (Pool and Yu, Channel
Permutations for N:M Sparsity, NeurIPS 2021). So the down layer is solved in a better order of its columns, and all that
its channels own is written in the same order of rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from thanos_lightning.events.permute import cost_of_inputs
from thanos_lightning.models.targets import PrunableLayer
from thanos_lightning.report.progress import open_phase
from thanos_lightning.sharding.access import ParameterAccess
from thanos_lightning.sharding.owners import raise_everywhere
from thanos_lightning.solver import NM, HessianAccumulator
from thanos_lightning.solver.ordering import search_order

# The search draws so many rows. Twice as many kept 0.3 % more of the scores in twice the time, more rounds nothing.
_ROWS, _ROUNDS = 192, 15


def search_orders(
    weights: Mapping[str, Float[Tensor, "rows cols"]],
    statistics: Mapping[str, HessianAccumulator],
    patterns: Mapping[str, NM],
    access: ParameterAccess,
    title: str,
) -> dict[str, Int[Tensor, " cols"]]:
    """Search an order of the columns of each layer of this rank, and return those of all ranks. All must call it.

    `weights` and `statistics` have the layers of this rank, by name.

    Raises:
        PruningError: On all ranks, if a search fails on one.
    """
    own: dict[str, Tensor] = {}
    error: tuple[str, Exception] | None = None
    with open_phase(title, len(weights), "feed-forward blocks") as phase:
        for name, weight in weights.items():
            try:
                cost = cost_of_inputs(name, statistics[name].compute()).to(weight.device)
                generator = torch.Generator().manual_seed(0)
                some = torch.randperm(len(weight), generator=generator, device="cpu")[:_ROWS].to(weight.device)
                scores = weight[some].float().square() * cost
                own[name] = search_order(scores, patterns[name], rounds=_ROUNDS)
            except Exception as failure:  # even out of memory, since the other ranks wait for this one
                error = (name, failure)
                break
            phase.advance()
    raise_everywhere(error, access)
    return {name: order for part in access.gather(own) for name, order in part.items()}


def rows_of(order: Int[Tensor, " width"], part: PrunableLayer) -> Int[Tensor, " rows"]:
    """The order of the rows of a weight or bias that channels own: row i, width + i, … is of channel i.

    Examples:
        >>> fused = PrunableLayer("gate_up", (), rows=4, cols=1, transposed=False)
        >>> rows_of(torch.tensor([1, 0]), fused)
        tensor([1, 0, 3, 2])
    """
    width = len(order)
    return torch.cat([order + start for start in range(0, part.rows, width)])


def in_order(statistics: HessianAccumulator, order: Int[Tensor, " cols"]) -> HessianAccumulator:
    """The same statistics of inputs in another order. The given ones stay, since layers may share them."""
    whole, order = statistics.sum, order.to(statistics.triangle.device)
    return HessianAccumulator.of_sum(whole[order][:, order], statistics.num_tokens)


def write_in_order(
    parts: Sequence[PrunableLayer], order: Int[Tensor, " width"], owner: int, access: ParameterAccess
) -> None:
    """Write parts that are not solved, in the order of the channels that own them. All ranks must call it."""
    for part in parts:
        weight = access.collect_weight(part, owner)
        keep = None
        if weight is not None:
            weight = weight[rows_of(order, part).to(weight.device)]
            keep = torch.ones_like(weight, dtype=torch.bool)
        access.write(part, weight, keep, owner)
