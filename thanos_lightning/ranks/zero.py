"""DeepSpeed ZeRO 0 to 3: where the model's copy, the fp32 master and the moments of a parameter lie on this rank.

Only this file and checkpoints/reshard.py import deepspeed. Each of DeepSpeed's optimizers lays pieces out differently:

    stage 3               rank r holds the r-th of equal parts of each flattened parameter, padded at the end
    stages 1 and 2        the parameters are one flat vector, cut into equal parts by rank; the model's copy is whole
    stage 1, bf16 with    as stage 1, but each rank also has whole gradients, and clips by their norm: so each rank
      fp32 accumulation   holds the whole mask
    stage 0               everything is whole; with 16-bit parameters there is a separate master
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero import GatheredParameters, register_external_parameter
from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_grad,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_grad,
    safe_set_local_optimizer_state,
)
from deepspeed.utils.z3_leaf_module import apply_zero_leaf_module_config
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from thanos_lightning.ranks.access import LocalPiece, tensors_of
from thanos_lightning.ranks.fragments import FragmentAccess, Range
from thanos_lightning.ranks.talk import Ranks
from thanos_lightning.ranks.view import View
from thanos_lightning.solver.zeros import zero_where

_ENTRIES_AT_ONCE = 2**22  # whose copies in fp64 take 32 MiB


@dataclass(frozen=True)
class _Master:
    """Locates this rank's piece of a parameter in a tensor that the torch optimizer steps."""

    tensor: Tensor  # what the torch optimizer steps, and the key of its state
    offset: int  # where the piece begins in the tensor
    range: Range  # the piece's entries in the flattened parameter, or in the layer if `of` made this

    def slice_of(self, tensor: Tensor) -> Tensor:
        """Return the same piece, flat, of a tensor that is laid out like the master."""
        return tensor.detach().view(-1)[self.offset : self.offset + self.range.numel]

    def of(self, layer: View) -> _Master | None:
        """The part of the piece that belongs to a layer; None if no entry does."""
        part = self.range.of(layer)
        if not part.numel:
            return None
        return _Master(self.tensor, self.offset + layer.start + part.start - self.range.start, part)


class _Layout:
    """Where DeepSpeed's optimizer keeps masters, model copies and gradients: at stage 0 each rank has all of them.

    `masters` has all tensors that the torch optimizer steps on this rank, in the order of the steps. `numbered` has the
    module's parameters that the torch optimizer's state numbers one by one, in order; none if it numbers flat vectors.
    """

    masters: list[Tensor]
    numbered: Sequence[Tensor | None] = ()

    def __init__(self, optimizer: Any, rank: int) -> None:
        self._rank = rank
        is_flat = isinstance(optimizer, FP16_Optimizer)
        stepped = [group["params"] for group in optimizer.param_groups]
        models = optimizer.fp16_groups if is_flat or isinstance(optimizer, FP16_UnfusedOptimizer) else stepped
        self.masters = [master for group in stepped for master in group]
        self.numbered = [model for group in models for model in group]
        self._of: dict[int, _Master] = {}
        for masters, group in zip(stepped, models, strict=True):
            offset = 0
            for index, model in enumerate(group):
                self._of[id(model)] = _Master(masters[0 if is_flat else index], offset, Range(0, model.numel()))
                offset += model.numel() if is_flat else 0

    def master(self, layer: View) -> _Master | None:
        """This rank's piece, or None if the rank has none or the layer is not trained."""
        master = self._of.get(id(layer.parameter))
        return None if master is None else master.of(layer)

    def updates(self, parameter: nn.Parameter) -> bool:
        """Whether an optimizer updates a parameter, on whatever ranks."""
        return id(parameter) in self._of

    def is_swapped(self, parameter: nn.Parameter) -> bool:
        """Whether the master and the moments are on NVMe outside of the optimizer's step."""
        return False

    def shard(self, parameter: nn.Parameter, rank: int) -> Range:
        """The entries of the flattened parameter whose master a rank has, if an optimizer updates the parameter."""
        return Range(0, parameter.numel())

    def range_of_mask(self, layer: View, rank: int) -> Range:
        """The entries of the layer whose mask a rank needs."""
        return self.shard(layer.parameter, rank).of(layer)

    def piece(self, layer: View, shard: Tensor) -> Tensor:
        """The layer's entries of a tensor that is laid out like this rank's shard of the parameter."""
        return self.shard(layer.parameter, self._rank).piece(layer, shard.view(-1))

    def model_copies(self, layer: View) -> Iterator[LocalPiece]:
        """The entries of the model's copy whose mask this rank needs, flat."""
        entries = self.range_of_mask(layer, self._rank)
        yield LocalPiece("weight", layer.part_of(layer.parameter.detach()).reshape(-1)[entries.start : entries.stop])

    def mask_gradient(self, drops: Sequence[tuple[View, Tensor]]) -> None:
        """Zero pruned entries of the gradient that the next step uses, of layers of one parameter."""
        for layer, drop in drops:
            if layer.parameter.grad is not None:
                gradient = layer.part_of(layer.parameter.grad)
                zero_where(gradient, drop.view_as(gradient))


