"""Experts whose matrices transformers keeps in one parameter of three dimensions, and their routers.

    Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE, DeepSeek   gate_up_proj (experts, 2 · width, hidden), gate first
                                                     down_proj (experts, hidden, width)
    gpt-oss                                          gate_up_proj (experts, hidden, 2 · width), gate and up by turns
    Llama 4                                          gate_up_proj (experts, hidden, 2 · width), gate first
      both of these                                  down_proj (experts, width, hidden)

Each matrix of an expert is a layer: a part of the parameter without gaps. So gate and up are two layers where they lie
one after the other, and one, gate_up, where each row of the parameter has some of both.

While inputs are counted, fused experts call their matrices one by one, so that hooks see each matrix as a layer.
Routing and results stay, but for rounding. The model multiplies an expert's output W x by the router's share s. To a
hook the layer's input is s x, since s · (W x) = W (s x). The gradient that belongs to the output of W (s x) is the one
behind the multiplication by s: the gradient at W x, divided by s.

What experts with few tokens borrow is in `event/experts.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from thanos_lightning.layers.wrappers import class_of
from thanos_lightning.ranks.view import Part, whole_shape

_LLAMA4 = "transformers.models.llama4.modeling_llama4"


@dataclass(frozen=True)
class Layout:
    """How a module keeps the matrices of its experts, and how it is called."""

    # what multiplies the inputs: layer name -> (parameter, part of its second dimension)
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


def _unscaled(output: Tensor, share: Tensor) -> Tensor:
    """Divides the gradient of an `ExpertMatrix`'s output by the share that its inputs were multiplied by."""
    return _Scaled.apply(output, 1 / share)  # type: ignore[no-any-return, no-untyped-call]


class ExpertMatrix(nn.Module):
    """One matrix of one expert: what a Linear layer is elsewhere, with a part of its experts' parameter as its weight.

    It is no module of the model. Hooks on it are called while `one_by_one` lets the experts call it.
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

        Hooks see `shown`, the inputs times the share, (tokens, 1), and the output's gradient divided by the share. If
        no inputs are given, `shown` is multiplied. `tokens` tells hooks which tokens of the batch they are, and `of`
        how many tokens the experts were called with.
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


_LEAST_SHARE = 1e-4  # gradients are divided by shares


def one_by_one(modules: Iterable[nn.Module]) -> Callable[[], None]:
    """Let experts call their matrices that are among these modules. Return what undoes it."""
    hooked: dict[nn.Module, dict[str, ExpertMatrix]] = {}
    for module in modules:
        if isinstance(module, ExpertMatrix):
            hooked.setdefault(module.experts, {})[f"{module.parameter}{module.part}"] = module
    before = {experts: vars(experts).get("forward") for experts in hooked}  # a wrapper of this very module, if any
    for experts, matrices in hooked.items():
        layout = layout_of(experts)
        assert layout is not None, "it has matrices"
        forward = _routed if layout.is_routed else _all_tokens
        called = {name: matrices.get(f"{one.parameter}{one.part}", one) for name, one in matrices_of(experts).items()}
        vars(experts)["forward"] = partial(forward, experts, layout, called)

    def undo() -> None:
        for experts, own in before.items():
            del vars(experts)["forward"]
            if own is not None:
                vars(experts)["forward"] = own

    return undo


class _Reached(NamedTuple):
    """An expert that some of these inputs reach: which tokens they are, and the router's share of each."""

    expert: int
    inputs: Tensor
    tokens: Tensor
    share: Tensor | None


def _routed(
    experts: Any, layout: Layout, matrices: Mapping[str, ExpertMatrix], *args: Tensor, **kwargs: Tensor
) -> Tensor:
    hidden, chosen, shares = (*args, *kwargs.values())  # (tokens, hidden), (tokens, top k), (tokens, top k)
    reached = [
        _Reached(expert, hidden, tokens, shares[tokens, places].unsqueeze(1))
        for expert, (tokens, places) in enumerate(_by_expert(chosen, len(experts.down_proj)))
        if len(tokens)
    ]
    gate = experts._apply_gate if experts.has_gate else experts.act_fn
    result = torch.zeros_like(hidden)
    for (expert, _, tokens, share), given in _given(experts, layout, matrices, reached, gate):
        if experts.has_bias:
            given = given + experts.down_proj_bias[expert] * share
        result.index_add_(0, tokens, given.to(result.dtype))
    return result


def _by_expert(chosen: Tensor, number: int) -> Iterator[tuple[Tensor, Tensor]]:
    """For each expert the tokens that go to it, and which of their choices it is."""
    order = chosen.flatten().sort(stable=True)
    counts = torch.bincount(order.values.clamp(max=number), minlength=number)[:number].tolist()
    for pairs in torch.split(order.indices[: sum(counts)], counts):
        yield pairs // chosen.shape[1], pairs % chosen.shape[1]


