"""Lets fused experts call their matrices one by one while inputs are counted, so that hooks see each as a layer.

Routing is as always: an expert gets its tokens and no others. What it computes is the same, too, but for rounding. An
error in what an expert gives counts as much as the router's share of it, by which the loss feels it. So the matrices
are shown their inputs times the share, and gradients of outputs over it: a layer y = W x with a share s is W (s x).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from thanos_lightning.models.experts import ExpertMatrix, Layout, layout_of, matrices_of, unscaled
from thanos_lightning.models.targets import Layer

_LEAST_SHARE = 1e-4  # gradients are divided by shares


def one_by_one(layers: Iterable[Layer]) -> Callable[[], None]:
    """Let the experts of these layers call their matrices, which are the layers' modules. Return what undoes it."""
    hooked: dict[nn.Module, dict[str, ExpertMatrix]] = {}
    for layer in layers:
        for module in layer.modules:
            if isinstance(module, ExpertMatrix):
                found = hooked.setdefault(module.experts, {})
                found[".".join(layer.name.split(".")[-2:])] = module
    before = {experts: vars(experts).get("forward") for experts in hooked}  # a wrapper of this very module, if any
    for experts, matrices in hooked.items():
        layout = layout_of(experts)
        assert layout is not None, "it has matrices"
        forward = _routed if layout.is_routed else _all_tokens
        vars(experts)["forward"] = partial(forward, experts, layout, {**matrices_of(experts), **matrices})

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
            given.append(own if least is None else unscaled(own, least))
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
