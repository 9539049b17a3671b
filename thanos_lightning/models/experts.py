"""Experts whose matrices transformers keeps in one parameter of three dimensions: each matrix as a layer of its own.

    Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE, DeepSeek   gate_up_proj (experts, 2 · width, hidden), gate first
                                                     down_proj (experts, hidden, width)
    gpt-oss                                          gate_up_proj (experts, hidden, 2 · width), gate and up by turns
    Llama 4                                          gate_up_proj (experts, hidden, 2 · width), gate first
      both of these                                  down_proj (experts, width, hidden)

A layer is a part of the parameter without gaps. So gate and up are two layers where they lie one after the other, and
one, gate_up, where each row of the parameter has some of both.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from thanos_lightning.sharding.view import Part, whole_shape

_LLAMA4 = "transformers.models.llama4.modeling_llama4"


@dataclass(frozen=True)
class Layout:
    """How a module keeps the matrices of its experts, and how it is called."""

    # layer name -> (parameter, part of its second dimension), of what multiplies the inputs
    ups: dict[str, tuple[str, slice]]
    transposed: bool  # whether a matrix is stored as (in_features, out_features)
    # Whether the module is called with each token's experts and their shares. Otherwise with all tokens for each
    # expert, multiplied by the shares, which are 0 where a token does not go to the expert
    is_routed: bool


def layout_of(module: nn.Module) -> Layout | None:
    """How a module keeps its experts; None if it has none, or none in a known way."""
    parameters: dict[str, Any] = module._parameters
    up = "gate_up_proj" if "gate_up_proj" in parameters else "up_proj"
    if any(getattr(parameters.get(name), "ndim", 0) < 1 for name in (up, "down_proj")):
        return None
    if _LLAMA4 in sys.modules and isinstance(module, sys.modules[_LLAMA4].Llama4TextExperts):
        return Layout({up: (up, slice(None))}, transposed=True, is_routed=False)
    # transformers' use_experts_implementation says this of every class that it decorates
    if not hasattr(module, "is_transposed") or getattr(module, "has_post_expert_norm", False):
        return None
    transposed = bool(module.is_transposed)
    if not module.has_gate or transposed or not module.is_concatenated:
        return Layout({up: (up, slice(None))}, transposed, is_routed=True)
    width = whole_shape(parameters[up])[1] // 2
    return Layout({"gate_proj": (up, slice(0, width)), "up_proj": (up, slice(width, 2 * width))}, False, True)


class _Scaled(torch.autograd.Function):
    """A tensor as it is, with its gradient times a factor."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        ctx.mark_dirty(tensor)  # torch refuses to write in place on a view that is made here
        return tensor

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (factor,) = ctx.saved_tensors
        return (gradient * factor).to(gradient.dtype), None


def unscaled(output: Tensor, share: Tensor) -> Tensor:
    """The output of an `ExpertMatrix` with a share, so that gradients from here on are as without it."""
    return _Scaled.apply(output, 1 / share)  # type: ignore[no-any-return, no-untyped-call]


class ExpertMatrix(nn.Module):
    """One matrix of one expert: what a Linear layer is elsewhere, with a part of its experts' parameter as its weight.

    It is no module of the model. Hooks on it are called while `calibration.experts` lets the experts call it.
    """

    bias = None
    experts: nn.Module

    def __init__(self, experts: nn.Module, parameter: str, expert: int, rows: slice, transposed: bool) -> None:
        super().__init__()
        self.__dict__["experts"] = experts  # not as a part of this module
        self.parameter, self.part, self.transposed = parameter, Part(expert, rows), transposed

    @property
    def weight(self) -> nn.Parameter:
        """The parameter of all experts."""
        weight: nn.Parameter = getattr(self.experts, self.parameter)
        return weight

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        _, first, second = whole_shape(self.weight)
        first = len(range(first)[self.part.rows])
        return (second, first) if self.transposed else (first, second)

    @property
    def reached(self) -> float:
        """Roughly the fraction of the tokens that reach an expert, if its router chooses all alike."""
        each_token = getattr(getattr(self.experts, "config", None), "num_experts_per_tok", 1)
        return float(each_token) / whole_shape(self.weight)[0]

    def forward(
        self,
        shown: Tensor,
        inputs: Tensor | None = None,
        share: Tensor | None = None,
        tokens: Tensor | None = None,
        *,
        of: int,
        weight: Tensor,
    ) -> Tensor:
        """Multiply inputs, (tokens, in_features) to (tokens, out_features), by what `weight` has of this expert.

        Hooks see `shown` as the inputs, which are these times the share, and are the inputs if none are given; and the
        gradient of the output divided by the share, (tokens, 1). `tokens` tells hooks which tokens of the batch they
        are, and `of` how many tokens the experts were called with.
        """
        matrix, inputs = weight[self.part.rows], shown if inputs is None else inputs
        output = inputs @ matrix if self.transposed else nn.functional.linear(inputs, matrix)
        return output if share is None else _Scaled.apply(output, share)  # type: ignore[no-untyped-call]


def matrices_of(experts: nn.Module) -> dict[str, ExpertMatrix]:
    """The matrices of a module with a known layout, expert by expert; empty for all other modules."""
    layout = layout_of(experts)
    if layout is None:
        return {}
    parts = {**layout.ups, "down_proj": ("down_proj", slice(None))}
    return {
        f"{expert}.{name}": ExpertMatrix(experts, parameter, expert, rows, layout.transposed)
        for expert in range(whole_shape(experts.get_parameter("down_proj"))[0])
        for name, (parameter, rows) in parts.items()
    }


def unknown_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that look like fused experts, by name, but whose layout is not known."""
    for name, module in model.named_modules():
        parameters = [parameter for parameter in module._parameters.values() if parameter is not None]
        fused = [
            parameter for parameter in parameters if len(whole_shape(parameter)) == 3 and whole_shape(parameter)[0] > 1
        ]
        if fused and not hasattr(module, "kernel_size") and layout_of(module) is None:
            yield name, module
