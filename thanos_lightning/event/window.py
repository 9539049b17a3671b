"""Prunes a window, or scans it: the owner of a layer, a rank, gets its sums and solves it; all ranks get the result.

No rank writes before every layer of the window is solved.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from thanos_lightning.collect.collector import Moments
from thanos_lightning.enforcement import MaskEnforcer
from thanos_lightning.event.experts import Sums, choose_experts, drop_experts, lend, lenders
from thanos_lightning.event.order import of_ordered_inputs, order_channels, rows_of
from thanos_lightning.event.reconstruct import Solved, reconstruct
from thanos_lightning.event.targets import Targets
from thanos_lightning.layers.blocks import Block
from thanos_lightning.layers.lora import Adapted, adapters_of, collect, collect_merged, write_merged
from thanos_lightning.layers.targets import Layer
from thanos_lightning.plan.allocation import LayerSensitivity
from thanos_lightning.plan.windows import Window
from thanos_lightning.ranks.access import ParameterAccess
from thanos_lightning.ranks.owners import sum_on_owners, tokens_seen
from thanos_lightning.ranks.talk import Failures, reserve
from thanos_lightning.ranks.view import View
from thanos_lightning.report.data import BlockReport, LayerReport, Part
from thanos_lightning.report.progress import open_phase
from thanos_lightning.solver import Experts, HessianAccumulator, Pattern
from thanos_lightning.solver.hessian import Factors, FactorsInTurn
from thanos_lightning.solver.layer import SolverOptions, losses_at, prune_layer, relative


# More than sixty lines: a window's parts in their order, each of which all ranks take together
def prune_window(
    window: Window,
    targets: Targets,
    moments: Moments,
    enforcer: MaskEnforcer,
    options: SolverOptions,
    *,
    later: Collection[str] = (),
    blocks: Mapping[str, Block] | None = None,
    now: Callable[[Part], None] = lambda _: None,
) -> tuple[list[LayerReport], list[BlockReport]]:
    """Solve the layers of a window, write them, and hold their masks. All ranks must call it.

    Args:
        window: The layers that are pruned now, by name, with their patterns.
        targets: All layers of the training, and what goes with them.
        moments: What was collected in the window, and which rank owns each layer.
        enforcer: Holds the masks from now on.
        options: How a layer is solved.
        later: Layers that a later window prunes, too. Such a layer stays as it is if no token has reached it; any other
            layer without tokens is pruned by magnitude. Both cases warn.
        blocks: Trained after the solves, if the moments have what they got and gave.
        now: Called when another part of the event begins.

    Returns:
        Reports of the pruned layers in the window's order, followed by reports of mixtures; and reports of the trained
        blocks. They are the same on all ranks.

    Raises:
        PruningError: On all ranks, if no layer saw a token, the solver fails or a rank lacks memory. No layer is
            pruned.
    """
    access, owners = enforcer.access, moments.owners
    layers = {name: targets.layers[name] for name in window.patterns}
    experts = {name: layer for name, layer in layers.items() if isinstance(window.patterns[name], Experts)}
    chosen = {name: layer for name, layer in layers.items() if name not in experts}
    sums = Sums({}, {}, {})
    dropped: list[tuple[list[str], LayerReport]] = []
    if moments.accumulators is not None:
        sums = _sum(layers, chosen, layers, moments, access)
        _divide(chosen, sums, later, warns_of_few=options.uses_correlations)
        if experts:
            dropped = choose_experts(targets.mixtures, experts, window.patterns, sums, owners, enforcer)
    reordered = {name: parts for name, parts in targets.reordered.items() if name in chosen and sums.reach(name)}
    sizes = {name: _bytes_of(layer) for name, layer in chosen.items()}
    owned = {name: size for name, size in sizes.items() if owners[name] == access.rank}
    reserve(needed_in_order(owned, reordered, layers), access)
    if reordered:
        _reorder(reordered, window, layers, sums, moments, enforcer)
    # All ranks exchange tensors before the first solve, so that no rank waits for the solve of another rank
    collected = {name: collect(layer, owners[name], access) for name, layer in chosen.items()}
    earlier = {name: enforcer.keep_mask(name, owners[name]) for name in chosen}
    weights = {name: weight for name, weight in collected.items() if weight is not None}
    del collected
    largest = dict(sorted(sizes.items(), key=lambda item: item[1])[-1:])  # none if only experts are dropped
    solved, reports = _solve(window, weights, earlier, sums.of_owner, moments.output_weights, options, largest, access)
    reports = access.union(reports)
    trained: list[BlockReport] = []
    if moments.states is not None and blocks:
        now("reconstructing")
        inside = {name: [chosen[one] for one in block.layers if one in chosen] for name, block in blocks.items()}
        title = f"Reconstructing at step {window.event.step}"
        pruned = {name: layers for name, layers in inside.items() if layers}
        owners, trained = reconstruct(moments.states, pruned, solved, owners, access, title)
    now("writing")
    num_pruned = {name: number for name, (_, number) in reports.items()}
    with open_phase(f"Writing at step {window.event.step}", len(chosen), "layers") as phase:
        for name, layer in chosen.items():
            _write(layer, solved.pop(name, None), num_pruned[name], owners[name], targets, enforcer)
            phase.advance()
    for downs, _ in dropped:
        drop_experts(downs, experts, targets.coupled, moments.owners, enforcer)
    of_layers = [replace(reports[name][0], tokens=sums.tokens.get(name)) for name in chosen]
    return [*of_layers, *(report for _, report in dropped)], trained


def _sum(
    layers: Mapping[str, Layer],
    solved: Mapping[str, Layer],
    summed: Mapping[str, Layer],
    moments: Moments,
    access: ParameterAccess,
) -> Sums:
    """Sum the statistics of a window on the owners. All ranks must call it.

    The `solved` layers may borrow statistics from other experts among the `layers`. The statistics of the `summed`
    layers are brought to their owners.
    """
    assert moments.accumulators is not None
    tokens = tokens_seen(layers, moments.accumulators, access)
    lent = lenders(solved, tokens)
    counted = {name: layer for name, layer in summed.items() if tokens[name]}
    sums = sum_on_owners(counted, moments.accumulators, tokens, moments.owners, access, stay=moments.stay)
    lend(sums, lent, solved, tokens, moments.owners, access)
    return Sums(tokens, lent, sums)


def _reorder(
    reordered: Mapping[str, Sequence[View]],
    window: Window,
    layers: Mapping[str, Layer],
    sums: Sums,
    moments: Moments,
    enforcer: MaskEnforcer,
) -> None:
    """Put channels into a better order: weights, statistics and output weights. All ranks must call it."""
    title = f"Ordering channels at step {window.event.step}"
    orders = order_channels(reordered, layers, window.patterns, sums.of_owner, moments.owners, enforcer, title)
    for name, order in orders.items():
        if name in sums.of_owner:
            sums.of_owner[name] = of_ordered_inputs(sums.of_owner[name], order)
        for part in reordered[name]:
            if (of_outputs := moments.output_weights.get(part.name)) is not None:
                of_outputs.copy_(of_outputs[rows_of(order, part).to(of_outputs.device)])


def _solve(
    window: Window,
    weights: dict[str, Adapted],
    earlier: dict[str, Tensor | None],
    sums: dict[str, HessianAccumulator],
    output_weights: Mapping[str, Tensor],
    options: SolverOptions,
    largest: Mapping[str, int],
    access: ParameterAccess,
) -> tuple[dict[str, Solved], dict[str, tuple[LayerReport, int]]]:
    """Solve the layers whose weights this rank has, and raise on all ranks if one fails. All ranks must call it.

    A layer without a sum is solved by magnitude. What has been solved is removed from the arguments, to free memory.
    `earlier` has the keep masks of earlier events. `largest` names the layer whose result takes most memory, in bytes;
    all ranks will receive it. Return the results, which wait on the CPU for those of all layers, and a report of each
    layer with the number of its pruned entries.
    """
    blindly = SolverOptions.as_published("magnitude") if options.needs_statistics else options
    kept: dict[str, Solved] = {}
    reports: dict[str, tuple[LayerReport, int]] = {}
    failures, in_turn, names = Failures(access), FactorsInTurn(), list(weights)
    with open_phase(f"Solving at step {window.event.step}", len(names), "layers") as phase:
        for name, following in itertools.zip_longest(names, names[1:], fillvalue=""):
            start = time.perf_counter()
            is_seen = name in sums
            with failures.catching(layer=name):
                weight, keep, of_outputs = weights.pop(name).merged(), earlier.pop(name), output_weights.get(name)
                pruned = prune_layer(
                    weight,
                    in_turn.take(sums.pop(name), sums.get(following)) if is_seen else None,
                    window.patterns[name],
                    options if is_seen else blindly,
                    None if keep is None else keep.logical_not(),
                    None if of_outputs is None else of_outputs.to(weight.device),
                )
                num_pruned = pruned.mask.numel() - int(pruned.mask.count_nonzero())
                kept[name] = Solved(pruned.weight.cpu(), pruned.mask.cpu())
                report = LayerReport(
                    name=name,
                    shape=(weight.shape[0], weight.shape[1]),
                    pattern=window.patterns[name].name,
                    sparsity=num_pruned / weight.numel(),
                    loss=pruned.loss,
                    relative_loss=pruned.relative_loss,
                    seconds=time.perf_counter() - start,
                )
                reports[name] = report, num_pruned
                phase.advance(note=f"loss {pruned.relative_loss:.4f}")
            if failures.error is not None:
                break
        reserve(largest, access, failures)
    return kept, reports


def needed_in_order(
    own: Mapping[str, int], ordered: Mapping[str, Sequence[View]], layers: Mapping[str, Layer]
) -> dict[str, int]:
    """Bytes that this rank allocates for its own layers, of which the channels of some get another order.

    While they are written, such weights exist twice. Statistics exist in both orders, of one layer at a time.
    """
    needed = dict(own)
    here = ordered.keys() & own.keys()
    for name in here:
        needed[name] = max(own[name], 2 * max(_bytes_of(part) for part in (layers[name], *ordered[name])))
    if here:
        widest = max(here, key=lambda name: layers[name].cols)
        needed[widest] += 2 * 4 * layers[widest].cols ** 2
    return needed


def _write(
    layer: Layer, solved: Solved | None, num_pruned: int, owner: int, targets: Targets, enforcer: MaskEnforcer
) -> None:
    """Write a layer as it was solved, on its owner, and the rows that go with its channels. Hold their masks."""
    weight, keep = (None, None) if solved is None else (solved.weight, solved.keep)
    enforcer.hold(layer.name, write_merged(layer, weight, keep, owner, enforcer.access), num_pruned)
    for part in targets.coupled.get(layer.name, ()):
        _write_coupled(part, keep, owner, enforcer)


def _write_coupled(part: View, keep: Tensor | None, owner: int, enforcer: MaskEnforcer) -> None:
    """Prune the rows of channels that a down layer has lost. `keep` is the down layer's, on its owner."""
    access = enforcer.access
    weight, earlier = collect_merged(part, owner, access), enforcer.keep_mask(part.name, owner)
    kept_rows = None
    if keep is not None and weight is not None:
        rows = keep.any(0).repeat(part.rows // keep.shape[1])  # row i, width + i, … is of channel i
        kept_rows = rows.unsqueeze(1).expand(part.rows, part.cols).to(weight.device)
        kept_rows = kept_rows if earlier is None else kept_rows & earlier.to(kept_rows.device)
        weight = weight.where(kept_rows, 0)
    num_pruned = access.gather(0 if kept_rows is None else kept_rows.numel() - int(kept_rows.count_nonzero()))[owner]
    enforcer.hold(part.name, write_merged(part, weight, kept_rows, owner, access), num_pruned)


def scan_window(
    window: Window,
    layers: Mapping[str, Layer],
    moments: Moments,
    access: ParameterAccess,
    options: SolverOptions,
    tried: Mapping[str, Sequence[Pattern]],
) -> dict[str, LayerSensitivity]:
    """Find what each layer of a window would lose, for an allocation: name -> sensitivity. No weight changes.

    All ranks must call it, and return the same. `tried` has the patterns whose losses the scan computes for each layer.
    The scan skips ADMM and refinement (they change little between layers), and experts that may go as a whole.

    Raises:
        PruningError: On all ranks, if no layer saw a token, the solver fails or a rank lacks memory.
    """
    solved = {name: layer for name, layer in layers.items() if not isinstance(window.patterns[name], Experts)}
    sums = _sum(layers, solved, solved, moments, access)
    chosen = {name: layer for name, layer in solved.items() if sums.reach(name)}
    owned = {name: layer for name, layer in chosen.items() if moments.owners[name] == access.rank}
    reserve({name: 4 * layer.rows * layer.cols for name, layer in owned.items()}, access)  # in fp32
    weights = {name: collect(layer, moments.owners[name], access) for name, layer in chosen.items()}
    scanned: dict[str, LayerSensitivity] = {}
    failures, in_turn, names = Failures(access), FactorsInTurn(), list(owned)
    with open_phase("Finding out what each layer would lose", len(names), "layers") as phase:
        for name, following in itertools.zip_longest(names, names[1:], fillvalue=""):
            weight = weights.pop(name)
            assert weight is not None
            with failures.catching(layer=name):
                inputs = in_turn.take(sums.of_owner.pop(name), sums.of_owner.get(following))
                scanned[name] = _scan_layer(
                    weight.merged(), inputs, tried[name], options, moments.output_weights.get(name)
                )
                phase.advance(note=name)
            if failures.error is not None:
                break
    failures.raise_together()
    unknown = {name: LayerSensitivity({}) for name in layers if name not in chosen}
    return unknown | access.union(scanned)


def _scan_layer(
    weight: Tensor, inputs: Factors, tried: Sequence[Pattern], options: SolverOptions, output_weights: Tensor | None
) -> LayerSensitivity:
    if output_weights is not None:
        output_weights = output_weights.to(weight.device)
    of_rows, dense = losses_at(weight, inputs, tried, options, output_weights)
    losses: dict[float, float] = {}
    weighted: dict[float, float] = {}
    for level, lost in zip(tried, of_rows, strict=True):
        losses[level.sparsity] = relative(float(lost.sum()), float(dense.sum()))
        if output_weights is not None:
            weighted[level.sparsity] = float(output_weights.to(lost.dtype) @ lost)
    return LayerSensitivity(losses, weighted or None)


def _bytes_of(layer: View) -> int:
    """A weight in fp32 and its mask, and what its adapters add."""
    return (9 if adapters_of(layer) else 5) * layer.rows * layer.cols


def _warn_of_few(tokens: Mapping[str, int], layers: Mapping[str, Layer]) -> None:
    few = {name: layers[name].cols / seen for name, seen in tokens.items() if 0 < seen < layers[name].cols}
    if few:
        worst = max(few, key=lambda name: few[name])
        rank_zero_warn(
            f"{len(few)} layer(s) saw fewer tokens than they have inputs, such as {worst} ({tokens[worst]:,} for "
            f"{layers[worst].cols:,}), too few to tell the inputs apart: give {math.ceil(few[worst])} times as many, "
            "or better 100,000 (calibration.batches, or calibration.steps without them)"
        )


def _divide(chosen: dict[str, Layer], sums: Sums, later: Collection[str], *, warns_of_few: bool) -> None:
    """Leave out layers without tokens if a later window prunes them. Other such layers are pruned by magnitude."""
    unseen = [name for name in chosen if not sums.reach(name)]
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
    if warns_of_few:
        borrowed = {name: sum(sums.tokens[other] for other in others) for name, others in sums.lent.items()}
        _warn_of_few({name: borrowed.get(name, sums.tokens[name]) for name in chosen}, chosen)
    for name in postponed:
        del chosen[name]