def _all_tokens(experts: Any, layout: Layout, matrices: Mapping[str, ExpertMatrix], hidden: Tensor) -> Tensor:
    by_expert = hidden.view(len(experts.down_proj), -1, hidden.shape[-1])
    reached = [
        _Reached(expert, inputs, tokens, None)
        for expert, inputs in enumerate(by_expert)
        if len(tokens := inputs.any(1).nonzero().squeeze(1))
    ]

    def gated(whole: Tensor) -> Tensor:
        gate, up = whole.chunk(2, dim=-1)
        activated: Tensor = experts.act_fn(gate)
        return up * activated

    results = list(torch.zeros_like(by_expert))
    for (expert, _, tokens, _), given in _given(experts, layout, matrices, reached, gated):
        results[expert] = results[expert].index_add(0, tokens, given.to(hidden.dtype))
    return torch.cat(results)


def _given(
    experts: Any,
    layout: Layout,
    matrices: Mapping[str, ExpertMatrix],
    reached: Sequence[_Reached],
    gate: Callable[[Tensor], Tensor],
) -> Iterator[tuple[_Reached, Tensor]]:
    """What each expert gives, by its matrices, which are called one by one."""
    # taken apart once, or each backward would fill a whole gradient
    weights = {name: getattr(experts, name).unbind(0) for name in {one.parameter for one in matrices.values()}}
    bias = getattr(experts, f"{next(iter(layout.ups.values()))[0]}_bias", None)
    inner: list[Tensor] = []
    for expert, hidden, tokens, share in reached:
        inputs = hidden[tokens]
        least = None if share is None else share.detach().clamp(min=_LEAST_SHARE)
        shown = inputs if least is None else (inputs.detach() * least).to(inputs.dtype)
        given = []
        for name in layout.ups:
            matrix = matrices[f"{expert}.{name}"]
            own = matrix(shown, inputs, least, tokens, of=len(hidden), weight=weights[matrix.parameter][expert])
            given.append(own if least is None else _unscaled(own, least))
        up = torch.cat(given, dim=-1) if len(given) > 1 else given[0]
        inner.append(up if bias is None else up + bias[expert])
    # called once, as by the model itself: ZeRO-3 counts the calls of modules, and they must be alike on all ranks
    width = sum(matrices[f"0.{name}"].shape[0] for name in layout.ups)
    whole = gate(torch.cat(inner) if inner else experts.down_proj.new_zeros(0, width))
    parts = torch.split(whole, [len(one) for one in inner])
    for one, part in zip(reached, parts, strict=True):
        matrix = matrices[f"{one.expert}.down_proj"]
        shown = part if one.share is None else (part * one.share).to(part.dtype)
        weight = weights[matrix.parameter][one.expert]
        yield one, matrix(shown, tokens=one.tokens, of=len(one.inputs), weight=weight)


@dataclass(frozen=True)
class Mixture:
    """Experts and their router."""

    name: str  # fully qualified, of the experts
    experts: nn.Module  # the module with the matrices of all experts
    router_name: str  # fully qualified
    router: nn.Module  # chooses experts for each token; some of its parameters and buffers have a row for each
    # Whether the router gives logits, each token's shares, and the numbers of its experts. Otherwise it gives the
    # shares of all experts, and logits, as Llama 4's does
    gives_numbers: bool

    @property
    def size(self) -> int:
        """Number of experts."""
        return _size(self.experts)

    @property
    def weights(self) -> int:
        """Number of weights in the matrices of one expert."""
        return sum(matrix.shape[0] * matrix.shape[1] for matrix in matrices_of(self.experts).values()) // self.size

    @property
    def top_k(self) -> int:
        """How many experts each token goes to."""
        return int(self.router.top_k)  # type: ignore[arg-type]

    @property
    def groups(self) -> int:
        """How many equal groups the router divides the experts into, as DeepSeek's does."""
        return int(getattr(self.router, "num_group", None) or 1)

    @property
    def open_groups(self) -> int:
        """From how many groups the experts of a token may come."""
        return int(getattr(self.router, "topk_group", None) or 1)

    @property
    def lacks_experts(self) -> bool:
        """Whether the router has been made to choose among some experts only."""
        own = vars(self.router).get("forward")
        return isinstance(own, partial) and own.func is _route

    @property
    def of_router(self) -> list[str]:
        """Names of the router's parameters and buffers that have a row for each expert."""
        return [name for name, value in _tensors(self.router) if whole_shape(value)[:1] == (self.size,)]

    @property
    def of_experts(self) -> list[str]:
        """Names of the experts' parameters, and buffers, that have an entry for each expert."""
        return [name for name, value in _tensors(self.experts) if whole_shape(value)[:1] == (self.size,)]

    def check(self, number: int) -> None:
        """Raise ValueError if the router can't choose among so many experts, or gives what no known router gives."""
        whole = dict(_tensors(self.router))
        cut = {
            name: torch.empty(
                number if name in self.of_router else whole_shape(value)[0],
                *whole_shape(value)[1:],
                dtype=value.dtype,
                device="meta",
            )
            for name, value in whole.items()
        }
        try:
            hidden = torch.empty(2, whole_shape(whole["weight"])[1], dtype=whole["weight"].dtype, device="meta")
            given = torch.func.functional_call(_smaller(self.router, number), cut, (hidden,))
            shapes = [tuple(one.shape) for one in given]
        except Exception as error:  # whatever a model raises
            raise ValueError(
                f"the router {self.router_name} ({type(self.router).__name__}) can't choose among {number} of its "
                f"{self.size} experts ({error}): take another sparsity, or another pattern"
            ) from error
        logits, shares = (2, number), (2, self.top_k)
        if shapes != ([logits, shares, shares] if self.gives_numbers else [logits, logits]):
            raise ValueError(
                f"the router {self.router_name} ({type(self.router).__name__}) gives something else than known ones of "
                "transformers do, so none of its experts can be dropped: take another pattern"
            )


