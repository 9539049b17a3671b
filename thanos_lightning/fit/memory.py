"""Windows that fit the memory that is free, where the user sets no limit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import psutil
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer

from thanos_lightning.fit.announce import sized
from thanos_lightning.layers.targets import Layer
from thanos_lightning.plan.options import PruningOptions
from thanos_lightning.ranks.access import tensors_of

_SPARE = 0.1  # of the free memory, for what an estimate leaves out


def free_bytes(device: torch.device, on_node: int, optimizers: Sequence[Optimizer]) -> dict[str, int]:
    """Bytes that are free for an event of a rank on "cpu", and on the type of its device if that is known.

    `on_node` ranks share the memory of a CPU. What the first steps of the optimizers will take is not free: gradients,
    and two moments of an optimizer that has no state yet.
    """
    free = {"cpu": psutil.virtual_memory().available // on_node}
    if device.type != "cpu" and hasattr(module := torch.get_device_module(device), "mem_get_info"):
        cached = module.memory_reserved(device) - module.memory_allocated(device)  # by torch, for its next tensors
        free[device.type] = module.mem_get_info(device)[0] + cached
    for optimizer in optimizers:
        for tensor in tensors_of(optimizer):
            if tensor.device.type in free:
                free[tensor.device.type] -= tensor.nbytes * (1 if optimizer.state else 3)
    return {kind: max(size, 0) for kind, size in free.items()}


def fitting(
    options: PruningOptions,
    layers: Sequence[Layer],
    free: Mapping[str, int],
    event_bytes: Callable[[PruningOptions], Mapping[str, int]],
) -> None:
    """Find the largest windows whose events fit, if the options set no limit: those of the last call of `event_bytes`.

    `free` are the bytes for an event of a rank on each type of device. `event_bytes` plans a training with the options
    that it gets, and returns the bytes that an event takes on each.

    Raises:
        MisconfigurationException: If no windows fit, or not those that the options ask for.
    """
    splits = options.calibration.memory_gib is None and options.solver.needs_statistics
    part = 1 - _SPARE if splits else 1
    needed = event_bytes(options)
    smaller = smaller_windows(options, layers) if splits else iter(())
    while lacking := [kind for kind, size in free.items() if needed[kind] > part * size]:
        try:
            needed = event_bytes(next(smaller))
        except (StopIteration, MisconfigurationException, ValueError):  # the steps may be too few for the windows
            break
    else:
        return
    kind = lacking[0]
    raise MisconfigurationException(
        f"an event takes about {sized(needed[kind])} on {kind} in {'the smallest' if splits else 'its'} windows, and "
        f"{sized(free[kind])} are free there: take more ranks under DeepSpeed or FSDP2, offload_optimizer, a device "
        "with more memory, or ignore the largest layers"
    )


def smaller_windows(options: PruningOptions, layers: Sequence[Layer]) -> Iterator[PruningOptions]:
    """The options with half of the second moments at a time, a quarter, …, and at last those of the widest layer."""
    sizes = [4 * layer.cols**2 / 2**30 for layer in layers]
    gib, least = sum(sizes), 1.1 * max(sizes)
    while gib > least:
        gib = max(gib / 2, least)
        yield replace(options, calibration=replace(options.calibration, memory_gib=float(f"{gib:.2g}")))
