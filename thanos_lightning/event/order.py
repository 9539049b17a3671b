"""Puts the channels of feed-forward blocks into an order in which N:M loses less, right before an event.

N:M keeps N of each M neighbours, and a block computes the same in whatever order its channels are (Pool and Yu, Channel
Permutations for N:M Sparsity, NeurIPS 2021).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from thanos_lightning.enforcement import MaskEnforcer
from thanos_lightning.layers.lora import collect_merged, write_merged
from thanos_lightning.layers.targets import Layer
from thanos_lightning.ranks.view import View
from thanos_lightning.report.progress import open_phase
from thanos_lightning.solver import NM, HessianAccumulator, Pattern
from thanos_lightning.solver.admm import weight_costs
from thanos_lightning.solver.linalg import FactorizationError, damped, damping_ladder, exact_arithmetic, inverse_factor
from thanos_lightning.solver.ordering import search_order

# The search looks at so many rows. Twice as many kept 0.3 % more of the scores in twice the time.
_ROWS = 192
_DAMPING = 0.01  # the solver's default


def order_channels(
    reordered: Mapping[str, Sequence[View]],
    layers: Mapping[str, Layer],
    patterns: Mapping[str, Pattern],
    sums: Mapping[str, HessianAccumulator],
    owners: Mapping[str, int],
    enforcer: MaskEnforcer,
    title: str,
) -> dict[str, Int[Tensor, " width"]]:
    """Write the weights of feed-forward blocks in a better order of their channels. All ranks must call it.

    `reordered` has the weights and biases that compute the inputs of a down layer, as in `Targets`; all other arguments
    are of down layers. `sums` has the second moments of inputs, in the old order, of the down layers that this rank
    owns. A layer before a down layer may be pruned already: its mask gets the order, too.

    Return the new order of each block's channels, place -> old channel, on all ranks. A block whose search fails is
    left out, and a warning names it.
    """
    access = enforcer.access
    samples = {name: _some_rows(collect_merged(layers[name], owners[name], access)) for name in reordered}
    own: dict[str, Tensor] = {}
    failed: dict[str, str] = {}
    mine = {name: sample for name, sample in samples.items() if sample is not None and name in sums}
    with open_phase(title, len(mine), "feed-forward blocks") as phase:
        for name, sample in mine.items():
            try:
                pattern = patterns[name]
                assert isinstance(pattern, NM)
                cost = _cost_of_inputs(name, sums[name].compute()).to(sample.device)
                own[name] = search_order(sample.square() * cost, pattern)
            except Exception as failure:  # even out of memory: the event can do without
                failed[name] = f"{type(failure).__name__}: {failure}"
            phase.advance()
    every = access.gather((own, failed))
    orders = {name: order for part, _ in every for name, order in part.items()}
    if failures := {name: why for _, part in every for name, why in part.items()}:
        name, why = next(iter(failures.items()))
        rank_zero_warn(
            f"the channels of {len(failures)} feed-forward block(s) keep their order, since the search for another one "
            f"failed, such as those of {name} ({why})"
        )
    for name, order in orders.items():
        owner = owners[name]
        weight = collect_merged(layers[name], owner, access)
        columns = None if weight is None else weight[:, order.to(weight.device)]
        write_merged(layers[name], columns, _all_of(columns), owner, access)
        for part in reordered[name]:
            _write_rows(part, rows_of(order, part), owner, enforcer)
    return orders


def rows_of(order: Int[Tensor, " width"], part: View) -> Int[Tensor, " rows"]:
    """The order of the rows of a weight or bias that channels own: rows i, width + i, … are those of channel i."""
    return torch.cat([order + start for start in range(0, part.rows, len(order))])


def of_ordered_inputs(statistics: HessianAccumulator, order: Int[Tensor, " cols"]) -> HessianAccumulator:
    """The same statistics for inputs in another order. The given ones stay, since layers may share them."""
    order = order.to(statistics.triangle.device)
    return HessianAccumulator.of_sum(statistics.sum[order.unsqueeze(1), order], statistics.num_tokens)


def _some_rows(weight: Float[Tensor, "rows cols"] | None) -> Float[Tensor, "some cols"] | None:
    if weight is None:
        return None
    generator = torch.Generator().manual_seed(0)
    return weight[torch.randperm(len(weight), generator=generator, device="cpu")[:_ROWS].to(weight.device)].float()


def _cost_of_inputs(name: str, hessian: Float[Tensor, "cols cols"]) -> Float[Tensor, " cols"]:
    """What a weight of each of a layer's inputs costs, for a weight of 1; 0 for inputs that were always zero.

    It is the geometric mean of H_jj, the cost if no other weight adapts, and of 1 / [H⁻¹]_jj, if all others adapt.
    """
    with exact_arithmetic(hessian.device):
        for damping in damping_ladder(_DAMPING):
            try:
                cost = weight_costs(hessian, inverse_factor(damped(hessian, damping)), damping)
            except FactorizationError:
                continue
            return cost.masked_fill(hessian.diagonal() == 0, 0)
    raise FactorizationError(
        f"the second moment of the inputs of layer {name} has no inverse with any damping: give more batches, or add "
        "the layer to ignore"
    )


def _write_rows(part: View, order: Int[Tensor, " rows"], owner: int, enforcer: MaskEnforcer) -> None:
    access, is_masked = enforcer.access, part.name in enforcer.masked
    weight = collect_merged(part, owner, access)
    keep = enforcer.keep_mask(part.name, owner) if is_masked else _all_of(weight)
    if weight is not None and keep is not None:
        weight, keep = weight[order.to(weight.device)], keep[order.to(keep.device)]
    drop = write_merged(part, weight, keep, owner, access)
    if is_masked:
        num_pruned = 0 if keep is None else keep.numel() - int(keep.count_nonzero())
        enforcer.hold(part.name, drop, access.gather(num_pruned)[owner])


def _all_of(weight: Tensor | None) -> Tensor | None:
    """The mask of a weight of which nothing is pruned."""
    return None if weight is None else torch.ones_like(weight, dtype=torch.bool)
