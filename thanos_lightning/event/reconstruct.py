"""Trains the kept weights of one block at a time to give what the block gave before it was pruned.

A layer's solve sees this layer alone. Within a block, such as a decoder layer, layers can make up for each other's
errors. The inputs and outputs are those of the model before the event, so that blocks don't depend on each other, and
each rank trains its share of them. (That a block's outputs teach more than a layer's: arXiv 2510.14444.)
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from thanos_lightning.collect.hidden_states import (
    Call,
    HiddenStates,
    Reference,
    SharedStates,
    collect_calls,
    first_of,
    parts_of,
)
from thanos_lightning.collect.outputs import LOSS_SCALE
from thanos_lightning.layers.blocks import replica
from thanos_lightning.layers.lora import adapters_of
from thanos_lightning.layers.targets import Layer, examples
from thanos_lightning.ranks.access import ParameterAccess
from thanos_lightning.ranks.talk import Failures, reserve
from thanos_lightning.report.data import BlockReport
from thanos_lightning.report.progress import open_phase
from thanos_lightning.report.tables import alike

_RATE = 0.015  # of Adam, for weights whose root mean square is 1
_BETAS = (0.9, 0.95)
_WARM_UP = 8  # steps
_FUSED = ("cpu", "cuda", "mps", "xpu")  # devices on which torch steps Adam in one kernel
MOST_PASSES = 2  # over the recorded sequences
_MEASURED = 4  # the batches of this many steps show a block's error before and after
# Largest squared error of a copy's outputs over their squared norm, before it is pruned: they are kept in 16 bits
_TOLERANCE = 1e-3
_MODELS_ERRORS = (AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@dataclass
class Solved:
    """A layer's new weight and its keep mask, both (out_features, in_features)."""

    weight: Tensor
    keep: Tensor


def reconstruct(
    states: HiddenStates,
    targets: Mapping[str, Sequence[Layer]],
    solved: dict[str, Solved],
    owners: Mapping[str, int],
    access: ParameterAccess,
    title: str,
) -> tuple[dict[str, int], list[BlockReport]]:
    """Train the blocks whose calls were recorded. All ranks must call it.

    `targets` has the layers of each block that were solved. The calls are forgotten one by one, and what the owner of a
    layer has `solved` moves to the rank that trains its block. Return the new owners, and a report of each block that
    was trained; the same on all ranks.

    Raises:
        PruningError: On all ranks, if one fails, such as from lack of memory. No layer is pruned.
    """
    shared = SharedStates.of(states, access)
    dtypes = access.union({name: one.weight.dtype for name, one in solved.items()})
    moved = dict(owners)
    names = [name for name in targets if shared.outlines.get(name)]
    if names:
        _warn_of_few([outline.inputs.shape for _, outline in shared.outlines[names[0]].values()], states.steps)
    reports: dict[str, BlockReport | str] = {name: "was not called" for name in targets if name not in names}
    reports |= shared.refused
    failures = Failures(access)
    with open_phase(title, len(names), "blocks") as phase:
        for begin in range(0, len(names), access.world_size):
            in_round = names[begin : begin + access.world_size]
            reserve(needed_in_round({name: states.blocks[name] for name in in_round}, access.rank), access, failures)
            mine: _Task | None = None
            for owner, name in enumerate(in_round):
                for layer in targets[name]:
                    _move(layer, solved, moved, owner, dtypes[layer.name], access)
                values = access.collect_parameters(states.blocks[name], owner)
                calls = collect_calls(name, states, shared, owner, access)
                if values is not None and calls is not None:
                    mine = _Task(name, states.blocks[name], values, calls, shared.others, targets[name])
            note = ""
            if mine is not None:
                with failures.catching(layer=mine.name):
                    found = reports[mine.name] = _train(mine, solved, states.steps, seed=begin + access.rank)
                    if isinstance(found, BlockReport):
                        note = f"loss {' to '.join(alike([found.error_solved, found.error], digits=2))}"
            phase.advance(len(in_round), note=note)
        failures.raise_together()
    everywhere = access.union(reports)
    left = {name: why for name, why in everywhere.items() if isinstance(why, str)}
    if left:
        rank_zero_warn(
            f"{len(left)} block(s) stay as the solver left them, since a copy of them can't be trained: "
            f"{examples(f'{name} {why}' for name, why in left.items())}. (calibration.block_steps=0 trains none)"
        )
    return moved, [report for name in names if isinstance(report := everywhere[name], BlockReport)]