class _Stage12(_Layout):
    """Stages 1 and 2, and DeepSpeed's optimizer for bf16 with fp32 accumulation at stage 1."""

    def __init__(self, optimizer: Any, layers: Mapping[str, View], ranks: Ranks) -> None:
        self._optimizer = optimizer
        self._rank = ranks.rank
        self._holds_gradients_whole = isinstance(optimizer, BF16_Optimizer)
        groups = optimizer.bf16_groups if self._holds_gradients_whole else ()
        self._group_of = {id(parameter): group for group, members in enumerate(groups) for parameter in members}
        name = "fp32_groups_flat_partition" if self._holds_gradients_whole else "single_partition_of_fp32_groups"
        self.masters = getattr(optimizer, name)
        # A parameter's group, from 1, and its start in the group's vector: the rank with its first entry knows both
        begins = torch.zeros(2, len(layers), dtype=torch.int64)
        for number, layer in enumerate(layers.values()):
            if (mapping := getattr(layer.parameter, "_hp_mapping", None)) and not mapping.lp_fragment_address.start:
                group = mapping.param_group_index
                before = self._rank * self.masters[group].numel()
                begins[:, number] = torch.tensor([group + 1, before + mapping.hp_fragment_address.start])
        of_layers = ranks.total(begins).T.tolist()
        self._begins = {
            id(layer.parameter): (group - 1, start)
            for layer, (group, start) in zip(layers.values(), of_layers, strict=True)
            if group
        }

    def updates(self, parameter: nn.Parameter) -> bool:
        return id(parameter) in self._begins

    def master(self, layer: View) -> _Master | None:
        mapping = getattr(layer.parameter, "_hp_mapping", None)
        if mapping is None:
            return None
        shard = self.shard(layer.parameter, self._rank)
        return _Master(self.masters[mapping.param_group_index], mapping.hp_fragment_address.start, shard).of(layer)

    def shard(self, parameter: nn.Parameter, rank: int) -> Range:
        group, begin = self._begins[id(parameter)]
        part, numel = self.masters[group].numel(), parameter.numel()
        start, stop = (min(max(of_rank * part - begin, 0), numel) for of_rank in (rank, rank + 1))
        return Range(start, stop - start)

    def range_of_mask(self, layer: View, rank: int) -> Range:
        if self._holds_gradients_whole or not self.updates(layer.parameter):
            return Range(0, layer.rows * layer.cols)
        return super().range_of_mask(layer, rank)

    def mask_gradient(self, drops: Sequence[tuple[View, Tensor]]) -> None:
        sharded: Any = drops[0][0].parameter
        optimizer, mapping = self._optimizer, getattr(sharded, "_hp_mapping", None)
        if self._holds_gradients_whole:
            group = self._group_of.get(id(sharded))
            if group is not None:
                whole = optimizer.fp32_groups_gradient_dict[group][sharded._index_in_param_group]
                for layer, drop in drops:
                    zero_where(Range(0, whole.numel()).piece(layer, whole.view(-1)), drop)
            return
        if mapping is None:
            return
        if optimizer.cpu_offload:
            optimizer._wait_for_offload_copies()  # copies to pinned memory are asynchronous
        gradient = mapping.get_lp_grad_fragment(sharded._index_in_param_group)
        for layer, drop in drops:
            zero_where(self.piece(layer, gradient), drop.to(gradient.device))
        if optimizer.cpu_offload:
            # DeepSpeed took the norm in the backward, before the gradient could be masked
            norms, key = optimizer.norm_for_param_grads, optimizer.get_param_id(sharded)
            if key in norms:
                norms[key] = torch.tensor(_norm(gradient))


