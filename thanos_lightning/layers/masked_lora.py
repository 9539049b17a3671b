"""peft's LoRA layers, multiplying by W + M ∘ (scale · B A), where M is 1 where W is not 0."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from thanos_lightning.layers.lora import LowRank, MaskedAdapter
from thanos_lightning.solver.zeros import effective, zero_where


class MaskedLora(Linear, MaskedAdapter):
    """peft's LoRA layer, but what is learnt stays in the pattern of the weight. Merging it keeps zeros, too."""

    def low_ranks(self) -> list[LowRank]:
        """See `MaskedAdapter`."""
        if self.merged or self.disable_adapters:
            return []
        return [
            LowRank(name, _linear(self.lora_A[name]), _linear(self.lora_B[name]), self.scaling[name])
            for name in self.active_adapters
            if name in self.lora_A
        ]

    @property
    def is_plain(self) -> bool:
        """See `MaskedAdapter`."""
        return _is_plain(self)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What peft adds to the weight when it merges this adapter."""
        delta: Tensor = super().get_delta_weight(adapter)
        return delta.masked_fill(self.weight == 0, 0)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Multiply by the effective weight."""
        if kwargs.get("adapter_names") is not None:
            raise ValueError("adapter_names is given, but masked adapters can't differ within a batch: set_adapter()")
        ranks = self.low_ranks()
        if not ranks:
            plain: Tensor = super().forward(x, *args, **kwargs)
            return plain
        weight = self.weight
        if isinstance(weight, DTensor):
            raise RuntimeError(
                "fully_shard has sharded the parts of a LoRA layer one by one, so that its weight and its adapter are "
                "not whole at the same time: call fully_shard on a module that holds the LoRA layer, such as a block"
            )
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else weight.dtype
        x = x.to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        downs = [rank.down.weight for rank in ranks]
        with torch.autocast(x.device.type, enabled=False):
            ups = [rank.up.weight * rank.scale for rank in ranks]
        dropped = [self.lora_dropout[rank.name](x) for rank in ranks] if self.training else [x]
        if all(one is x for one in dropped):
            # side by side: (rank, in_features) and (out_features, rank)
            down = downs[0] if len(downs) == 1 else torch.cat(downs)
            up = ups[0] if len(ups) == 1 else torch.cat(ups, dim=1)
            return _product(x, weight, down, up, bias, True, self.fan_in_fan_out)
        result = nn.functional.linear(x, (weight.t() if self.fan_in_fan_out else weight).to(dtype), bias)
        for one, lora_a, lora_b in zip(dropped, downs, ups, strict=True):
            result = result + _product(one, weight, lora_a, lora_b, None, False, self.fan_in_fan_out)
        return result


def _linear(module: nn.Module) -> nn.Linear:
    assert isinstance(module, nn.Linear)
    return module


def mask(module: nn.Module) -> None:
    """Turn a plain LoRA layer of a Linear or Conv1D into one that keeps zeros. Other layers stay as they are."""
    if type(module) is Linear and _is_plain(module):
        module.__class__ = MaskedLora


def _is_plain(module: Linear) -> bool:
    base = module.get_base_layer()
    multiplies = type(base).forward in (nn.Linear.forward, Conv1D.forward) and "forward" not in vars(base)
    return multiplies and not module.lora_variant and not any(module.lora_bias.values())


def _product(
    x: Tensor, weight: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, with_weight: bool, transposed: bool
) -> Tensor:
    key = None if torch.compiler.is_compiling() else id(weight if with_weight else down)
    result: Tensor = _Product.apply(x, weight, down, up, bias, with_weight, transposed, key)  # type: ignore[no-untyped-call]
    return result


# Key of a product -> the backward that has recomputed it, and the effective weight, for the gradient of its input
_recomputed: dict[int, tuple[int, Tensor]] = {}


class _Product(torch.autograd.Function):
    """x · effective(W)ᵀ. The effective weight is made again in the backward: kept, it would cost what LoRA saves.

    Where the backward recomputes activations, it has just been made, and is kept until then.
    """

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        down: Tensor,
        up: Tensor,
        bias: Tensor | None,
        with_weight: bool,
        transposed: bool,
        key: int | None,
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            oriented = weight.t() if transposed else weight
            whole = effective(oriented, down, up, with_weight=with_weight, dtype=x.dtype)
            if key is not None and x.requires_grad and (backward := torch._C._current_graph_task_id()) != -1:
                _recomputed[key] = backward, whole
            return nn.functional.linear(x, whole, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, down, up, _, ctx.with_weight, ctx.transposed, ctx.key = inputs
        ctx.save_for_backward(x, weight, down, up)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, up = ctx.saved_tensors
        needs_x, needs_weight, needs_down, needs_up, needs_bias, *_ = ctx.needs_input_grad
        of_x = of_weight = of_down = of_up = of_bias = None
        with torch.autocast(x.device.type, enabled=False):
            oriented = weight.t() if ctx.transposed else weight
            rows = gradient.reshape(-1, gradient.shape[-1])
            if needs_x:
                backward, whole = (-1, None) if ctx.key is None else _recomputed.pop(ctx.key, (-1, None))
                if whole is None or backward != torch._C._current_graph_task_id() or whole.dtype != gradient.dtype:
                    whole = effective(oriented, down, up, with_weight=ctx.with_weight, dtype=gradient.dtype)
                of_x = gradient @ whole
            if needs_bias:
                of_bias = rows.sum(0)
            if needs_weight or needs_down or needs_up:
                whole = rows.t() @ x.reshape(-1, x.shape[-1])
                if needs_weight and ctx.with_weight:
                    of_weight = (whole.t() if ctx.transposed else whole).to(weight.dtype, copy=True)
                zero_where(whole, oriented == 0)
                of_up = (whole @ down.t().to(whole.dtype)).to(up.dtype) if needs_up else None
                of_down = (up.t().to(whole.dtype) @ whole).to(down.dtype) if needs_down else None
        return of_x, of_weight, of_down, of_up, of_bias, None, None, None
