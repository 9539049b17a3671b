"""Prunes one window: owners receive the sums of their layers and solve them, and all ranks write the results.

If a window has fewer layers than there are ranks, the owner of a layer shares the work on the rows with its team.
No rank writes before every layer of the window is solved.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
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
from thanos_lightning.sharding.owners import raise_everywhere, reserved, sum_on_owners, tokens_seen
from thanos_lightning.sharding.ranks import RankTeam
from thanos_lightning.solver import Experts, HessianAccumulator, Pattern, PrunedLayer
from thanos_lightning.solver.factors import Factors, FactorsInTurn
from thanos_lightning.solver.layer import SolverOptions, prune_rows
from thanos_lightning.solver.team import Alone, RowTeam, TeammateError
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
    teams, owners = {name: moments.teams[name] for name in chosen}, moments.owners
    sums = None
    if moments.accumulators is not None:
        counted = {name: layer for name, layer in (seen | experts).items() if tokens[name]}
        sums = sum_on_owners(counted, moments.accumulators, owners, access)
        lend(sums, lent, chosen, tokens, owners, access)
    going = []
    if experts:
        assert sums is not None, "refused where a method has no statistics"
        gone = {name for name in experts if enforcer.is_gone(name)}
        going = choose_experts(mixtures or {}, experts, window.patterns, sums, tokens, moments.owners, gone, access)
    own = {name: _bytes_of(layer) for name, layer in chosen.items() if owners[name] == access.rank}
    ordered = {} if sums is None else {name: parts for name, parts in (free or {}).items() if name in seen}
    for name in ordered.keys() & own.keys():  # each is twice there when it is written in another order
        own[name] = max(own[name], 2 * max(_bytes_of(part) for part in (layers[name], *ordered[name])))
    raise_everywhere(reserved(own, access), access)
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
            layer,
            window.patterns[name],
            weights.pop(name),
            earlier.pop(name),
            (sums or {}).pop(name, None),
            moments.output_weights.get(name),
        )
        for name, layer in chosen.items()
    }
    solved = _solve_tasks(tasks, teams, access, options, f"Solving at step {window.event.step}")
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
    tasks: dict[str, _Task], teams: Mapping[str, range], access: ParameterAccess, options: SolverOptions, title: str
) -> dict[str, _Solved]:
    """Solve the tasks of this rank, and raise on all ranks if one fails. All ranks must call it.

    `tasks` has the tasks of all layers. Those of this rank are removed as they are solved, to free memory.
    """
    split = {team: tasks[name].layer.rows for name, team in teams.items() if len(team) > 1}
    outlines = _outlines(tasks, access) if split else {}
    sizes = {name: _bytes_of(task.layer) for name, task in tasks.items()}
    solved: dict[str, _Solved] = {}
    error: tuple[str, Exception] | None = None
    in_turn = FactorsInTurn()
    mine = [name for name in tasks if access.rank in teams[name]]
    with access.in_teams(split) as team, open_phase(title, len(mine), "layers") as phase:
        for name, following in itertools.zip_longest(mine, mine[1:]):
            if error is not None:
                break
            start = time.perf_counter()
            task = tasks.pop(name)
            try:
                if len(teams[name]) == 1:
                    before = None if following is None else tasks[following].statistics
                    pruned: PrunedLayer | None = _solve_alone(task, in_turn, before, options)
                else:
                    assert team is not None
                    pruned = _solve_in_team(task, outlines[name], options, team)
                if pruned is not None:
                    num_pruned = pruned.mask.numel() - int(pruned.mask.count_nonzero())
                    solved[name] = _Solved(pruned, num_pruned, time.perf_counter() - start)
                    phase.advance(note=f"{pruned.relative_loss:.4f} {'.'.join(name.split('.')[-4:])}")
            except TeammateError:  # the member that failed raises its error below
                pass
            except Exception as failure:  # even out of memory, since the other ranks wait for this one
                error = (name, failure)
        largest = dict(sorted(sizes.items(), key=lambda item: item[1])[-1:])  # none if only experts are dropped
        raise_everywhere(error or reserved(largest, access), access)
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


def solve(
    weight: Tensor,
    inputs: Factors | None,
    keep: Tensor | None,
    pattern: Pattern,
    options: SolverOptions,
    team: RowTeam,
    output_weights: Tensor | None,
) -> PrunedLayer:
    """Solve a layer, or this rank's rows of it.

    `weight` and `keep` are (rows, in_features), with the rows that this rank has. `keep` is the keep mask of earlier
    events, True = kept; None if there is none. The pattern and the output weights are those of the whole layer. If
    `inputs` is None, the layer is pruned by magnitude. If `output_weights` is None, errors at all outputs count alike.
    """
    own = None if output_weights is None else output_weights[team.own_rows].to(weight.device)
    if inputs is None and options.needs_statistics:
        options = SolverOptions.as_published("magnitude")
    return prune_rows(weight, inputs, pattern, options, None if keep is None else keep.logical_not(), team, own)


@dataclass
class _Task:
    """A layer to solve, and this rank's tensors of it. Ranks other than the owner have at most the output weights."""

    layer: PrunableLayer
    pattern: Pattern
    weight: Adapted | None
    keep: Tensor | None
    statistics: HessianAccumulator | None
    output_weights: Tensor | None

    def take_hessian(self) -> Tensor | None:
        """The Hessian on the owner. The task drops the sum from which it is computed, to free memory."""
        statistics, self.statistics = self.statistics, None
        return None if statistics is None else statistics.compute()


@dataclass(frozen=True)
class _Outline:
    """Tells a team which tensors the owner of a task has."""

    dtype: torch.dtype
    has_keep: bool
    has_statistics: bool


def _outlines(tasks: Mapping[str, _Task], access: ParameterAccess) -> dict[str, _Outline]:
    """The outlines of all tasks. All ranks return the same."""
    own = {
        name: _Outline(task.weight.weight.dtype, task.keep is not None, task.statistics is not None)
        for name, task in tasks.items()
        if task.weight is not None
    }
    return {name: outline for part in access.gather(own) for name, outline in part.items()}


def _solve_alone(
    task: _Task, in_turn: FactorsInTurn, before: HessianAccumulator | None, options: SolverOptions
) -> PrunedLayer:
    assert task.weight is not None
    statistics, task.statistics = task.statistics, None
    inputs = None if statistics is None else in_turn.take(statistics, before)
    del statistics  # frees the sum, unless another layer shares it
    alone = Alone(task.layer.rows)
    return solve(task.weight.merged(), inputs, task.keep, task.pattern, options, alone, task.output_weights)


def _solve_in_team(task: _Task, outline: _Outline, options: SolverOptions, team: RankTeam) -> PrunedLayer | None:
    """Solve a layer with its team. The owner gets the whole layer, the other members None."""
    cols = task.layer.cols
    with team.stage():
        hessian = task.take_hessian()
        if outline.has_statistics:
            hessian = team.from_owner(hessian, (cols, cols), torch.float32)
        weight = team.hand_out(None if task.weight is None else task.weight.merged(), cols, outline.dtype)
        keep = team.hand_out(task.keep, cols, torch.bool) if outline.has_keep else None
        inputs = None if hessian is None else Factors(hessian)
        pruned = solve(weight, inputs, keep, task.pattern, options, team, task.output_weights)
        whole, mask = team.collect(pruned.weight), team.collect(pruned.mask)
    if whole is None or mask is None:
        return None
    return PrunedLayer(whole, mask, pruned.loss, pruned.relative_loss)


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