def _warn_of_few(shapes: Sequence[tuple[int, ...]], steps: int) -> None:
    able = MOST_PASSES * sum(len(parts_of(shape)) for shape in shapes)
    if able < steps:
        there = sum(math.prod(shape[:-1]) for shape in shapes)
        rank_zero_warn(
            f"calibration.batches has {there:,} tokens, on which a block is trained for {able} steps, not for {steps}: "
            f"give {math.ceil(there * steps / able):,} tokens, or calibration.block_steps={able}"
        )


def needed_in_round(blocks: Mapping[str, nn.Module], rank: int) -> dict[str, int]:
    """Bytes that this rank allocates in a round in which rank r trains the r-th of the blocks.

    Each rank keeps its own block. Where parameters are sharded, all ranks have the blocks whole, one after the other.
    """
    sizes = {name: _bytes_of(block) for name, block in blocks.items()}
    largest = max(sizes, key=lambda name: sizes[name])
    needed = dict(list(sizes.items())[rank : rank + 1])
    needed[largest] = needed.get(largest, 0) + sizes[largest]
    return needed


def _bytes_of(block: nn.Module) -> int:
    """In fp32."""
    return 4 * sum(math.prod(getattr(one, "ds_shape", one.shape)) for one in block.parameters())


def _move(
    layer: Layer,
    solved: dict[str, Solved],
    owners: dict[str, int],
    destination: int,
    dtype: torch.dtype,
    access: ParameterAccess,
) -> None:
    source, shape = owners[layer.name], (layer.rows, layer.cols)
    owners[layer.name] = destination
    if source == destination:
        return
    own = solved.pop(layer.name, None)
    weight, keep = (None, None) if own is None else (own.weight, own.keep)
    weight = access.send(weight, source=source, destination=destination, shape=shape, dtype=dtype)
    keep = access.send(keep, source=source, destination=destination, shape=shape, dtype=torch.bool)
    if access.rank == destination:
        assert weight is not None
        assert keep is not None
        solved[layer.name] = Solved(weight.cpu(), keep.cpu())


@dataclass(frozen=True)
class _Task:
    """A block to train, with all that it takes."""

    name: str
    block: nn.Module
    values: dict[str, Tensor]
    calls: list[Call]
    others: Mapping[str, Tensor]
    targets: Sequence[Layer]


