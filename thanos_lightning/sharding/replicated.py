"""Access under one device and DDP, where every rank holds every parameter whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from thanos_lightning.models.targets import PrunableLayer
from thanos_lightning.sharding.access import LocalPiece
from thanos_lightning.sharding.masks import pack_bits, unpack_bits
from thanos_lightning.sharding.ranks import Ranks
from thanos_lightning.solver.zeros import zero_where


class ReplicatedAccess(Ranks):
    """`ParameterAccess` where the local piece is the whole parameter. The arguments are as for `Ranks`."""

    def completes_step(self, optimizer: Optimizer) -> bool:
        """See `ParameterAccess`."""
        # A fused optimizer receives the scaler's found_inf and skips the step inside.
        found_inf = getattr(optimizer, "found_inf", None)
        return found_inf is None or not bool(found_inf)

    def collect_weight(self, layer: PrunableLayer, owner: int) -> Tensor | None:
        """See `ParameterAccess`."""
        return layer.oriented(layer.own(layer.parameter.detach())) if self.rank == owner else None

    @torch.no_grad()
    def write(self, layer: PrunableLayer, weight: Tensor | None, keep: Tensor | None, owner: int) -> Tensor:
        """See `ParameterAccess`."""
        own = layer.own(layer.parameter.data)
        if self.rank == owner:
            assert weight is not None
            assert keep is not None
            own.copy_(layer.oriented(weight))
        if self.world_size > 1:
            self.broadcast(own, owner)
            shape = (layer.rows, layer.cols)
            numel = layer.rows * layer.cols
            bits = torch.empty(-(-numel // 8), dtype=torch.uint8) if keep is None else pack_bits(keep)
            bits = bits.to(own.device)
            self.broadcast(bits, owner)
            keep = unpack_bits(bits, shape)
        assert keep is not None
        drop = self.local_drop(layer, keep)
        for _, moment, _ in self._moments(layer):
            zero_where(moment, drop)
        return drop

    def local_drop(self, layer: PrunableLayer, keep: Tensor) -> Tensor:
        """See `ParameterAccess`."""
        return layer.oriented(keep).logical_not().contiguous().to(layer.parameter.device)

    def collect_keep(self, layer: PrunableLayer, drop: Tensor, owner: int) -> Tensor | None:
        """See `ParameterAccess`."""
        return self.full_keep(layer, drop) if self.rank == owner else None

    def full_keep(self, layer: PrunableLayer, drop: Tensor) -> Tensor:
        """See `ParameterAccess`."""
        return layer.oriented(drop).logical_not()

    def stepped_by(self, optimizer: Optimizer, layers: Mapping[str, PrunableLayer]) -> set[str]:
        """See `ParameterAccess`."""
        parameters = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        return {name for name, layer in layers.items() if id(layer.parameter) in parameters}

    def stepped_weight(self, layer: PrunableLayer) -> LocalPiece:
        """See `ParameterAccess`."""
        return LocalPiece("weight", layer.own(layer.parameter.data))

    def local_tensors(self, layer: PrunableLayer) -> Iterator[LocalPiece]:
        """See `ParameterAccess`."""
        yield self.stepped_weight(layer)
        yield from self._moments(layer)

    def _moments(self, layer: PrunableLayer) -> Iterator[LocalPiece]:
        parameter = layer.parameter
        for optimizer in self.optimizers:
            # .get, because state is a defaultdict: asking for an unknown parameter would create an entry
            for name, value in optimizer.state.get(parameter, {}).items():
                # In quantised states (8 bit) a code of 0 need not mean the value 0.
                if isinstance(value, Tensor) and value.is_floating_point() and value.shape == parameter.shape:
                    yield LocalPiece(name, layer.own(value))

    def mask_gradient(self, drops: Sequence[tuple[PrunableLayer, Tensor]]) -> None:
        """See `ParameterAccess`."""
        for layer, drop in drops:
            if layer.parameter.grad is not None:
                zero_where(layer.own(layer.parameter.grad), drop)
