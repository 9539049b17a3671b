"""Access under one device and DDP, where every rank holds every parameter whole."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from thanos_lightning.models.targets import PrunableLayer
from thanos_lightning.sharding.access import ParameterAccess
from thanos_lightning.sharding.masks import pack_bits, unpack_bits


class ReplicatedAccess(ParameterAccess):
    """`ParameterAccess` where the local piece is the whole parameter. The arguments are as for `Ranks`."""

    def completes_step(self, optimizer: Optimizer) -> bool:
        # A fused optimizer receives the scaler's found_inf and skips the step inside.
        found_inf = getattr(optimizer, "found_inf", None)
        return found_inf is None or not bool(found_inf)

    def collect_weight(self, layer: PrunableLayer, owner: int) -> Tensor | None:
        return layer.oriented(layer.own(layer.parameter.detach())) if self.rank == owner else None

    @torch.no_grad()
    def write(self, layer: PrunableLayer, weight: Tensor | None, keep: Tensor | None, owner: int) -> Tensor:
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
        self._zero_moments(layer, drop)
        return drop

    def local_drop(self, layer: PrunableLayer, keep: Tensor) -> Tensor:
        return layer.oriented(keep).logical_not().contiguous().to(layer.parameter.device)

    def collect_keep(self, layer: PrunableLayer, drop: Tensor, owner: int) -> Tensor | None:
        return self.full_keep(layer, drop) if self.rank == owner else None

    def full_keep(self, layer: PrunableLayer, drop: Tensor) -> Tensor:
        return layer.oriented(drop).logical_not()

    def _stepped(self, layer: PrunableLayer) -> Tensor:
        return layer.parameter

    def _piece(self, layer: PrunableLayer, tensor: Tensor) -> Tensor:
        return layer.own(tensor.data)
