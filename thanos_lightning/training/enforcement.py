"""Zeros that hold: after every optimizer step the pruned weights and their moments are exactly 0 again.

The mask is applied in a post-step hook of the torch optimizer, the one place that every precision, gradient
accumulation and manual optimization pass through, and that knows when the optimizer has really stepped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from weakref import WeakSet

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from thanos_lightning.models.targets import PrunableLayer
from thanos_lightning.sharding.access import ParameterAccess
from thanos_lightning.sharding.masks import LayerMask
from thanos_lightning.solver.zeros import clear_bits, count_unless_zero, kept_bits


class ZeroViolationError(RuntimeError):
    """A weight that was pruned is not zero any more, or its moments aren't."""


class MaskEnforcer:
    """Holds this rank's piece of each mask and applies it. Talks to no other rank, in one pass over the local pieces.

    Args:
        layers: Name -> layer, of all that may be pruned.
        access: How the strategy's parameters are reached.
    """

    def __init__(self, layers: Mapping[str, PrunableLayer], access: ParameterAccess) -> None:
        self._layers = layers
        self._access = access
        self._drops: dict[str, Tensor] = {}
        self._num_pruned: dict[str, int] = {}

    def begin(self) -> None:
        """A training begins, in which the masks are applied."""
        _at_work.add(self)

    def end(self) -> None:
        """It has ended. Who trains what is pruned from now on, without another one of this class, is warned once."""
        if self in _at_work:
            _at_work.discard(self)
            trained = (layer for name, layer in self._layers.items() if name in self._drops)
            layer = next((layer for layer in trained if layer.parameter.requires_grad), None)
            if layer is not None:
                _warn_when_trained(layer.name, layer.parameter)

    @property
    def masked(self) -> list[str]:
        """Names of the layers that have a mask."""
        return list(self._drops)

    def set_mask(self, name: str, keep: Tensor) -> None:
        """Hold a keep mask (out_features, in_features) that this rank has whole. Applied at the next `enforce`."""
        self.hold(name, self._access.local_drop(self._layers[name], keep), keep.numel() - int(keep.count_nonzero()))

    def hold(self, name: str, drop: Tensor, num_pruned: int) -> None:
        """Hold this rank's piece of a drop mask from now on.

        Args:
            name: Of the layer.
            drop: As `ParameterAccess.local_drop` gives it.
            num_pruned: Pruned entries of the whole layer.
        """
        self._drops[name] = drop
        self._num_pruned[name] = num_pruned

    def keep_mask(self, name: str) -> Tensor | None:
        """The layer's keep mask (out_features, in_features), or None where it has none. Talks to all ranks."""
        drop = self._drops.get(name)
        return None if drop is None else self._access.full_keep(self._layers[name], drop)

    def collect_keep(self, name: str, owner: int) -> Tensor | None:
        """As `keep_mask`, but on one rank only. Talks to all ranks."""
        drop = self._drops.get(name)
        return None if drop is None else self._access.collect_keep(self._layers[name], drop, owner)

    def _masked_layers(self) -> dict[str, PrunableLayer]:
        return {name: self._layers[name] for name in self._drops}

    def sparsity(self) -> float:
        """Fraction of the weights of all layers that is pruned."""
        return sum(self._num_pruned.values()) / sum(layer.rows * layer.cols for layer in self._layers.values())

    @torch.no_grad()
    def enforce(self, optimizer: Optimizer) -> None:
        """Zero what this optimizer has just written to pruned weights and their moments."""
        for name in self._access.stepped_by(optimizer, self._masked_layers()):
            kept = kept_bits(self._drops[name])
            for _, tensor, place in self._access.stepped_tensors(self._layers[name], optimizer):
                clear_bits(tensor, kept[place])

    @torch.no_grad()
    def mask_gradients(self, optimizer: Optimizer | None = None) -> None:
        """Zero the gradients of pruned weights, so that a clipped norm is that of the sparse model.

        Args:
            optimizer: Only the weights that it updates, if it is one of several; all by default.
        """
        layers = self._masked_layers()
        names: Iterable[str] = layers
        if any(optimizer is other for other in self._access.optimizers):
            assert optimizer is not None
            names = self._access.stepped_by(optimizer, layers)
        for name in names:
            self._access.mask_gradient(layers[name], self._drops[name])

    @torch.no_grad()
    def verify(self) -> None:
        """Count what is not exactly 0 (a negative zero counts) under the masks, on all ranks.

        Raises:
            ZeroViolationError: On all ranks, naming the layers and the tensors.
        """
        looked: list[tuple[str, Tensor]] = []
        counts: list[Tensor] = []
        for name, drop in self._drops.items():
            layer = self._layers[name]
            for what, tensor, place in self._access.local_tensors(layer):
                pruned = drop[place].to(tensor.device)  # at its end, a fit moves the model to the CPU
                looked.append((f"pruned entries of {layer.parameter_name} ({what})", pruned))
                counts.append(count_unless_zero(tensor, pruned))
        found = [
            f"{count} of {int(pruned.count_nonzero())} {where}"
            for (where, pruned), count in zip(looked, _numbers(counts), strict=True)
            if count
        ]
        everywhere = [f"rank {rank}: {text}" for rank, texts in enumerate(self._access.gather(found)) for text in texts]
        if everywhere:
            raise ZeroViolationError(
                f"zeros came back: {'; '.join(everywhere[:5])}{' …' if len(everywhere) > 5 else ''}. Something wrote "
                "to these weights after the optimizer step (weight averaging, a re-tied or reloaded parameter): remove "
                "it, or ignore the layers"
            )


def share_masks(masks: Mapping[str, LayerMask], access: ParameterAccess) -> Iterator[tuple[str, LayerMask]]:
    """Masks by name, of which the checkpoint of each rank may have other ones. Talks to all ranks.

    Args:
        masks: Those that this rank has.
        access: Tells the ranks, and whether each has a checkpoint of its own.

    Yields:
        All of them, on all ranks in one order, one at a time: together they may be too much for each rank of a node.
    """
    if not access.saves_every_rank:
        yield from masks.items()
        return
    outlines = access.gather({name: {**mask.state(), "bits": len(mask.bits)} for name, mask in masks.items()})
    holders = {name: rank for rank, told in reversed(list(enumerate(outlines))) for name in told}
    for name, holder in sorted(holders.items()):
        bits = torch.empty(outlines[holder][name]["bits"], dtype=torch.uint8)
        if access.rank == holder:
            bits.copy_(masks[name].bits)
        access.broadcast(bits, owner=holder)
        yield name, LayerMask.from_state({**outlines[holder][name], "bits": bits})


def _numbers(counts: Sequence[Tensor]) -> list[int]:
    """Those of several devices, each of which is waited for once."""
    numbers = [0] * len(counts)
    for device in {one.device for one in counts}:
        there = [index for index, one in enumerate(counts) if one.device == device]
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
