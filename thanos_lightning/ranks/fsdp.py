"""FSDP2: where the weight and the moments of a fully sharded parameter lie on this rank.

`torch.distributed.fsdp.fully_shard` makes each parameter a DTensor. A rank holds a shard of its rows (entries of the
first dimension). The shard is both the model's copy and the master: a mixed precision policy casts it anew for each
forward.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from functools import cache

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.optim import Optimizer

from thanos_lightning.ranks.fragments import FragmentAccess, Range
from thanos_lightning.ranks.view import View

_TENSOR_PARALLEL = "tensor_parallel"  # Lightning's name for this mesh dimension


class FsdpAccess(FragmentAccess):
    """`ParameterAccess` under Lightning's `ModelParallelStrategy`, for parameters that `fully_shard` has sharded.

    The strategy's model and optimizers must be set up, and all ranks must create it.

    Raises:
        MisconfigurationException: If a layer is not sharded by rows, naming it.
    """

    def __init__(self, strategy: ModelParallelStrategy, layers: Mapping[str, View]) -> None:
        assert strategy.model is not None, "the strategy is set up"
        self._model = strategy.model
        self._sharded_modules = [module for module in self._model.modules() if isinstance(module, FSDPModule)]
        self.release()
        # Looked up once, because a gathered module shows other tensors in place of its parameters.
        self._parameters = {name: require_rows(layer) for name, layer in layers.items()}
        super().__init__(strategy.global_rank, strategy.world_size, strategy.root_device, strategy.optimizers)

    def numbered_parameters(self) -> list[list[Tensor | None]]:
        # In a single-file checkpoint Lightning numbers the module's parameters, whatever the optimizer's groups are.
        return [list(self._model.parameters()) for _ in self.optimizers]

    def release(self) -> None:
        for module in self._sharded_modules:  # a forward without a backward leaves gathered parameters behind
            module.reshard()

    @torch.no_grad()
    def collect_parameters(self, module: nn.Module, owner: int) -> dict[str, Tensor] | None:
        whole = {}
        for name, parameter in module.named_parameters():
            value = parameter.detach().to(self._device, copy=True)  # NCCL sends no offloaded shards
            if isinstance(value, DTensor):
                value = value.full_tensor()
            if self.rank == owner:
                whole[name] = value
        return whole if self.rank == owner else None

    def completes_step(self, optimizer: Optimizer) -> bool:
        return True  # Lightning offers no gradient scaler under this strategy

    # For ParameterAccess

    def stepped(self, layer: View) -> DTensor:
        return self._parameters[layer.name]

    @torch.no_grad()
    def _piece(self, layer: View, tensor: Tensor) -> Tensor:
        assert isinstance(tensor, DTensor), "as its parameter"
        return _shard_of(tensor, self.rank).piece(layer, tensor.to_local().view(-1))

    # For FragmentAccess

    def _range(self, layer: View, rank: int) -> Range:
        return _shard_of(self._parameters[layer.name], rank).of(layer)

    def _exact_dtype(self, layer: View) -> torch.dtype:
        return self._parameters[layer.name].dtype

    def _mask_device(self, layer: View) -> torch.device:
        return self._read_exact(layer).device  # with offloading, not the forward's device

    def _read_exact(self, layer: View) -> Tensor:
        return self._piece(layer, self._parameters[layer.name])

    def _write_exact(self, layer: View, values: Tensor) -> None:
        self._read_exact(layer).copy_(values)

    def _write_model(self, layer: View, weight: Tensor | None, owner: int) -> None:
        self.release()  # the shard that `_write_exact` writes to is the model's copy


def _shard_of(parameter: DTensor, rank: int) -> Range:
    """The entries of the flattened parameter that a rank holds."""
    start, rows = 0, len(parameter)
    places = _places(parameter.device_mesh)[rank]
    for dimension, placement in enumerate(parameter.placements):
        if placement == Shard(0):
            # as torch.chunk: equal parts, but the last ones may be smaller or empty
            part = -(-rows // parameter.device_mesh.size(dimension))
            first = min(part * places[dimension], rows)
            start, rows = start + first, min(part, rows - first)
    width = parameter.shape[1:].numel()
    return Range(start * width, rows * width)


@cache
def _places(mesh: DeviceMesh) -> dict[int, tuple[int, ...]]:
    """Each rank of a mesh -> its place in each dimension."""
    return dict(zip(mesh.mesh.flatten().tolist(), itertools.product(*map(range, mesh.mesh.shape)), strict=True))


def require_rows(layer: View) -> DTensor:
    """Return the layer's parameter, which must be sharded by rows."""
    parameter = layer.parameter
    if not isinstance(parameter, DTensor):
        raise MisconfigurationException(
            f"layer {layer.name} is not sharded, so nothing keeps its weight the same on all ranks: in "
            f"configure_model, call fully_shard on a module that holds it, or add {layer.name!r} to ignore"
        )
    names = parameter.device_mesh.mesh_dim_names or ()
    by_rows = all(placement in (Shard(0), Replicate()) for placement in parameter.placements)
    if not by_rows or _TENSOR_PARALLEL in names:
        placements = ", ".join(map(repr, parameter.placements))
        over = f" over the mesh {', '.join(names)}" if names else ""
        raise MisconfigurationException(
            f"the weight of layer {layer.name} has the placements ({placements}){over}. "
            "ThanosPruningCallback supports weights that fully_shard has sharded on dimension 0, (Shard(dim=0)) or "
            "(Replicate(), Shard(dim=0)), without tensor parallelism: set tensor_parallel_size=1 and leave out "
            f"shard_placement_fn, or add {layer.name!r} to ignore"
        )
    return parameter
