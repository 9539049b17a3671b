"""Zeros that hold: after every optimizer step the pruned weights and their moments are exactly 0.

A post-step hook of the torch optimizer masks the weight, or its fp32 master. Every precision, gradient accumulation and
manual optimization pass through this one place, and it is known there whether the optimizer has really stepped.

The moments are not masked in a step. An event clears them, and masked gradients keep them at 0. This needs an optimizer
that makes an entry's new moments of this entry's gradient, moments and weight alone, and makes zeros of zeros: as Adam,
AdamW, SGD, RMSprop, Adagrad and Muon do. Adamax and Rprop move moments whose gradients are 0, which `verify` finds.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakSet

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from thanos_lightning.layers.lora import shows_its_mask
from thanos_lightning.layers.targets import Layer
from thanos_lightning.plan.windows import reasons
from thanos_lightning.ranks.access import ParameterAccess, tensors_of
from thanos_lightning.ranks.masks import LayerMask, checked
from thanos_lightning.ranks.talk import PruningError, failing_together, reserve
from thanos_lightning.ranks.view import View
from thanos_lightning.solver import Pattern, Unstructured
from thanos_lightning.solver.zeros import count_unless_zero, missing_zeros, zero_where

# A pruned layer has a larger fraction of zeros. Fewer zeros have other causes, such as a padded vocabulary.
_PRUNED_BEFORE = 0.1


class ZeroViolationError(RuntimeError):
    """A pruned weight, or one of its moments, is no longer zero."""


class MaskEnforcer:
    """Holds this rank's piece of each mask. Applying masks takes one pass over local pieces, and talks to no rank.

    Attributes:
        access: Reads and writes the layers.
        num_pruned: Layer name -> how many entries its mask prunes, on all ranks together.
        has_new_masks: Whether a mask was set since the last verification. All ranks know it.
    """

    def __init__(self, layers: Mapping[str, View], access: ParameterAccess) -> None:
        self._layers = layers
        self.access = access
        # A masked layer is in one of two tables. A frozen weight that is 0 only where it is pruned shows its mask
        self._drops: dict[str, Tensor] = {}  # layer whose mask is stored -> this rank's piece of the mask
        self._shown: dict[str, int] = {}  # layer whose weight shows its mask -> zeros in this rank's piece
        # By id: tensor that an optimizer steps -> parameter -> layers with a piece here, to mask after the step.
        # id(None) has the layers of which only gradients are here
        self._stepped: dict[int, dict[int, dict[str, View]]] = {}
        self.num_pruned: dict[str, int] = {}
        self.has_new_masks = False

    def begin(self) -> None:
        """Begin a training in which the masks are applied. All ranks must call it.

        Raises:
            PruningError: On all ranks, before the training takes time, if one rank's shard of a weight holds NaN or
                Inf. The message names a layer.
        """
        extremes = {}
        for name, layer in self._layers.items():
            piece = next(self.access.local_tensors(layer), None)
            if piece is not None and piece.tensor.numel():
                # A NaN entry makes both extremes NaN. They stay on the device, so that the host waits only once, below
                extremes[name] = torch.stack(torch.aminmax(piece.tensor)).float()
        finite = torch.stack(list(extremes.values())).isfinite().all(dim=1).tolist() if extremes else []
        broken = [name for name, is_finite in zip(extremes, finite, strict=True) if not is_finite]
        with failing_together(self.access):
            if broken:
                more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
                raise PruningError(
                    f"the weight of layer {broken[0]}{more} holds NaN or Inf before the training: load a checkpoint "
                    "that is whole, or add such layers to ignore"
                )
        _at_work.add(self)

    def hold_zeros(self) -> dict[str, Unstructured]:
        """Hold the zeros of layers that were pruned before this training. All ranks must call it.

        A layer counts as pruned if more than a tenth of it is 0, but not if all of it is: its training starts from 0.
        Return name -> the sparsity that is held, for layers that were pruned. All ranks return the same.
        """
        access, layers = self.access, {name: one for name, one in self._layers.items() if isinstance(one, Layer)}
        counts = torch.tensor([self._count_zeros(layer) for layer in layers.values()], dtype=torch.int64)
        held: dict[str, Unstructured] = {}
        for (name, layer), (zeros, total) in zip(layers.items(), access.total(counts).tolist(), strict=True):
            if not _PRUNED_BEFORE * total < zeros < total:
                continue
            size = layer.rows * layer.cols
            reserve({name: 5 * size}, access)
            weight = access.collect_weight(layer, owner=0)
            keep = None if weight is None else weight != 0
            num_pruned = access.gather(0 if keep is None else size - int(keep.count_nonzero()))[0]
            drop = access.write(layer, None if weight is None or keep is None else weight.where(keep, 0), keep, owner=0)
            self.hold(name, drop, num_pruned)
            held[name] = Unstructured(num_pruned / size)
        return held

    def _count_zeros(self, layer: View) -> tuple[int, int]:
        """How many entries of this rank's shard are 0, and how many entries the shard has."""
        piece = next(self.access.local_tensors(layer), None)
        if piece is None or piece.what != "weight":  # the weight is offloaded to disk
            return 0, 0
        return piece.tensor.numel() - int(piece.tensor.count_nonzero()), piece.tensor.numel()

    def end(self) -> None:
        """End the training. A later training of the pruned weights without a `MaskEnforcer` causes one warning."""
        if self in _at_work:
            _at_work.discard(self)
            trained = (layer for name, layer in self._layers.items() if name in self.num_pruned)
            layer = next((layer for layer in trained if layer.parameter.requires_grad), None)
            if layer is not None:
                _warn_when_trained(layer.name, layer.parameter)

    @property
    def masked(self) -> list[str]:
        """Names of the layers that have a mask."""
        return list(self.num_pruned)

    def set_mask(self, name: str, keep: Tensor) -> None:
        """Hold a keep mask (out_features, in_features) that this rank has whole. Applied at the next `enforce`."""
        self.hold(name, self.access.local_drop(self._layers[name], keep), keep.numel() - int(keep.count_nonzero()))

    def hold(self, name: str, drop: Tensor, num_pruned: int) -> None:
        """Hold this rank's piece of a drop mask from now on.

        `drop` is as `ParameterAccess.local_drop` returns it. `num_pruned` counts the pruned entries of the whole layer.
        """
        layer = self._layers[name]
        # where a kept weight is 0, too, the weight alone does not tell
        if shows_its_mask(layer) and torch.equal(self._zeros_of(layer), drop):
            self._shown[name] = int(drop.count_nonzero())
            self._drops.pop(name, None)
        else:
            self._store(name, drop)
        self.num_pruned[name] = num_pruned
        self.has_new_masks = True
        if drop.numel():
            of_tensor = self._stepped.setdefault(id(self.access.stepped(layer)), {})
            of_tensor.setdefault(id(layer.parameter), {})[name] = layer

    def _store(self, name: str, drop: Tensor) -> None:
        self._drops[name] = drop
        self._shown.pop(name, None)

    def _drop(self, name: str) -> Tensor:
        return self._zeros_of(self._layers[name]) if name in self._shown else self._drops[name]

    def _zeros_of(self, layer: View) -> Tensor:
        return next(self.access.local_tensors(layer)).tensor == 0

    def keep_mask(self, name: str, owner: int | None = None) -> Tensor | None:
        """The layer's keep mask (out_features, in_features), or None where it has none. Talks to all ranks.

        With an owner, the other ranks get None.
        """
        if name not in self.num_pruned:
            return None
        return self.access.collect_keep(self._layers[name], self._drop(name), owner)

    def is_gone(self, name: str) -> bool:
        """Whether all of a layer is pruned. All ranks know it."""
        return self.num_pruned.get(name) == self._layers[name].rows * self._layers[name].cols

    def sparsity(self) -> float:
        """Fraction of the weights of all layers that is pruned."""
        return sum(self.num_pruned.values()) / sum(layer.rows * layer.cols for layer in self._layers.values())

    @torch.no_grad()
    def enforce(self, optimizer: Optimizer) -> None:
        """Zero what this optimizer has just written to pruned weights, or to their masters."""
        for name, layer in itertools.chain.from_iterable(part.items() for part in self._parts_of(optimizer)):
            _, tensor, place = self.access.stepped_weight(layer)
            zero_where(tensor, self._drop(name)[place])

    def _parts_of(self, optimizer: Optimizer) -> Iterator[dict[str, View]]:
        """The masked layers of each parameter of which the optimizer updates a piece on this rank, by name."""
        for tensor in tensors_of(optimizer):
            yield from self._stepped.get(id(tensor), {}).values()

    @torch.no_grad()
    def mask_gradients(self, optimizer: Optimizer | None = None) -> None:
        """Zero the gradients of pruned weights: moments stay 0, and a clipped norm is that of the sparse model.

        If the optimizer is in `access.optimizers`, only the weights that it updates are masked; otherwise all are.
        """
        if any(optimizer is other for other in self.access.optimizers):
            assert optimizer is not None
            parts = self._parts_of(optimizer)
        else:
            parts = itertools.chain.from_iterable(parts.values() for parts in self._stepped.values())
        for part in parts:
            for name, layer in part.items():
                if name in self._shown and layer.parameter.requires_grad:
                    self._store(name, self._drop(name))  # it is trained from now on
            if drops := [(layer, self._drops[name]) for name, layer in part.items() if name in self._drops]:
                self.access.mask_gradient(drops)

    def verify(self) -> None:
        """Check on all ranks that pruned entries are exactly 0. A negative zero is a violation, too.

        Raises:
            ZeroViolationError: On all ranks, naming the layers and the tensors.
        """
        self.has_new_masks = False
        if everywhere := self.violations():
            if any(text.endswith(("weight)", "master)")) for text in everywhere):
                why = (
                    "Something wrote to these weights after the optimizer step (weight averaging, a re-tied or "
                    "reloaded parameter): remove it, or ignore the layers"
                )
            else:
                kinds = " and ".join(dict.fromkeys(type(one).__name__ for one in self.access.optimizers))
                why = (
                    "Gradients of pruned weights are 0 before they are clipped. Something wrote to them later, the "
                    f"norm that they were clipped by was NaN, or {kinds} moves moments whose gradients are 0: remove "
                    "what writes, or take an optimizer such as AdamW"
                )
            raise ZeroViolationError(
                f"zeros came back: {'; '.join(everywhere[:5])}{' …' if len(everywhere) > 5 else ''}. {why}"
            )

    @torch.no_grad()
    def violations(self) -> list[str]:
        """Say which tensors have pruned entries that are not exactly 0. All ranks must call it, and get the same."""
        looked: list[tuple[str, Tensor | int]] = []
        counts: list[Tensor] = []
        for name in self.masked:
            layer = self._layers[name]
            for what, tensor, place in self.access.local_tensors(layer):
                where = f"pruned entries of {layer.parameter_name} ({what})"
                if name in self._shown:
                    looked.append((where, self._shown[name]))
                    counts.append(missing_zeros(tensor, self._shown[name]))
                else:
                    pruned = self._drops[name][place].to(tensor.device)  # at its end, a fit moves the model to the CPU
                    looked.append((where, pruned))
                    counts.append(count_unless_zero(tensor, pruned))
        found = [
            f"{count} of {pruned if isinstance(pruned, int) else int(pruned.count_nonzero())} {where}"
            for (where, pruned), count in zip(looked, _numbers(counts), strict=True)
            if count
        ]
        return [f"rank {rank}: {text}" for rank, texts in enumerate(self.access.gather(found)) for text in texts]

    # In a checkpoint

    def state(self, patterns: Mapping[str, Pattern]) -> dict[str, dict[str, Any]]:
        """The masks that this rank saves: parameter name -> `LayerMask.state`. All ranks must call it.

        Rank 0 saves them all. If each rank writes a file of its own (ZeRO-3), each mask is in one of the files.
        `patterns` has the pattern of each mask.
        """
        masks = {}
        for number, name in enumerate(self.masked):
            layer = self._layers[name]
            owner = number % self.access.world_size if self.access.saves_every_rank else 0
            bits = self.access.collect_bits(layer, self._drop(name), owner)
            if bits is not None:
                mask = LayerMask(bits, (layer.rows, layer.cols), patterns[name], layer.transposed)
                masks[layer.parameter_name] = mask.state()
        return masks

    def restore(
        self, states: Mapping[str, Mapping[str, Any]], pruned: Mapping[str, int], changed: Mapping[str, str]
    ) -> dict[str, Pattern]:
        """Hold what `state` has saved, and return the patterns of the masks. All ranks must call it.

        `states` has what this rank has loaded, and `pruned` the number of pruned entries of all masks. `changed` has
        the arguments of the callback that differ from the checkpoint's, each as a sentence.

        Raises:
            MisconfigurationException: If a mask fits no target, or what it prunes is not 0.
            ValueError: If a mask is not the one that was saved, or is missing.
        """
        by_parameter = {layer.parameter_name: name for name, layer in self._layers.items()}
        patterns: dict[str, Pattern] = {}
        shared = _share({name: LayerMask.from_state(state) for name, state in states.items()}, self.access)
        for parameter_name, mask, keep in checked(shared, pruned):
            name = by_parameter.get(parameter_name)
            if name is None:
                raise MisconfigurationException(
                    f"the checkpoint has a mask for {parameter_name}, which is no target now{reasons(changed)}: resume "
                    "with the model, targets and ignore that it was trained with"
                )
            layer = self._layers[name]
            if mask.shape != (layer.rows, layer.cols):
                raise MisconfigurationException(
                    f"the checkpoint's mask for {parameter_name} has shape {mask.shape}, the layer has "
                    f"{(layer.rows, layer.cols)}: resume with the model that it was trained with"
                )
            patterns[name] = mask.pattern
            self.set_mask(name, keep)
        if violations := self.violations():
            raise MisconfigurationException(
                f"the masks are not those of the weights ({violations[0]} are not 0): something has changed the "
                "checkpoint after it was saved, or the model since the last fit. Resume from another checkpoint"
            )
        return patterns