class _Stage3(_Layout):
    """Stage 3, with or without offloading."""

    def __init__(self, optimizer: DeepSpeedZeroOptimizer_Stage3, rank: int) -> None:
        self._optimizer = optimizer
        self._rank = rank
        self._index = {id(p): index for group in optimizer.fp16_groups for index, p in enumerate(group)}
        self.masters = optimizer.fp32_partitioned_groups_flat

    def master(self, layer: View) -> _Master | None:
        parameter = layer.parameter
        group = self._group(parameter)
        if group is None:
            return None
        _, offset, _ = self._optimizer.grad_position[self._optimizer.get_param_id(parameter)]
        return _Master(self.masters[group], offset, self.shard(parameter, self._rank)).of(layer)

    def _group(self, parameter: nn.Parameter) -> int | None:
        if id(parameter) not in self._index:
            return None
        group: int = self._optimizer.grad_position[self._optimizer.get_param_id(parameter)][0]
        return group

    def is_swapped(self, parameter: nn.Parameter) -> bool:
        group = self._group(parameter)
        return group is not None and bool(self._optimizer._swappable_optimizer_subgroup(group))

    def updates(self, parameter: nn.Parameter) -> bool:
        return id(parameter) in self._index

    def shard(self, parameter: nn.Parameter, rank: int) -> Range:
        sharded: Any = parameter  # with DeepSpeed's own attributes
        part, numel = sharded.partition_numel(), sharded.ds_numel
        start = min(part * rank, numel)
        return Range(start, min(part, numel - start))

    def model_copies(self, layer: View) -> Iterator[LocalPiece]:
        sharded: Any = layer.parameter
        if sharded.ds_tensor.numel() >= self.shard(sharded, self._rank).numel:  # otherwise the shard is on NVMe
            yield LocalPiece("weight", self.piece(layer, sharded.ds_tensor.detach()))
        if sharded.ds_status == ZeroParamStatus.AVAILABLE:  # DeepSpeed keeps small parameters gathered
            yield LocalPiece("gathered weight", next(super().model_copies(layer)).tensor)

    def mask_gradient(self, drops: Sequence[tuple[View, Tensor]]) -> None:
        parameter = drops[0][0].parameter
        group = self._group(parameter)
        if group is None:
            return
        optimizer = self._optimizer
        is_swapped = self.is_swapped(parameter)
        if is_swapped:
            gradient = safe_get_local_grad(parameter).clone()
        elif optimizer.offload_optimizer:
            # Not by DeepSpeed's API, which copies each gradient to the GPU and back. Its copies to the CPU have ended
            _, start, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
            whole = self.masters[group].grad
            assert whole is not None, "DeepSpeed allocates it once"
            gradient = whole[start : start + length]
        else:
            gradient = optimizer.averaged_gradients[group][self._index[id(parameter)]]
        for layer, drop in drops:
            zero_where(self.piece(layer, gradient), drop.to(gradient.device))
        if is_swapped:
            safe_set_local_grad(parameter, gradient)  # and its norm
        elif optimizer.offload_optimizer:
            norms, key = optimizer.norm_for_param_grads, optimizer.get_param_id(parameter)
            if key in norms:
                norms[key] = _norm(gradient)  # a number: DeepSpeed adds norms up on the device of the first tensor


def _norm(gradient: Tensor) -> float:
    """The norm of a gradient on the CPU, summed in fp64."""
    parts = torch.split(gradient.view(-1), _ENTRIES_AT_ONCE)
    return math.sqrt(sum(float(torch.linalg.vector_norm(part, dtype=torch.float64)) ** 2 for part in parts))


