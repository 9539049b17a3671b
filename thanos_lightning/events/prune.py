"""Prunes one window: owners receive the sums of their layers and solve them, and all ranks write the results.

No rank writes before every layer of the window is solved.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from thanos_lightning.calibration.moments import Moments
from thanos_lightning.events.blocks import keep_of_owned
from thanos_lightning.events.experts import choose_experts, drop_experts
from thanos_lightning.events.order import of_ordered_inputs, order_channels, rows_of
from thanos_lightning.events.reconstruct import Kept, reconstruct
from thanos_lightning.models.routing import Mixture
from thanos_lightning.models.stack import Block
from thanos_lightning.models.targets import PrunableLayer
from thanos_lightning.plan.windows import Window
from thanos_lightning.report.data import BlockReport, LayerReport, Part
from thanos_lightning.report.progress import open_phase
from thanos_lightning.sharding.access import ParameterAccess
from thanos_lightning.sharding.adapters import Adapted, collect, collect_merged, write_merged
from thanos_lightning.sharding.lending import lend, lenders
from thanos_lightning.sharding.owners import sum_on_owners, tokens_seen
from thanos_lightning.sharding.together import KeptError, reserve
from thanos_lightning.solver import Experts, HessianAccumulator, Pattern, PrunedLayer
from thanos_lightning.solver.factors import FactorsInTurn
from thanos_lightning.solver.layer import SolverOptions, prune_layer
from thanos_lightning.training.enforcement import MaskEnforcer


def prune_window(
    window: Window,
    layers: Mapping[str, PrunableLayer],
    moments: Moments,
    *,
    access: ParameterAccess,
    enforcer: MaskEnforcer,
    options: SolverOptions,
    owned: Mapping[str, Sequence[PrunableLayer]] | None = None,
    later: Collection[str] = (),
    free: Mapping[str, Sequence[PrunableLayer]] | None = None,
    blocks: Mapping[str, Block] | None = None,
    mixtures: Mapping[str, Mixture] | None = None,
    now: Callable[[Part], None] = lambda _: None,
) -> tuple[list[LayerReport], list[BlockReport]]:
    """Solve the layers of a window, write them, and hold their masks. All ranks must call it.

    `owned` has what the channels of a layer own, which is pruned with them. `later` names the layers that a later
    window prunes, too. A layer that no token has reached in this window stays as it is if it is one of them, and is
    pruned by magnitude otherwise. Both cases warn. `free` has the same as `owned` for channels that get another order
    before, and the moments' output weights with them. `blocks` are trained after the solves, if the moments have what
    they got and gave. Of `mixtures`, those go as a whole whose experts' down layers have the pattern `Experts`. `now`
    is called when another part of the event begins. Return a report for each layer that was pruned, in the window's
    order, then for each mixture, and for each block that was trained. All ranks return the same.

    Raises:
        PruningError: On all ranks, if no layer saw a token, the solver fails or a rank lacks memory. No layer is
            pruned.
    """
    experts = {name: layer for name, layer in layers.items() if isinstance(window.patterns[name], Experts)}
    chosen = {name: layer for name, layer in layers.items() if name not in experts}
    blind: list[str] = []
    tokens: dict[str, int] = {}
    lent: dict[str, tuple[str, ...]] = {}
    if moments.accumulators is not None:
        tokens = tokens_seen(layers, moments.accumulators, access)
        lent = lenders(chosen, tokens)
        postponed, blind = _divide([name for name in chosen if not tokens[name] and name not in lent], later)
        if options.uses_correlations:
            borrowed = {name: sum(tokens[other] for other in others) for name, others in lent.items()}
            _warn_of_few({name: borrowed.get(name, tokens[name]) for name in chosen}, chosen)
        chosen = {name: layer for name, layer in chosen.items() if name not in postponed}
    seen = {name: layer for name, layer in chosen.items() if name not in blind}
    owners = moments.owners
    sums = None
    if moments.accumulators is not None:
        counted = {name: layer for name, layer in (seen | experts).items() if tokens[name]}
        sums = sum_on_owners(counted, moments.accumulators, tokens, owners, access)
        lend(sums, lent, chosen, tokens, owners, access)
    going = []
    if experts:
        assert sums is not None, "refused where a method has no statistics"
        gone = {name for name in experts if enforcer.is_gone(name)}
        going = choose_experts(mixtures or {}, experts, window.patterns, sums, tokens, owners, gone, access)
    sizes = {name: _bytes_of(layer) for name, layer in chosen.items()}
    own = {name: size for name, size in sizes.items() if owners[name] == access.rank}
    ordered = {} if sums is None else {name: parts for name, parts in (free or {}).items() if name in seen}
    for name in ordered.keys() & own.keys():  # each is twice there when it is written in another order
        own[name] = max(own[name], 2 * max(_bytes_of(part) for part in (layers[name], *ordered[name])))
    reserve(own, access)
    if sums is not None and ordered:
        title = f"Ordering channels at step {window.event.step}"
        orders = order_channels(ordered, layers, window.patterns, sums, owners, access, enforcer, title)
        for name, order in orders.items():
            if name in sums:
                sums[name] = of_ordered_inputs(sums[name], order)
            for one in ordered[name]:
                if (of_outputs := moments.output_weights.get(one.name)) is not None:
                    of_outputs.copy_(of_outputs[rows_of(order, one).to(of_outputs.device)])
    # All ranks exchange tensors before the first solve, so that no rank waits for the solve of another rank
    weights = {name: collect(layer, owners[name], access) for name, layer in chosen.items()}
    earlier = {name: enforcer.collect_keep(name, owners[name]) for name in chosen}
    tasks = {
        name: _Task(
            window.patterns[name],
            weight,
            earlier.pop(name),
            (sums or {}).pop(name, None),
            moments.output_weights.get(name),
        )
        for name, weight in weights.items()
        if weight is not None
    }
    del weights
    largest = dict(sorted(sizes.items(), key=lambda item: item[1])[-1:])  # none if only experts are dropped
    solved = _solve_tasks(tasks, largest, access, options, f"Solving at step {window.event.step}")
    facts: dict[str, tuple[int, float, float, float]] = {}
    for part in access.gather({name: result.facts for name, result in solved.items()}):
        facts.update(part)
    kept = {name: Kept(result.pruned.weight, result.pruned.mask) for name, result in solved.items()}
    del solved
    trained: list[BlockReport] = []
    if moments.states is not None and blocks:
        now("reconstructing")
        targets = {
            name: [chosen[layer] for layer in block.layers if layer in chosen]
            for name, block in blocks.items()
            if not chosen.keys().isdisjoint(block.layers)
        }
        title = f"Reconstructing at step {window.event.step}"
        owners, trained = reconstruct(moments.states, targets, kept, owners, access, title)
    now("writing")
    reports = _write(window, chosen, kept, facts, owners, access, enforcer, owned or {})
    reports = [replace(report, tokens=tokens.get(report.name)) for report in reports]
    for mixture in going:
        drop_experts(mixture.downs, experts, owned or {}, moments.owners, access, enforcer)
    return [*reports, *(mixture.report for mixture in going)], trained


def _solve_tasks(
    tasks: dict[str, _Task], largest: Mapping[str, int], access: ParameterAccess, options: SolverOptions, title: str
) -> dict[str, _Solved]:
    """Solve the tasks of this rank, and raise on all ranks if one fails. All ranks must call it.

    Tasks are removed as they are solved, to free memory. `largest` names the layer whose result takes most memory, in
    bytes; all ranks will receive it.
    """
    solved: dict[str, _Solved] = {}
    kept = KeptError(access)
    in_turn, mine = FactorsInTurn(), list(tasks)
    with open_phase(title, len(mine), "layers") as phase:
        for name, following in itertools.zip_longest(mine, mine[1:]):
            start = time.perf_counter()
            with kept.keeping(layer=name):
                before = None if following is None else tasks[following].statistics
                pruned = solve(tasks.pop(name), in_turn, before, options)
                num_pruned = pruned.mask.numel() - int(pruned.mask.count_nonzero())
                solved[name] = _Solved(pruned, num_pruned, time.perf_counter() - start)
                phase.advance(note=f"{pruned.relative_loss:.4f} {'.'.join(name.split('.')[-4:])}")
            if kept.error is not None:
                break
        reserve(largest, access, kept)
    return solved


def _write(
    window: Window,
    layers: Mapping[str, PrunableLayer],
    kept: dict[str, Kept],
    facts: Mapping[str, tuple[int, float, float, float]],
    owners: Mapping[str, int],
    access: ParameterAccess,
    enforcer: MaskEnforcer,
    owned: Mapping[str, Sequence[PrunableLayer]],
) -> list[LayerReport]:
    """Write what the owners have, which is emptied, and hold the masks. All ranks must call it."""
    reports = []
    with open_phase(f"Writing at step {window.event.step}", len(layers), "layers") as phase:
        for name, layer in layers.items():
            own = kept.pop(name, None)
            weight, keep = (None, None) if own is None else (own.weight, own.keep)
            drop = write_merged(layer, weight, keep, owners[name], access)
            num_pruned, loss, relative_loss, seconds = facts[name]
            enforcer.hold(name, drop, num_pruned)
            for one in owned.get(name, ()):
                _write_owned(one, keep, owners[name], access, enforcer)
            reports.append(
                LayerReport(
                    name=name,
                    shape=(layer.rows, layer.cols),
                    pattern=window.patterns[name].name,
                    sparsity=num_pruned / (layer.rows * layer.cols),
                    loss=loss,
                    relative_loss=relative_loss,
                    seconds=seconds,
                )
            )
            phase.advance()
    return reports


def _write_owned(
    part: PrunableLayer, keep: Tensor | None, owner: int, access: ParameterAccess, enforcer: MaskEnforcer
) -> None:
    """Prune what the channels own that a down layer has lost. `keep` is the down layer's, on its owner."""
    weight, earlier = collect_merged(part, owner, access), enforcer.collect_keep(part.name, owner)
    own = None
    if keep is not None and weight is not None:
        own = keep_of_owned(keep, part).to(weight.device)
        own = own if earlier is None else own & earlier.to(own.device)
        weight = weight.where(own, 0)
    num_pruned = access.gather(0 if own is None else own.numel() - int(own.count_nonzero()))[owner]
    enforcer.hold(part.name, write_merged(part, weight, own, owner, access), num_pruned)


