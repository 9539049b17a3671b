"""One window: the sums go to the layers' owners, each owner solves its layers, all ranks write the results.

Nothing is written before every layer of the window is solved on every rank.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from thanos_lightning.enforcement import MaskEnforcer
from thanos_lightning.planning import Window
from thanos_lightning.report import LayerReport
from thanos_lightning.sharding import ParameterAccess
from thanos_lightning.solver import HessianAccumulator, Pattern, PrunedLayer, SolverError, prune
from thanos_lightning.targets import PrunableLayer


class PruningError(RuntimeError):
    """A layer could not be pruned. No layer of its window has been changed."""


@dataclass(frozen=True)
class SolverOptions:
    """What `prune` is called with for every layer; see there.

    Attributes:
        method: "thanos", "sparsegpt", "wanda" or "magnitude".
        block_size: Columns pruned jointly.
        damping: Relative to the mean of the Hessian's diagonal.
        refine_steps: Conjugate-gradient steps on the kept weights after the method.
    """

    method: str
    block_size: int
    damping: float
    refine_steps: int

    @property
    def needs_statistics(self) -> bool:
        """Whether the layers' inputs must be seen before an event."""
        return self.method != "magnitude" or self.refine_steps > 0


def assign_owners(layers: Mapping[str, PrunableLayer], world_size: int) -> dict[str, int]:
    """The rank that solves each layer, balanced by the cost b³ + c·b² and decided from shapes alone.

    Example:
        >>> assign_owners({}, world_size=2)
        {}
    """
    loads = [0] * world_size
    owners = {}
    costs = {name: layer.cols**3 + layer.rows * layer.cols**2 for name, layer in layers.items()}
    for name in sorted(costs, key=lambda name: (-costs[name], name)):
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += costs[name]
    return owners


def prune_window(
    window: Window,
    layers: Mapping[str, PrunableLayer],
    accumulators: dict[str, HessianAccumulator] | None,
    *,
    access: ParameterAccess,
    enforcer: MaskEnforcer,
    options: SolverOptions,
    on_solved: Callable[[str, float], None] = lambda name, loss: None,
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
        on_solved: Called with a layer's name and relative loss when this rank has solved it.

    Returns:
        What was done, a row per layer in the window's order; the same on all ranks.

    Raises:
        PruningError: On all ranks alike, if a layer saw no token or the solver fails. Nothing has been written.
    """
    chosen = {name: layers[name] for name in window.patterns}
    owners = assign_owners(chosen, access.world_size)
    sums = None if accumulators is None else _sum_on_owners(chosen, accumulators, owners, access)
    # first all that talks, then all that solves
    weights = {name: access.collect_weight(layer, owners[name]) for name, layer in chosen.items()}
    earlier = {name: enforcer.collect_keep(name, owners[name]) for name in chosen}
    solved: dict[str, _Solved] = {}
    error: tuple[str, Exception] | None = None
    for name in chosen:
        if owners[name] != access.rank or error is not None:
            continue
        start = time.perf_counter()
        try:
            hessian = None if sums is None else sums.pop(name).compute()
            weight, keep = weights.pop(name), earlier.pop(name)
            assert weight is not None
            frozen = None if keep is None else keep.logical_not()
            pruned = _solve(weight, hessian, window.patterns[name], frozen, options)
        except Exception as failure:  # out of memory too: the other ranks would wait for this one
            error = (name, failure)
            continue
        num_pruned = pruned.mask.numel() - int(pruned.mask.count_nonzero())
        solved[name] = _Solved(pruned, num_pruned, time.perf_counter() - start)
        on_solved(name, pruned.relative_loss)
    _raise_everywhere(error, access)
    facts: dict[str, tuple[int, float, float, float]] = {}
    for part in access.gather({name: own.facts for name, own in solved.items()}):
        facts.update(part)
    reports = []
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
    return reports


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


def _solve(
    weight: Tensor, hessian: Tensor | None, pattern: Pattern, frozen: Tensor | None, options: SolverOptions
) -> PrunedLayer:
    return prune(
        weight,
        hessian,
        pattern,
        method=options.method,
        block_size=options.block_size,
        damping=options.damping,
        frozen=frozen,
        refine_steps=options.refine_steps,
    )


def _raise_everywhere(error: tuple[str, Exception] | None, access: ParameterAccess) -> None:
    """Raise on all ranks if one has an error (layer, cause), so that none waits for a rank that has given up."""
    own, cause = None, None
    if error is not None:
        layer, cause = error
        own = f"layer {layer}: {'' if isinstance(cause, SolverError) else f'{type(cause).__name__}: '}{cause}"
    for rank, message in enumerate(access.gather(own)):
        if message is not None:
            where = f" (on rank {rank})" if access.world_size > 1 else ""
            raise PruningError(f"{message}{where}. No layer of this window was changed") from cause


def _sum_on_owners(
    layers: Mapping[str, PrunableLayer],
    accumulators: dict[str, HessianAccumulator],
    owners: Mapping[str, int],
    access: ParameterAccess,
) -> dict[str, HessianAccumulator]:
    """The statistics of all ranks, each complete on its layer's owner."""
    tokens = access.gather({name: accumulator.num_tokens for name, accumulator in accumulators.items()})
    unused = [name for name in layers if not any(counts.get(name) for counts in tokens)]
    if unused:
        total = max((count for counts in tokens for count in counts.values()), default=0)
        reason = (
            "it was not called (attention modules may read a weight without calling its layer, experts may get no "
            "token): collect more steps, or add it to ignore"
            if total
            else "no token was counted at all: every batch was empty or all padding. Check the batches' attention_mask"
        )
        raise PruningError(f"layer {unused[0]} has no statistics, {reason}. No layer of this window was changed")
    if access.world_size == 1:
        complete: dict[str, HessianAccumulator] = dict(accumulators)
        accumulators.clear()
        return complete
    complete = {}
    for names in _sharing(layers, accumulators, access):
        own = accumulators.get(names[0])
        width = layers[names[0]].cols
        seen = sum(counts.get(names[0], 0) for counts in tokens)
        for owner in sorted({owners[name] for name in names}):
            summed = access.sum_on(owner, None if own is None else own.sum, width)
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