class ZeroAccess(FragmentAccess):
    """`ParameterAccess` under a DeepSpeed engine that is up. `FragmentAccess.write` in fragments.py writes a layer.

    Raises:
        MisconfigurationException: If zeros could not be kept under this kind of DeepSpeed training, naming the cause.
    """

    _kind = "master"

    def __init__(self, strategy: DeepSpeedStrategy, layers: Mapping[str, View]) -> None:
        self._engine = strategy.deepspeed_engine
        wrapped: Any = self._engine.optimizer
        _refuse_unknown(self._engine, wrapped)
        inner = wrapped if isinstance(wrapped, Optimizer) else wrapped.optimizer
        super().__init__(strategy.global_rank, strategy.world_size, strategy.root_device, [inner])
        if isinstance(wrapped, DeepSpeedZeroOptimizer_Stage3):
            self._layout: _Layout = _Stage3(wrapped, strategy.global_rank)
            self.saves_every_rank = True
            # modules that are gathered as a whole, such as mixtures of experts, have hooks that fill in gradients
            self.can_differentiate = not wrapped.leaf_parameters
        elif isinstance(wrapped, (DeepSpeedZeroOptimizer, BF16_Optimizer)):
            self._layout = _Stage12(wrapped, layers, self)
        else:
            self._layout = _Layout(wrapped, strategy.global_rank)
        self._masters = {name: self._layout.master(layer) for name, layer in layers.items()}
        for name, layer in layers.items():
            if layer.parameter.requires_grad and not self._layout.updates(layer.parameter):
                raise MisconfigurationException(
                    f"layer {name} requires gradients, but no optimizer updates it, so DeepSpeed keeps no master of "
                    "it: pass its parameters to the optimizer in configure_optimizers, set requires_grad=False, or "
                    f"add {name!r} to ignore"
                )

    def release(self) -> None:
        if isinstance(wrapped := self._engine.optimizer, DeepSpeedZeroOptimizer_Stage3):
            # As DeepSpeed does at a step, since its hooks miss what a backward skips
            wrapped.parameter_offload.partition_all_parameters()
            if small := wrapped.persistent_parameters:  # DeepSpeed expects these to stay gathered
                small[0].all_gather(small)

    def numbered_parameters(self) -> list[list[Tensor | None]]:
        return [list(self._layout.numbered)]

    def completes_step(self, optimizer: Optimizer) -> bool:
        # ZeRO steps the groups one after another, each by a separate call.
        return any(tensor is self._layout.masters[-1] for tensor in tensors_of(optimizer))

    def local_tensors(self, layer: View) -> Iterator[LocalPiece]:
        yield from self._layout.model_copies(layer)
        master = self._masters[layer.name]
        if master is None:
            return
        if not self._layout.is_swapped(layer.parameter):
            yield from super().local_tensors(layer)
            return
        yield LocalPiece("master", self._read_exact(layer))
        for name in self._swapped_moments(master):
            yield LocalPiece(name, self._layout.piece(layer, safe_get_local_optimizer_state(layer.parameter, name)))

    @torch.no_grad()
    def collect_parameters(self, module: nn.Module, owner: int) -> dict[str, Tensor] | None:
        if not isinstance(self._layout, _Stage3):
            return super().collect_parameters(module, owner)
        with GatheredParameters(list(module.parameters())):
            return super().collect_parameters(module, owner)

    def mask_gradient(self, drops: Sequence[tuple[View, Tensor]]) -> None:
        # Before the boundary, gradients are not yet where the step will read them.
        if self._engine.is_gradient_accumulation_boundary():
            self._layout.mask_gradient(drops)

    # For ParameterAccess

    def stepped(self, layer: View) -> Tensor | None:
        master = self._masters[layer.name]
        return None if master is None else master.tensor

    def _piece(self, layer: View, tensor: Tensor) -> Tensor:
        master = self._masters[layer.name]
        assert master is not None, "an optimizer updates the layer"
        return master.slice_of(tensor)

    # For FragmentAccess

    def _range(self, layer: View, rank: int) -> Range:
        return self._layout.range_of_mask(layer, rank)

    def _exact_range(self, layer: View, rank: int) -> Range:
        if not layer.parameter.requires_grad:  # an untrained parameter has no master
            return self._range(layer, rank)
        return self._layout.shard(layer.parameter, rank).of(layer)

    def _exact_dtype(self, layer: View) -> torch.dtype:
        if not layer.parameter.requires_grad:
            return layer.parameter.dtype
        return self._layout.masters[0].dtype

    def _mask_device(self, layer: View) -> torch.device:
        master = self._masters[layer.name]
        device = self._device if master is None or master.tensor.numel() == 0 else master.tensor.device
        assert device is not None
        return device

    def _swapped_moments(self, master: _Master) -> list[str]:
        """Names of the states that an optimizer on NVMe keeps for each entry. In memory they are 1-D tensors."""
        states = self.optimizers[0].state.get(master.tensor, {})
        return [name for name, value in states.items() if isinstance(value, Tensor) and value.dim() == 1]

    def _read_exact(self, layer: View) -> Tensor:
        master = self._masters[layer.name]
        if master is not None:
            if self._layout.is_swapped(layer.parameter):
                return self._layout.piece(layer, safe_get_local_fp32_param(layer.parameter))
            return master.slice_of(master.tensor)
        if layer.parameter.requires_grad:
            return torch.empty(0, dtype=self._exact_dtype(layer), device=self._device)
        piece = next(iter(self._layout.model_copies(layer)), None)
        if piece is None:
            raise MisconfigurationException(
                f"layer {layer.name} is not trained, and its weight is on NVMe, where it can't be pruned: train it, "
                f"add {layer.name!r} to ignore, or offload parameters to the CPU"
            )
        return piece.tensor

    def _write_exact(self, layer: View, values: Tensor) -> None:
        master = self._masters[layer.name]
        if master is None:  # not trained: the model's copy is all there is
            return
        if self._layout.is_swapped(layer.parameter):
            part = safe_get_local_fp32_param(layer.parameter).clone()
            self._layout.piece(layer, part).copy_(values)
            safe_set_local_fp32_param(layer.parameter, part)
        else:
            master.slice_of(master.tensor).copy_(values)

    def _write_model(self, layer: View, weight: Tensor | None, owner: int) -> None:
        if not isinstance(self._layout, _Stage3):
            super()._write_model(layer, weight, owner)
            return
        parameter: Any = layer.parameter
        # DeepSpeed needs the same on all ranks
        is_gathered = parameter.ds_status == ZeroParamStatus.AVAILABLE
        has_others = getattr(parameter, "ds_secondary_tensor", None) is not None
        on_disk = self._engine.optimizer.params_in_nvme_and_cpu
        if layer.part is not None and not (is_gathered or has_others or on_disk):
            # A parameter of many experts is not gathered once for each expert: each rank gets its piece
            flat = None if weight is None else layer.oriented(weight).reshape(-1)
            values = self._hand_out(flat, self._ranges(layer), owner, parameter.dtype)
            next(self._layout.model_copies(layer)).tensor.copy_(values)
            return
        with GatheredParameters([parameter], modifier_rank=owner):
            if weight is not None:
                layer.part_of(parameter.data).copy_(layer.oriented(weight))

    def _zero_moments(self, layer: View, drop: Tensor) -> None:
        master = self._masters[layer.name]
        if master is None or not self._layout.is_swapped(layer.parameter):
            super()._zero_moments(layer, drop)
            return
        for name in self._swapped_moments(master):
            part = safe_get_local_optimizer_state(layer.parameter, name).clone()
            zero_where(self._layout.piece(layer, part), drop.to(part.device))
            safe_set_local_optimizer_state(layer.parameter, part, name)