def _share(masks: Mapping[str, LayerMask], access: ParameterAccess) -> Iterator[tuple[str, LayerMask]]:
    """Share masks between ranks whose checkpoints may hold different ones. Talks to all ranks.

    Yield (name, mask) in one order on all ranks, one at a time: all masks on every rank may exceed a node's memory.
    """
    if not access.saves_every_rank:
        yield from masks.items()
        return
    outlines = access.gather({name: {**mask.state(), "bits": len(mask.bits)} for name, mask in masks.items()})
    holders = {name: rank for rank, names in reversed(list(enumerate(outlines))) for name in names}
    for name, holder in sorted(holders.items()):
        bits = torch.empty(outlines[holder][name]["bits"], dtype=torch.uint8)
        if access.rank == holder:
            bits.copy_(masks[name].bits)
        access.broadcast(bits, owner=holder)
        yield name, LayerMask.from_state({**outlines[holder][name], "bits": bits})


def _numbers(counts: Sequence[Tensor]) -> list[int]:
    """Read counts from several devices, waiting for each device once."""
    numbers = [0] * len(counts)
    for device in {count.device for count in counts}:
        there = [index for index, count in enumerate(counts) if count.device == device]
        for index, number in zip(there, torch.stack([counts[index] for index in there]).tolist(), strict=True):
            numbers[index] = number
    return numbers


_at_work: WeakSet[MaskEnforcer] = WeakSet()


def _warn_when_trained(name: str, weight: nn.Parameter) -> None:
    def look(_: Tensor) -> None:
        handle.remove()
        if not _at_work:
            rank_zero_warn(
                f"layer {name} and others were pruned, and are trained now without a ThanosPruningCallback: their "
                "zeros will be lost with the first optimizer step. To keep them, give the Trainer the callback that "
                "the model was pruned with (and ckpt_path), or a new one, which keeps the zeros that it finds"
            )

    handle = weight.register_post_accumulate_grad_hook(look)  # type: ignore[no-untyped-call]
