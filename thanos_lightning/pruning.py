"""One window: the sums go to the layers' owners, each owner solves its layers, all ranks write the results.

Where ranks outnumber the layers of a window, the owner of a layer shares the work on its rows with others: its team.
Nothing is written before every layer of the window is solved on every rank.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from thanos_lightning.enforcement import MaskEnforcer
from thanos_lightning.progress import open_phase
from thanos_lightning.report.data import LayerReport
from thanos_lightning.sharding import ParameterAccess
from thanos_lightning.sharding.ranks import RankTeam
from thanos_lightning.solver import HessianAccumulator, Pattern, PrunedLayer, SolverError, Unstructured
from thanos_lightning.solver.factors import Factors, FactorsInTurn
from thanos_lightning.solver.layer import SolverOptions, prune_rows
from thanos_lightning.solver.team import Alone, RowTeam, TeammateError
from thanos_lightning.targets import PrunableLayer
from thanos_lightning.windows import Window

# Of a square layer, factoring the Hessian takes about a quarter of the time that all rows take.
_ROWS_PER_FACTOR = 4
# In the same unit: the eigenvectors of both factors, and the steps on all rows together.
_EIGENVECTORS, _JOINED_STEPS = 3, 20


# Of a layer's weights: fewer zeros come from elsewhere, as the rows of tokens that a vocabulary is padded with do.
_PRUNED_BEFORE = 0.1


class PruningError(RuntimeError):
    """A layer could not be pruned. No layer of its window has been changed."""


def _cost(layer: PrunableLayer, members: int, *, joined: bool = False) -> int:
    """How long a team of so many ranks solves: b³ + 4·c·b², of which only the second part is split.

    Where rows are joined, 3 (b³ + c³) + 20 cb (c + b) more.
    """
    rows, cols = layer.rows, layer.cols
    alone = cols**3 + _ROWS_PER_FACTOR * -(-rows // members) * cols**2
    return alone + joined * (_EIGENVECTORS * (cols**3 + rows**3) + _JOINED_STEPS * rows * cols * (rows + cols))


def assign_teams(layers: Mapping[str, PrunableLayer], world_size: int, *, joined: bool = False) -> dict[str, range]:
    """The ranks that solve each layer, its owner first. Decided from shapes alone.

    Where layers are no fewer than ranks, or their rows are joined, each has one rank, and ranks have about equally much
    to do. Otherwise each
    rank is in one team, which lie side by side, and each further rank goes where the time is longest. A team has no
    more ranks than its layer has rows; only where all teams are that large, ranks are left over.

    Examples:
        >>> assign_teams({}, world_size=2)
        {}
    """
    order = sorted(layers, key=lambda name: (-_cost(layers[name], 1, joined=joined), name))
    if len(layers) >= world_size or joined:
        loads = [0] * world_size
        teams = {}
        for name in order:
            owner = loads.index(min(loads))
            loads[owner] += _cost(layers[name], 1, joined=joined)
            teams[name] = range(owner, owner + 1)
        return teams
    sizes = dict.fromkeys(order, 1)
    for _ in range(world_size - len(layers)):
        able = [name for name in order if sizes[name] < layers[name].rows]
        if able:
            sizes[max(able, key=lambda name: _cost(layers[name], sizes[name]))] += 1
    ends = list(itertools.accumulate(sizes.values()))
    return {name: range(end - sizes[name], end) for name, end in zip(order, ends, strict=True)}


def assign_owners(layers: Mapping[str, PrunableLayer], world_size: int, *, joined: bool = False) -> dict[str, int]:
    """The rank that has the sums and the weight of each layer: the first of its team, see `assign_teams`.

    Examples:
        >>> assign_owners({}, world_size=2)
        {}
    """
    return {name: team[0] for name, team in assign_teams(layers, world_size, joined=joined).items()}


def check_weights(layers: Mapping[str, PrunableLayer], access: ParameterAccess) -> None:
    """Refuse weights that can't be pruned, before a training waits for that. All ranks call it.

    Args:
        layers: Name -> layer; this rank's pieces are looked at.
        access: Reads them, and tells the other ranks.

    Raises:
        PruningError: On all ranks, naming layers whose weights hold NaN or Inf.
    """
    extremes = {}
    for name, layer in layers.items():
        piece = next(access.local_tensors(layer), None)
        if piece is not None and piece.tensor.numel():
            # both are NaN where one entry is; in one tensor, so that a device is asked once
            extremes[name] = torch.stack(torch.aminmax(piece.tensor)).float()
    finite = torch.stack(list(extremes.values())).isfinite().all(dim=1).tolist() if extremes else []
    own = [name for name, is_finite in zip(extremes, finite, strict=True) if not is_finite]
    broken = list(dict.fromkeys(itertools.chain.from_iterable(access.gather(own))))
    if broken:
        more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        raise PruningError(
            f"the weight of layer {broken[0]}{more} holds NaN or Inf before the training: load a checkpoint that is "
            "whole, or add such layers to ignore"
        )


def prune_window(
    window: Window,
    layers: Mapping[str, PrunableLayer],
    accumulators: dict[str, HessianAccumulator] | None,
    *,
    access: ParameterAccess,
    enforcer: MaskEnforcer,
    options: SolverOptions,
    output_weights: Mapping[str, Tensor] = MappingProxyType({}),
    joins_rows: bool = False,
    later: Collection[str] = (),
    on_writing: Callable[[], None] = lambda: None,
) -> list[LayerReport]:
    """Solve the layers of a window, write them, and hold their masks.

    Args:
        window: The layers and their patterns.
        layers: Name -> layer.
        accumulators: Name -> this rank's statistics, or None for a method that needs none. Emptied, so that memory
            is free for what comes.
        access: How the strategy's parameters are reached.
        enforcer: Gives the masks of earlier events and takes the new ones.
        options: For the solver.
        output_weights: Name -> how much an error of each of the layer's outputs counts, the same on all ranks; or the
            errors of each two, on its owner. Those of a layer that is missing count alike.
        joins_rows: Whether they are of each two; the same on all ranks.
        later: The layers that have another window. If no token has reached one of them in this window, it is left as
            it is; another such layer is pruned by its weights alone. Either is warned of.
        on_writing: Called when all layers are solved, before the first one is written.

    Returns:
        What was done, a row per layer in the window's order; the same on all ranks.

    Raises:
        PruningError: On all ranks alike, if no layer saw a token, the solver fails or a rank lacks memory. Nothing has
            been written.
    """
    chosen = {name: layers[name] for name in window.patterns}
    blind: list[str] = []
    if accumulators is not None:
        unseen = unseen_layers(chosen, accumulators, access)
        postponed, blind = _divide(unseen, later)
        chosen = {name: layer for name, layer in chosen.items() if name not in postponed}
    seen = {name: layer for name, layer in chosen.items() if name not in blind}
    teams = assign_teams(chosen, access.world_size, joined=joins_rows)
    owners = {name: team[0] for name, team in teams.items()}
    sums = None if accumulators is None else sum_on_owners(seen, accumulators, owners, access)
    # in fp32, and their masks
    whole = {name: 5 * layer.rows * layer.cols for name, layer in chosen.items()}
    raise_everywhere(reserved({name: whole[name] for name in chosen if owners[name] == access.rank}, access), access)
    # first all that talks, then all that solves
    weights = {name: access.collect_weight(layer, owners[name]) for name, layer in chosen.items()}
    earlier = {name: enforcer.collect_keep(name, owners[name]) for name in chosen}
    split = {team: chosen[name].rows for name, team in teams.items() if len(team) > 1}
    tasks = {
        name: _Task(
            layer,
            window.patterns[name],
            weights.pop(name),
            earlier.pop(name),
            (sums or {}).pop(name, None),
            output_weights.get(name),
        )
        for name, layer in chosen.items()
    }
    outlines = _outlines(tasks, access) if split else {}
    solved: dict[str, _Solved] = {}
    error: tuple[str, Exception] | None = None
    in_turn = FactorsInTurn()
    mine = [name for name in chosen if access.rank in teams[name]]
    solving = open_phase(f"Solving at step {window.event.step}", len(mine), "layers")
    with access.in_teams(split) as team, solving as phase:
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
            except TeammateError:  # whose own error is raised below
                pass
            except Exception as failure:  # out of memory too: the other ranks would wait for this one
                error = (name, failure)
        largest = max(whole, key=lambda name: whole[name])
        raise_everywhere(error or reserved({largest: whole[largest]}, access), access)
    facts: dict[str, tuple[int, float, float, float]] = {}
    for part in access.gather({name: own.facts for name, own in solved.items()}):
        facts.update(part)
    on_writing()
    reports = []
    with open_phase(f"Writing at step {window.event.step}", len(chosen), "layers") as phase:
        for name, layer in chosen.items():
            own = solved.pop(name, None)
            weight, keep = (None, None) if own is None else (own.pruned.weight, own.pruned.mask)
            drop = access.write(layer, weight, keep, owners[name])
            num_pruned, loss, relative_loss, seconds = facts[name]
            enforcer.hold(name, drop, num_pruned)
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


def hold_zeros(
    layers: Mapping[str, PrunableLayer], access: ParameterAccess, enforcer: MaskEnforcer
) -> dict[str, Unstructured]:
    """Hold the zeros of layers that were pruned before this training. All ranks must call it.

    More than a tenth of such a layer is 0, but not all of it: so are layers that begin at 0 to be trained.

    Args:
        layers: Name -> layer.
        access: How the strategy's parameters are reached.
        enforcer: Takes the masks.

    Returns:
        Name -> the share that is held, of layers that were pruned; the same on all ranks.
    """
    counts = access.gather({name: _count_zeros(layer, access) for name, layer in layers.items()})
    found: dict[str, Unstructured] = {}
    for name, layer in layers.items():
        zeros, total = (sum(numbers) for numbers in zip(*(counted[name] for counted in counts), strict=True))
        if not _PRUNED_BEFORE * total < zeros < total:
            continue
        size = layer.rows * layer.cols
        raise_everywhere(reserved({name: 5 * size}, access), access)
        weight = access.collect_weight(layer, owner=0)
        keep = None if weight is None else weight != 0
        num_pruned = access.gather(0 if keep is None else size - int(keep.count_nonzero()))[0]
        drop = access.write(layer, None if weight is None or keep is None else weight.where(keep, 0), keep, owner=0)
        enforcer.hold(name, drop, num_pruned)
        found[name] = Unstructured(num_pruned / size)
    return found


def _count_zeros(layer: PrunableLayer, access: ParameterAccess) -> tuple[int, int]:
    """Of the entries that this rank holds: how many are 0, and how many there are."""
    piece = next(access.local_tensors(layer), None)
    if piece is None or piece.what != "weight":  # offloaded to a disk
        return 0, 0
    return piece.tensor.numel() - int(piece.tensor.count_nonzero()), piece.tensor.numel()


@dataclass(frozen=True)
class _Solved:
    """A layer that this rank owns, solved."""

    pruned: PrunedLayer
    num_pruned: int
    seconds: float

    @property
    def facts(self) -> tuple[int, float, float, float]:
        """What the other ranks report of it."""
        return self.num_pruned, self.pruned.loss, self.pruned.relative_loss, self.seconds


def prune(
    weight: Tensor,
    inputs: Factors | None,
    keep: Tensor | None,
    pattern: Pattern,
    options: SolverOptions,
    team: RowTeam,
    output_weights: Tensor | None,
) -> PrunedLayer:
    """Solve a layer, or this rank's rows of it.

    Args:
        weight: (rows, in_features) that this rank has.
        inputs: Of its Hessian; without one it is pruned by magnitude.
        keep: The keep mask of earlier events, of the weight's shape, or None where there was none.
        pattern: For the whole layer.
        options: For the solver.
        team: Who has the other rows.
        output_weights: Of all rows of the layer, or None.
    """
    own = None if output_weights is None else output_weights[team.own_rows].to(weight.device)
    if inputs is None and options.needs_statistics:
        options = SolverOptions.as_published("magnitude")
        own = None if own is None or own.ndim == 2 else own
    return prune_rows(weight, inputs, pattern, options, None if keep is None else keep.logical_not(), team, own)


@dataclass
class _Task:
    """A layer to solve, and what this rank has of it: all on its owner; elsewhere the output weights."""

    layer: PrunableLayer
    pattern: Pattern
    weight: Tensor | None
    keep: Tensor | None
    statistics: HessianAccumulator | None
    output_weights: Tensor | None

    def take_hessian(self) -> Tensor | None:
        """The Hessian on the owner. The sum that it is made of is let go."""
        statistics, self.statistics = self.statistics, None
        return None if statistics is None else statistics.compute()


@dataclass(frozen=True)
class _Outline:
    """What the owner of a task has, for the other members of its team."""

    dtype: torch.dtype
    has_keep: bool
    has_statistics: bool


def _outlines(tasks: Mapping[str, _Task], access: ParameterAccess) -> dict[str, _Outline]:
    """The outlines of all tasks, on all ranks."""
    own = {
        name: _Outline(task.weight.dtype, task.keep is not None, task.statistics is not None)
        for name, task in tasks.items()
        if task.weight is not None
    }
    return {name: outline for told in access.gather(own) for name, outline in told.items()}


def _solve_alone(
    task: _Task, in_turn: FactorsInTurn, before: HessianAccumulator | None, options: SolverOptions
) -> PrunedLayer:
    assert task.weight is not None
    statistics, task.statistics = task.statistics, None
    inputs = None if statistics is None else in_turn.take(statistics, before)
    del statistics  # the sum, unless another layer has it
    alone = Alone(task.layer.rows)
    return prune(task.weight, inputs, task.keep, task.pattern, options, alone, task.output_weights)


def _solve_in_team(task: _Task, outline: _Outline, options: SolverOptions, team: RankTeam) -> PrunedLayer | None:
    """The whole layer on its owner, None on the other members."""
    cols = task.layer.cols
    with team.stage():
        hessian = task.take_hessian()
        if outline.has_statistics:
            hessian = team.from_owner(hessian, (cols, cols), torch.float32)
        weight = team.hand_out(task.weight, cols, outline.dtype)
        keep = team.hand_out(task.keep, cols, torch.bool) if outline.has_keep else None
        inputs = None if hessian is None else Factors(hessian)
        pruned = prune(weight, inputs, keep, task.pattern, options, team, task.output_weights)
        whole, mask = team.collect(pruned.weight), team.collect(pruned.mask)
    if whole is None or mask is None:
        return None
    return PrunedLayer(whole, mask, pruned.loss, pruned.relative_loss)


def reserved(blocks: Mapping[str, int], access: ParameterAccess) -> tuple[str, Exception] | None:
    """Ask for the memory that messages about layers will need; what fails, for `raise_everywhere`.

    Args:
        blocks: Name of a layer -> bytes.
        access: Has the device.
    """
    if access.world_size > 1:
        try:
            access.reserve(blocks.values())
        except Exception as failure:  # whatever a device's allocator raises
            return max(blocks, key=lambda name: blocks[name]), failure
    return None


def raise_everywhere(error: tuple[str, Exception] | None, access: ParameterAccess) -> None:
    """Raise on all ranks if one has an error (layer, cause), so that none waits for a rank that has given up."""
    own, cause = None, None
    if error is not None:
        layer, cause = error
        own = f"layer {layer}: {'' if isinstance(cause, SolverError) else f'{type(cause).__name__}: '}{cause}"
    for rank, message in enumerate(access.gather(own)):
        if message is not None:
            where = f" (on rank {rank})" if access.world_size > 1 else ""
            raise PruningError(f"{message}{where}. No layer of this window was changed") from cause


def unseen_layers(
    layers: Mapping[str, PrunableLayer], accumulators: Mapping[str, HessianAccumulator], access: ParameterAccess
) -> list[str]:
    """The layers that no token has reached on any rank, the same on all. All must call it.

    Raises:
        PruningError: If these are all.
    """
    seen = access.gather([name for name, accumulator in accumulators.items() if accumulator.num_tokens])
    reached = set(itertools.chain.from_iterable(seen))
    if not reached:
        raise PruningError(
            "no token was counted at all: every batch was empty or all padding. Check the batches, and their attention "
            "mask. No layer of this window was changed"
        )
    return [name for name in layers if name not in reached]


def _divide(unseen: Sequence[str], later: Collection[str]) -> tuple[list[str], list[str]]:
    """Those that are left for another window, and those that are pruned by their weights alone."""
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


def sum_on_owners(
    layers: Mapping[str, PrunableLayer],
    accumulators: dict[str, HessianAccumulator],
    owners: Mapping[str, int],
    access: ParameterAccess,
    *,
    stay: bool = False,
) -> dict[str, HessianAccumulator]:
    """The statistics of all ranks, each complete on its layer's owner.

    Args:
        layers: Name -> layer.
        accumulators: Name -> this rank's statistics. Emptied.
        owners: Name -> rank.
        access: How the strategy's parameters are reached.
        stay: Whether someone else holds the accumulators, so that emptying them gives no memory back.
    """
    tokens = access.gather({name: accumulator.num_tokens for name, accumulator in accumulators.items()})
    if access.world_size == 1:
        complete: dict[str, HessianAccumulator] = dict(accumulators)
        accumulators.clear()
        return complete
    complete = {}
    groups = _sharing(layers, accumulators, access)
    needed = {
        names[0]: 4 * layers[names[0]].cols ** 2
        for names in groups
        if any(owners[name] == access.rank for name in names)
    }
    if not stay:  # a rank's own sum is let go when the next one comes
        needed = dict(sorted(needed.items(), key=lambda item: item[1])[-1:])
    raise_everywhere(reserved(needed, access), access)
    for names in groups:
        own = accumulators.get(names[0])
        width = layers[names[0]].cols
        seen = sum(counts.get(names[0], 0) for counts in tokens)
        for owner in sorted({owners[name] for name in names}):
            summed = access.sum_on(owner, None if own is None else own.triangle, width)
            if summed is not None:
                whole = HessianAccumulator.of_sum(summed, seen)
                complete.update({name: whole for name in names if owners[name] == owner})
        for name in names:
            accumulators.pop(name, None)
    return complete


def _sharing(
    layers: Mapping[str, PrunableLayer], accumulators: Mapping[str, HessianAccumulator], access: ParameterAccess
) -> list[list[str]]:
    """The layers, grouped by who shares one sum on every rank, in an order that is the same everywhere."""
    first: dict[int, str] = {}
    leaders = {name: first.setdefault(id(accumulator), name) for name, accumulator in accumulators.items()}
    everywhere = access.gather(leaders)
    groups: dict[tuple[str | None, ...], list[str]] = {}
    for name in layers:
        # a rank on which a layer saw nothing has nothing to say against, and adds nothing; but then for all of a group
        groups.setdefault(tuple(told.get(name) for told in everywhere), []).append(name)
    return list(groups.values())