def _refuse_unknown(engine: Any, wrapped: Any) -> None:
    known = (
        DeepSpeedZeroOptimizer_Stage3,
        DeepSpeedZeroOptimizer,
        BF16_Optimizer,
        FP16_UnfusedOptimizer,
        FP16_Optimizer,
    )
    why = None
    if type(wrapped) not in known and not isinstance(wrapped, Optimizer):  # a subclass (MiCS) may differ
        why = f"DeepSpeed's {type(wrapped).__name__}"
    elif engine.has_moe_layers:  # experts are partitioned over fewer ranks
        why = "DeepSpeed's own mixture-of-experts layers (deepspeed.moe)"
    elif engine.autotp_size() > 1:
        why = f"DeepSpeed's tensor parallelism (autotp_size {engine.autotp_size()})"
    elif getattr(wrapped, "zenflow", False):
        why = "ZenFlow (zenflow)"
    elif (ratio := getattr(wrapped, "partial_offload", 1.0)) not in (0.0, 1.0):
        why = f"an optimizer that is offloaded in part (offload_optimizer.ratio {ratio})"
    if why is not None:
        raise MisconfigurationException(
            f"ThanosPruningCallback does not know where {why} keeps weights, so its zeros would be lost: use plain "
            "ZeRO 0 to 3, with optimizer and parameters offloaded as a whole or not at all"
        )


def gathers_whole_modules(model: nn.Module, zero: Mapping[str, Any]) -> bool:
    """Whether stage 3 would gather modules of a model as a whole, by the `zero_optimization` of its configuration."""
    return bool(apply_zero_leaf_module_config(model, DeepSpeedZeroLeafModuleConfig(**zero.get("leaf_module", {}))))


def gather_together(module: nn.Module) -> None:
    """Let stage 3 gather all that is inside of a module when this is called, not when its parts are."""
    for parameter in module.parameters():
        register_external_parameter(module, parameter)


@contextmanager
def gathered(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Gather parameters of stage 3; all ranks keep what rank 0 has written to them. All ranks must call it."""
    with GatheredParameters(parameters, modifier_rank=0):
        yield


def shard_frozen(model: nn.Module, first: nn.Module, config: dict[str, Any]) -> nn.Module:
    """Shard a frozen model as stage 3 does. All ranks must call it.

    The model may be whole on each rank, or sharded while it was loaded. `first` is as in `place_frozen`, and `config`
    comes from `sharding_config`.
    """
    engine, *_ = deepspeed.initialize(model=model, config=config)  # hooks on the model keep the engine alive
    offload = engine.optimizer
    # DeepSpeed records the order of modules from one call of the whole model to the next, and prefetches by it. Calls
    # of parts of the model would extend the last record without end, so the first module of a pass starts a new record.
    offload.fwd_pre_hook.remove()
    first.register_forward_pre_hook(lambda *_: offload.get_param_coordinator().reset_step(), prepend=True)
    return model.eval()