def _train(task: _Task, solved: Mapping[str, Solved], steps: int, seed: int) -> BlockReport | str:
    """Train a block's kept weights, and put them into `solved` if they are better; or return why it can't be done."""
    begin = time.perf_counter()
    copy = replica(task.block, task.values)
    device = next(copy.parameters()).device
    error = partial(_error, copy, task.others, device)
    parts = [(call, part) for call in task.calls for part in _parts(call, task.others)]
    if not parts:
        return "got no token that counts"
    try:
        unlike = _mean_error(error, parts[:1])
    except _MODELS_ERRORS as failure:
        return _why_not(failure)
    if not unlike <= _TOLERANCE:
        return f"gives something else when it is called on its own (squared error {unlike:.2g} of its outputs)"
    trained: dict[nn.Parameter, Tensor] = {}  # a parameter -> its entries that are trained
    parameters: dict[str, nn.Parameter] = {}
    for layer in task.targets:
        own = solved[layer.name]
        parameter = copy.get_parameter(layer.parameter_name.removeprefix(f"{task.name}.").partition("[")[0])
        if parameter not in trained:  # experts share one
            parameter.data = parameter.data.to(device, torch.float32, copy=True)
            parameter.requires_grad_(True)
            trained[parameter] = torch.zeros_like(parameter, dtype=torch.bool)
        parameters[layer.name] = parameter
        layer.part_of(parameter.data).copy_(layer.oriented(own.weight))
        layer.part_of(trained[parameter]).copy_(layer.oriented(own.keep))
        for adapter in adapters_of(layer):  # which the solved weight has in it
            copy.get_parameter(adapter.up.parameter_name.removeprefix(f"{task.name}.")).data.zero_()
    groups = []
    for parameter, keep in trained.items():
        scale = float((parameter.detach() * keep).square().sum() / keep.count_nonzero().clamp(min=1)) ** 0.5
        groups.append({"params": [parameter], "lr": _RATE * scale})
    measured = parts[:: max(1, len(parts) // _MEASURED)]
    try:
        before = _mean_error(error, measured)
        _descend(error, groups, trained, _steps(parts, steps, seed), device)
        after = _mean_error(error, measured)
    except _MODELS_ERRORS as failure:
        return _why_not(failure)
    if after < before:
        for layer in task.targets:
            own, parameter = solved[layer.name], parameters[layer.name]
            weight = layer.part_of(parameter.detach()) * layer.part_of(trained[parameter])
            own.weight = layer.oriented(weight.to(own.weight.dtype)).to(own.weight.device)
    return BlockReport(task.name, before, min(before, after), time.perf_counter() - begin)


def _why_not(failure: Exception) -> str:
    if isinstance(failure, torch.OutOfMemoryError):
        raise failure
    return f"fails when it is called on its own ({type(failure).__name__}: {failure})"


def _parts(call: Call, others: Mapping[str, Tensor]) -> Iterator[slice]:
    """The sequences of each step; without those of padding alone."""
    counted = None if call.counted is None else others[call.counted.digest]
    for part in parts_of(tuple(call.inputs.shape)):
        if counted is None or counted[part].any():
            yield part


def _steps(parts: Sequence[tuple[Call, slice]], steps: int, seed: int) -> list[tuple[Call, slice]]:
    """What each step trains on: every part once, in a random order, before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    some = parts[:steps]
    orders = (torch.randperm(len(some), generator=generator, device="cpu").tolist() for _ in range(MOST_PASSES))
    return [some[index] for index in itertools.islice(itertools.chain.from_iterable(orders), steps)]


def _descend(
    error: Callable[[Call, slice], Tensor],
    groups: list[dict[str, Any]],
    trained: Mapping[nn.Parameter, Tensor],
    parts: Sequence[tuple[Call, slice]],
    device: torch.device,
) -> None:
    optimizer = torch.optim.Adam(groups, betas=_BETAS, fused=device.type in _FUSED)
    rates = [group["lr"] for group in groups]
    with torch.enable_grad():
        for step, (call, part) in enumerate(parts):
            factor = min(1.0, (step + 1) / _WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / len(parts)))
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                # no scheduler: it and the optimizer hold each other, and would stay in memory
                group["lr"] = rate * factor
            # Adam's steps don't depend on the scale
            torch.autograd.backward(LOSS_SCALE * error(call, part))
            for parameter, keep in trained.items():
                if parameter.grad is not None:  # an expert that got no token in this step
                    parameter.grad.mul_(keep)
            optimizer.step()
            optimizer.zero_grad()


@torch.no_grad()
def _mean_error(error: Callable[[Call, slice], Tensor], parts: Sequence[tuple[Call, slice]]) -> float:
    return sum(float(error(call, part)) for call, part in parts) / len(parts)


def _error(copy: nn.Module, others: Mapping[str, Tensor], device: torch.device, call: Call, part: slice) -> Tensor:
    """The mean squared error of the outputs for some sequences of a call, over each token's own squared norm."""

    def of_part(reference: Reference) -> Tensor:
        value = others[reference.digest]
        is_of_batch = value.ndim > 1 and len(value) == len(call.inputs) > 1
        return (value[part] if is_of_batch else value).to(device)

    hidden = call.inputs[part].to(device, call.dtype, copy=True)  # which the block may change in place
    args, kwargs, counted = apply_to_collection((call.args, call.kwargs, call.counted), Reference, of_part)
    if call.keyword is None:
        args = (hidden, *args)
    else:
        kwargs = {call.keyword: hidden, **kwargs}
    with torch.autocast(device.type, call.computes_in, enabled=call.computes_in is not None):
        output = first_of(copy(*args, **kwargs)).float()
    wanted = call.outputs[part].to(device).float()
    if counted is not None:
        output, wanted = output[counted], wanted[counted]
    norms = wanted.square().sum(-1)
    error: Tensor = ((output - wanted).square().sum(-1) / norms.clamp(min=1e-3 * float(norms.mean()))).mean()
    return error
