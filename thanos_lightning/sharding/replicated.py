"""Every rank holds every parameter whole: one device, and DDP."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from thanos_lightning.masks import pack_bits, unpack_bits
from thanos_lightning.solver import PrunedLayer
from thanos_lightning.targets import PrunableLayer

Value = TypeVar("Value")


class ReplicatedAccess:
    """`ParameterAccess` where the local piece is the whole parameter.

    Args:
        rank: This process among `world_size`.
        world_size: Number of processes, each with a replica. Above 1, torch.distributed is initialised.
        device: Where this process sends from and receives to.
    """

    def __init__(self, rank: int = 0, world_size: int = 1, device: torch.device | None = None) -> None:
        self.rank = rank
        self.world_size = world_size
        self._device = device

    def weight(self, layer: PrunableLayer) -> Tensor:
        """See `ParameterAccess`."""
        return layer.oriented(layer.parameter.detach())

    @torch.no_grad()
    def write(self, layer: PrunableLayer, weight: Tensor) -> None:
        """See `ParameterAccess`."""
        layer.parameter.copy_(layer.oriented(weight))

    def local_drop(self, layer: PrunableLayer, keep: Tensor) -> Tensor:
        """See `ParameterAccess`."""
        return layer.oriented(keep).logical_not().contiguous().to(layer.parameter.device)

    def full_keep(self, layer: PrunableLayer, drop: Tensor) -> Tensor:
        """See `ParameterAccess`."""
        return layer.oriented(drop).logical_not()

    def stepped_by(self, optimizer: Optimizer, layers: Mapping[str, PrunableLayer]) -> set[str]:
        """See `ParameterAccess`."""
        parameters = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        return {name for name, layer in layers.items() if id(layer.parameter) in parameters}

    def local_tensors(self, layer: PrunableLayer, optimizer: Optimizer | None) -> Iterator[tuple[str, Tensor]]:
        """See `ParameterAccess`."""
        parameter = layer.parameter
        yield "weight", parameter.data
        # .get, because state is a defaultdict: asking for an unknown parameter would create an entry
        moments = optimizer.state.get(parameter, {}) if optimizer is not None else {}
        for name, value in moments.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                yield name, value

    def local_gradient(self, layer: PrunableLayer) -> Tensor | None:
        """See `ParameterAccess`."""
        return layer.parameter.grad

    def sum_on_owner(self, tensor: Tensor, owner: int) -> None:
        """See `ParameterAccess`."""
        if self.world_size > 1:
            dist.reduce(tensor, dst=owner)

    def share(self, layer: PrunableLayer, pruned: PrunedLayer | None, owner: int) -> PrunedLayer:
        """See `ParameterAccess`."""
        if self.world_size == 1:
            assert pruned is not None
            return pruned
        shape = (layer.rows, layer.cols)
        parameter = layer.parameter
        if pruned is not None:
            weight = pruned.weight.contiguous()
            bits = pack_bits(pruned.mask).to(parameter.device)
            losses = torch.tensor([pruned.loss, pruned.relative_loss], dtype=torch.float64, device=parameter.device)
        else:
            weight = torch.empty(shape, dtype=parameter.dtype, device=parameter.device)
            bits = torch.empty(-(-layer.rows * layer.cols // 8), dtype=torch.uint8, device=parameter.device)
            losses = torch.empty(2, dtype=torch.float64, device=parameter.device)
        for tensor in (weight, bits, losses):
            dist.broadcast(tensor, src=owner)
        loss, relative_loss = losses.tolist()
        return PrunedLayer(weight=weight, mask=unpack_bits(bits, shape), loss=loss, relative_loss=relative_loss)

    def to_first(self, tensor: Tensor | None, *, source: int, shape: tuple[int, ...]) -> Tensor | None:
        """See `ParameterAccess`."""
        if self.rank == source:
            assert tensor is not None
            if source != 0:
                dist.send(tensor.to(self._device), dst=0)
            return tensor
        if self.rank != 0:
            return None
        received = torch.empty(shape, dtype=torch.float32, device=self._device)
        dist.recv(received, src=source)
        return received.cpu()

    def gather(self, value: Value) -> list[Value]:
        """See `ParameterAccess`."""
        if self.world_size == 1:
            return [value]
        values: list[Value | None] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]  # every entry has been filled
