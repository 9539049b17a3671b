"""Prunes a window, or scans it: owners receive the sums of their layers and solve them, and all ranks get the results.

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
from thanos_lightning.event.experts import choose_experts, drop_experts, lend, lenders
from thanos_lightning.event.order import of_ordered_inputs, order_channels, rows_of
from thanos_lightning.event.reconstruct import Solved, reconstruct
from thanos_lightning.layers.blocks import Block
from thanos_lightning.layers.experts import Mixture
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
from thanos_lightning.solver.factors import Factors, FactorsInTurn
from thanos_lightning.solver.layer import SolverOptions, losses_at, prune_layer, relative


def prune_window(
    window: Window,
    layers: Mapping[str, Layer],
    moments: Moments,
    *,
    access: ParameterAccess,
    enforcer: MaskEnforcer,
    options: SolverOptions,
    coupled: Mapping[str, Sequence[View]] | None = None,
    later: Collection[str] = (),
    reordered: Mapping[str, Sequence[View]] | None = None,
    blocks: Mapping[str, Block] | None = None,
    mixtures: Mapping[str, Mixture] | None = None,
    now: Callable[[Part], None] = lambda _: None,
) -> tuple[list[LayerReport], list[BlockReport]]:
    """Solve the layers of a window, write them, and hold their masks. All ranks must call it.

    Args:
        window: The layers that are pruned now, by name, with their patterns.
        layers: All of these layers.
        moments: What was collected in the window, and which rank owns each layer.
        access: Reads and writes weights.
        enforcer: Holds the masks from now on.
        options: How a layer is solved.
        coupled: Down layer -> weights and biases whose rows go with the channels that it loses.
        later: Layers that a later window prunes, too. Such a layer stays as it is if no token has reached it; any other
            layer without tokens is pruned by magnitude. Both cases warn.
        reordered: Down layer -> weights and biases that feed it, for blocks whose channels are reordered before the
            solve. Their output weights are reordered as well.
        blocks: Trained after the solves, if the moments have what they got and gave.
        mixtures: Experts of these go as a whole where their down layers have the pattern `Experts`.
        now: Called when another part of the event begins.

    Returns:
        Reports of the pruned layers in the window's order, followed by reports of mixtures; and reports of the trained
        blocks. They are the same on all ranks.

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
    ordered = {} if sums is None else {name: parts for name, parts in (reordered or {}).items() if name in seen}
    own = needed_in_order(own, ordered, layers)
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
    earlier = {name: enforcer.keep_mask(name, owners[name]) for name in chosen}
    mine = {name: weight for name, weight in weights.items() if weight is not None}
    del weights
    largest = dict(sorted(sizes.items(), key=lambda item: item[1])[-1:])  # none if only experts are dropped
    kept, own_reports = _solve(window, mine, earlier, sums or {}, moments.output_weights, options, largest, access)
    solved = access.union(own_reports)
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
    with open_phase(f"Writing at step {window.event.step}", len(chosen), "layers") as phase:
        for name, layer in chosen.items():
            result = kept.pop(name, None)
            weight, keep = (None, None) if result is None else (result.weight, result.keep)
            enforcer.hold(name, write_merged(layer, weight, keep, owners[name], access), solved[name][1])
            for one in (coupled or {}).get(name, ()):
                _write_owned(one, keep, owners[name], access, enforcer)
            phase.advance()
    for downs, _ in going:
        drop_experts(downs, experts, coupled or {}, moments.owners, access, enforcer)
    reports = [replace(solved[name][0], tokens=tokens.get(name)) for name in chosen]
    return [*reports, *(report for _, report in going)], trained


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
                phase.advance(note=f"{pruned.relative_loss:.4f} {'.'.join(name.split('.')[-4:])}")
            if failures.error is not None:
                break
        reserve(largest, access, failures)
    return kept, reports


def needed_in_order(
    own: Mapping[str, int], ordered: Mapping[str, Sequence[View]], layers: Mapping[str, Layer]
) -> dict[str, int]:
    """Bytes that this rank allocates for its own layers, of which the channels of some get another order.

    Such weights are twice there when they are written. The statistics of one layer at a time are whole, in both orders.
    """
    needed = dict(own)
    here = ordered.keys() & own.keys()
    for name in here:
        needed[name] = max(own[name], 2 * max(_bytes_of(part) for part in (layers[name], *ordered[name])))
    if here:
        widest = max(here, key=lambda name: layers[name].cols)
        needed[widest] += 2 * 4 * layers[widest].cols ** 2
    return needed


def _write_owned(part: View, keep: Tensor | None, owner: int, access: ParameterAccess, enforcer: MaskEnforcer) -> None:
    """Prune what the channels own that a down layer has lost. `keep` is the down layer's, on its owner."""
    weight, earlier = collect_merged(part, owner, access), enforcer.keep_mask(part.name, owner)
    own = None
    if keep is not None and weight is not None:
        rows = keep.any(0).repeat(part.rows // keep.shape[1])  # row i, width + i, … is of channel i
        own = rows.unsqueeze(1).expand(part.rows, part.cols).to(weight.device)
        own = own if earlier is None else own & earlier.to(own.device)
        weight = weight.where(own, 0)
    num_pruned = access.gather(0 if own is None else own.numel() - int(own.count_nonzero()))[owner]
    enforcer.hold(part.name, write_merged(part, weight, own, owner, access), num_pruned)


def scan_window(
    window: Window,
    layers: Mapping[str, Layer],
    moments: Moments,
    *,
    access: ParameterAccess,
    options: SolverOptions,
    tried: Mapping[str, Sequence[Pattern]],
) -> dict[str, LayerSensitivity]:
    """Find what each layer of a window would lose, for an allocation: name -> sensitivity. No weight changes.

    All ranks must call it, and return the same.
    `tried` has the patterns whose losses the scan computes for each layer. The scan skips ADMM and refinement, which
    change little between layers. It passes by experts that may go as a whole.

    Raises:
        PruningError: On all ranks, if no layer saw a token, the solver fails or a rank lacks memory.
    """
    assert moments.accumulators is not None, "refused where a method has no statistics"
    tokens = tokens_seen(layers, moments.accumulators, access)
    solved = {name: layer for name, layer in layers.items() if not isinstance(window.patterns[name], Experts)}
    lent = lenders(solved, tokens)
    chosen = {name: layer for name, layer in solved.items() if tokens[name] or name in lent}
    owners = moments.owners
    counted = {name: layer for name, layer in chosen.items() if tokens[name]}
    sums = sum_on_owners(counted, moments.accumulators, tokens, owners, access, stay=moments.stay)
    lend(sums, lent, layers, tokens, owners, access)
    in_fp32 = {name: 4 * layer.rows * layer.cols for name, layer in chosen.items() if owners[name] == access.rank}
    reserve(in_fp32, access)
    weights = {name: collect(layer, owners[name], access) for name, layer in chosen.items()}
    scanned: dict[str, LayerSensitivity] = {}
    failures = Failures(access)
    mine, in_turn = [name for name in chosen if weights[name] is not None], FactorsInTurn()
    with open_phase("Finding out what each layer would lose", len(mine), "layers") as phase:
        for name, following in itertools.zip_longest(mine, mine[1:]):
            weight = weights.pop(name)
            assert weight is not None
            with failures.catching(layer=name):
                inputs = in_turn.take(sums.pop(name), None if following is None else sums[following])
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