def _bytes_of(layer: PrunableLayer) -> int:
    """A weight in fp32 and its mask, and what its adapters add."""
    return (9 if layer.adapters else 5) * layer.rows * layer.cols


@dataclass(frozen=True)
class _Solved:
    """The result of a layer that this rank has solved."""

    pruned: PrunedLayer
    num_pruned: int
    seconds: float

    @property
    def facts(self) -> tuple[int, float, float, float]:
        """What all ranks need for their reports."""
        return self.num_pruned, self.pruned.loss, self.pruned.relative_loss, self.seconds


@dataclass
class _Task:
    """A layer that this rank solves. `keep` is the keep mask of earlier events; `statistics` is None without tokens."""

    pattern: Pattern
    weight: Adapted
    keep: Tensor | None
    statistics: HessianAccumulator | None
    output_weights: Tensor | None


def solve(
    task: _Task, in_turn: FactorsInTurn, before: HessianAccumulator | None, options: SolverOptions
) -> PrunedLayer:
    """Solve a layer, by magnitude if there are no statistics. `before` is the statistics of the next layer."""
    statistics, task.statistics = task.statistics, None
    if statistics is None and options.needs_statistics:
        options = SolverOptions.as_published("magnitude")
    inputs = None if statistics is None else in_turn.take(statistics, before)
    del statistics  # frees the sum, unless another layer shares it
    weight, frozen = task.weight.merged(), None if task.keep is None else task.keep.logical_not()
    output_weights = None if task.output_weights is None else task.output_weights.to(weight.device)
    return prune_layer(weight, inputs, task.pattern, options, frozen, output_weights)


