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
    accumulators: Mapping[str, HessianAccumulator] | None,
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
        accumulators: Name -> this rank's statistics, or None for a method that needs none.
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
    if accumulators is not None:
        accumulators = _sum_on_owners(chosen, accumulators, owners, access)
    solved: dict[str, tuple[PrunedLayer, float]] = {}
    error: tuple[str, Exception] | None = None
    # keep masks first: reading one may talk to all ranks, solving does not
    frozen = {name: _frozen(enforcer.keep_mask(name)) for name in chosen}
    for name, layer in chosen.items():
        if owners[name] != access.rank or error is not None:
            continue
        start = time.perf_counter()
        try:
            hessian = None if accumulators is None else accumulators[name].compute()
            pruned = _solve(access.weight(layer), hessian, window.patterns[name], frozen[name], options)
        except Exception as failure:  # out of memory too: the other ranks would wait for this one
            error = (name, failure)
            continue
        solved[name] = (pruned, time.perf_counter() - start)
        on_solved(name, pruned.relative_loss)
    _raise_everywhere(error, access)
    seconds: dict[str, float] = {}
    for part in access.gather({name: duration for name, (_, duration) in solved.items()}):
        seconds.update(part)
    reports = []
    for name, layer in chosen.items():
        own = solved.pop(name, None)
        pruned = access.share(layer, own and own[0], owners[name])
        access.write(layer, pruned.weight)
        enforcer.set_mask(name, pruned.mask)
        reports.append(
            LayerReport(
                name=name,
                shape=(layer.rows, layer.cols),
                pattern=window.patterns[name].name,
                sparsity=1.0 - int(pruned.mask.count_nonzero()) / pruned.mask.numel(),
                loss=pruned.loss,
                relative_loss=pruned.relative_loss,
                seconds=seconds[name],
            )
        )
    return reports


def _frozen(keep: Tensor | None) -> Tensor | None:
    return None if keep is None else keep.logical_not()


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
    accumulators: Mapping[str, HessianAccumulator],
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
        return dict(accumulators)
    complete: dict[str, HessianAccumulator] = {}
    for name, layer in layers.items():
        own = accumulators.get(name) or HessianAccumulator(layer.cols, device=layer.parameter.device)
        # a copy: other layers may share the sum, and have another owner
        summed = own.sum.clone()
        access.sum_on_owner(summed, owners[name])
        if owners[name] == access.rank:
            complete[name] = HessianAccumulator(layer.cols, device=summed.device)
            complete[name].sum.copy_(summed)
            complete[name].num_tokens = sum(counts.get(name, 0) for counts in tokens)
    return complete
