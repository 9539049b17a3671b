"""The contract between pruning and the strategies that place parameters, implemented for where nothing is sharded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from thanos_lightning.ranks.masks import pack_bits, unpack_bits
from thanos_lightning.ranks.talk import Ranks
from thanos_lightning.ranks.view import View
from thanos_lightning.solver.zeros import zero_where


class LocalPiece(NamedTuple):
    """A tensor of this rank that belongs to a layer's weight."""

    what: str  # "weight" (the model's copy), "master", or the name of a moment
    tensor: Tensor  # the values, writable unless said otherwise
    place: slice = slice(None)  # the part of the rank's drop mask that covers the values


def tensors_of(optimizer: Optimizer) -> Iterator[Tensor]:
    """What an optimizer steps: parameters, or masters of theirs. Some optimizers have other ones at each call."""
    return (tensor for group in optimizer.param_groups for tensor in group["params"])


class ParameterAccess(Ranks):
    """How a strategy's parameters are read, written and masked. How its ranks agree, `Ranks` says.

    This class is for one device and DDP, where every rank holds every parameter whole. Its subclasses are for sharded
    parameters.

    "Local" means the piece of a tensor that this rank holds, in whatever layout the strategy keeps it. The drop mask of
    a layer is bool, True = pruned, in that layout. The owner of a layer is the rank that solves it.

    Attributes:
        optimizers: The torch optimizers that step the parameters, or their masters.
        saves_every_rank: Whether a checkpoint keeps the callback state of every rank, and returns each rank its own.
            Otherwise it keeps rank 0's state for all ranks.
        can_differentiate: Whether an extra backward outside a training step leaves the training unchanged.
    """

    saves_every_rank: bool = False
    can_differentiate: bool = True
    _kind = "weight"  # of what optimizers step; or "master"

    def __init__(
        self,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | None = None,
        optimizers: Sequence[Optimizer] = (),
    ) -> None:
        super().__init__(rank, world_size, device)
        self.optimizers = list(optimizers)

    # Reading and writing layers: all ranks call these, in one order

    def collect_weight(self, layer: View, owner: int) -> Tensor | None:
        """Return the full weight (out_features, in_features) on its owner, from the most exact copy. Read-only."""
        return layer.oriented(layer.part_of(layer.parameter.detach())) if self.rank == owner else None

    def collect_keep(self, layer: View, drop: Tensor, owner: int | None) -> Tensor | None:
        """Assemble the keep mask (out_features, in_features) from every rank's `drop`.

        The owner returns it, and the other ranks None. All ranks return it if the owner is None.
        """
        return layer.oriented(drop).logical_not() if owner in (None, self.rank) else None

    def collect_bits(self, layer: View, drop: Tensor, owner: int) -> Tensor | None:
        """Assemble the keep mask as `pack_bits` returns it, on the owner; None elsewhere. Bits travel packed."""
        return pack_bits(layer.oriented(drop).logical_not()) if self.rank == owner else None

    @torch.no_grad()
    def collect_parameters(self, module: nn.Module, owner: int) -> dict[str, Tensor] | None:
        """Return copies of all parameters of a module, whole, by name, on the owner. They are the model's copies."""
        if self.rank != owner:
            return None
        return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}

    @torch.no_grad()
    def write(self, layer: View, weight: Tensor | None, keep: Tensor | None, owner: int) -> Tensor:
        """Replace every copy of a weight, and zero the optimizer moments of its pruned entries.

        `weight` and `keep` are (out_features, in_features) on the owner, None elsewhere. Return this rank's drop mask.
        """
        self._write_model(layer, weight, owner)
        if self.world_size > 1:
            numel = layer.rows * layer.cols
            bits = torch.empty(-(-numel // 8), dtype=torch.uint8) if keep is None else pack_bits(keep)
            bits = bits.to(layer.parameter.device)
            self.broadcast(bits, owner)
            keep = unpack_bits(bits, (layer.rows, layer.cols))
        assert keep is not None, "one rank is the owner"
        drop = self.local_drop(layer, keep)
        self._zero_moments(layer, drop)
        return drop

    def _write_model(self, layer: View, weight: Tensor | None, owner: int) -> None:
        """Overwrite the model's copy on all ranks with the owner's (out_features, in_features). Talks to all."""
        model_copy = layer.part_of(layer.parameter.data)
        if weight is not None:
            model_copy.copy_(layer.oriented(weight))
        self.broadcast(model_copy, owner)

    def release(self) -> None:
        """Free the whole copies of sharded weights that a forward or backward outside a training step leaves behind."""

    # What this rank does alone

    def local_drop(self, layer: View, keep: Tensor) -> Tensor:
        """Return this rank's drop mask for a keep mask (out_features, in_features). Talks to no rank."""
        return layer.oriented(keep.to(layer.parameter.device)).logical_not().contiguous()

    def completes_step(self, optimizer: Optimizer) -> bool:
        """Whether this call of a post-step hook completes a training step. Talks to no rank.

        It does not if a scaler has skipped the step, or if the optimizer is called again for the same step.
        """
        # A fused optimizer receives the scaler's found_inf and skips the step inside.
        found_inf = getattr(optimizer, "found_inf", None)
        return found_inf is None or not bool(found_inf)

    def stepped(self, layer: View) -> Tensor | None:
        """The tensor that an optimizer steps, the key of its state; None if none of this rank steps the layer."""
        return layer.parameter

    def stepped_weight(self, layer: View) -> LocalPiece:
        """The stepped tensor of a layer that an optimizer updates: the weight or its master. Talks to no rank."""
        stepped = self.stepped(layer)
        assert stepped is not None, "an optimizer updates the layer"
        return LocalPiece(self._kind, self._piece(layer, stepped), self._place(layer))

    def local_tensors(self, layer: View) -> Iterator[LocalPiece]:
        """All tensors of a layer on this rank, for counting only; they may be copies. Talks to no rank."""
        yield self.stepped_weight(layer)
        yield from self._moments(layer)

    def numbered_parameters(self) -> list[list[Tensor | None]]:
        """For each optimizer, the module's parameters in the order of its state; None for any other tensor."""
        return [list(tensors_of(optimizer)) for optimizer in self.optimizers]

    def mask_gradient(self, drops: Sequence[tuple[View, Tensor]]) -> None:
        """Zero the pruned parts of the gradient that the next step will use, where there is one. Talks to no rank.

        `drops` are layers of one parameter, each with this rank's piece of its drop mask.
        """
        for layer, drop in drops:
            stepped = self.stepped(layer)
            if stepped is not None and stepped.grad is not None:
                zero_where(self._piece(layer, stepped.grad), drop)

    # Where optimizers have a layer on this rank

    def _piece(self, layer: View, tensor: Tensor) -> Tensor:
        """A view of the layer's entries in a tensor that is laid out like the stepped one."""
        return layer.part_of(tensor.data)

    def _place(self, layer: View) -> slice:
        """The part of the rank's drop mask that covers these entries."""
        return slice(None)

    def _moments(self, layer: View) -> Iterator[LocalPiece]:
        stepped = self.stepped(layer)
        if stepped is None:
            return
        for optimizer in self.optimizers:
            # .get, because state is a defaultdict: asking for an unknown tensor would create an entry
            for name, value in optimizer.state.get(stepped, {}).items():
                # In quantised states (8 bit) a code of 0 need not mean the value 0.
                if isinstance(value, Tensor) and value.is_floating_point() and value.shape == stepped.shape:
                    yield LocalPiece(name, self._piece(layer, value), self._place(layer))

    def _zero_moments(self, layer: View, drop: Tensor) -> None:
        """Zero this rank's optimizer moments of pruned entries."""
        for _, moment, place in self._moments(layer):
            zero_where(moment, drop[place])