def _warn_of_few(tokens: Mapping[str, int], layers: Mapping[str, PrunableLayer]) -> None:
    few = {name: layers[name].cols / seen for name, seen in tokens.items() if 0 < seen < layers[name].cols}
    if few:
        worst = max(few, key=lambda name: few[name])
        rank_zero_warn(
            f"{len(few)} layer(s) saw fewer tokens than they have inputs, such as {worst} ({tokens[worst]:,} for "
            f"{layers[worst].cols:,}), too few to tell the inputs apart: give {math.ceil(few[worst])} times as many, "
            "or better 100,000 (calibration.batches, or calibration.steps without them)"
        )


def _divide(unseen: Sequence[str], later: Collection[str]) -> tuple[list[str], list[str]]:
    """Split unseen layers into those that a later window prunes and those that are pruned by magnitude now."""
    postponed = [name for name in unseen if name in later]
    blind = [name for name in unseen if name not in later]
    why = "no token has reached (an expert may get none; attention may read a weight without calling its layer)"
    for names, what in (
        (postponed, "left as they are until the next event"),
        (blind, "pruned by magnitude, since no later event has them: collect more batches, or add them to ignore"),
    ):
        if names:
            some = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
            rank_zero_warn(f"{len(names)} layer(s) that {why} are {what}: {some}")
    return postponed, blind