def find_mixtures(model: nn.Module) -> dict[str, Mixture]:
    """Find a model's mixtures of experts with a known router: name of the experts -> mixture.

    The router is the one module beside the experts that has a `top_k` and a row of a parameter for each expert.
    """
    modules = dict(model.named_modules())
    found: dict[str, Mixture] = {}
    for name, experts in modules.items():
        layout = layout_of(experts)
        if layout is None or not name:
            continue
        size = _size(experts)
        parent = name.rpartition(".")[0]
        routers = {
            f"{parent}.{own}" if parent else own: child
            for own, child in modules[parent].named_children()
            if child is not experts
            and isinstance(getattr(child, "top_k", None), int)
            and any(whole_shape(value)[:1] == (size,) for _, value in _tensors(child))
        }
        if len(routers) == 1:
            ((router_name, router),) = routers.items()
            found[name] = Mixture(name, experts, router_name, router, layout.is_routed)
    return found


def keep_experts(mixture: Mixture, kept: Sequence[int]) -> None:
    """From now on let a router choose among these experts alone, as in a model without the others.

    Its output has the form that it had: experts keep their numbers, and those that went have logits of -inf.
    """
    router = mixture.router
    if mixture.lacks_experts:
        del vars(router)["forward"]
    if len(kept) < mixture.size:
        numbers = torch.tensor(kept, device=router.weight.device)  # type: ignore[arg-type]
        vars(router)["forward"] = partial(_route, mixture, _smaller(router, len(kept)), numbers, mixture.of_router)


def _route(
    mixture: Mixture, smaller: nn.Module, kept: Tensor, with_rows: Sequence[str], *args: Any, **kwargs: Any
) -> tuple[Tensor, ...]:
    own = dict(_tensors(mixture.router))  # read here, where whatever shards them has gathered them
    kept = kept.to(own[with_rows[0]].device)
    cut = {name: value.index_select(0, kept) if name in with_rows else value for name, value in own.items()}
    given = torch.func.functional_call(smaller, cut, args, kwargs)
    if mixture.gives_numbers:
        logits, shares, chosen = given
        return _widened(logits, kept, mixture.size, -torch.inf), shares, kept[chosen]
    shares, logits = given
    return _widened(shares, kept, mixture.size, 0.0), _widened(logits, kept, mixture.size, -torch.inf)


def _widened(values: Tensor, kept: Tensor, size: int, other: float) -> Tensor:
    return values.new_full((*values.shape[:-1], size), other).index_copy(-1, kept, values)


def _size(experts: nn.Module) -> int:
    down: Any = experts._parameters["down_proj"]
    return whole_shape(down)[0]


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of the module itself."""
    for name in (*module._parameters, *module._buffers):
        value = getattr(module, name)
        if value is not None:
            yield name, value


def _smaller(router: nn.Module, number: int) -> nn.Module:
    """A copy of a router for so many experts. It has no tensors of its own, and no hooks."""
    copy: Any = object.__new__(class_of(router))
    own = {name: value for name, value in vars(router).items() if name not in ("forward", "_compiled_call_impl")}
    vars(copy).update({**own, **vars(nn.Module()), "_modules": router._modules})
    copy.num_experts = number
    copy._parameters = dict.fromkeys(router._parameters)
    copy._buffers = dict.fromkeys(router._buffers)
    return copy  # type: ignore[no-any-return]
