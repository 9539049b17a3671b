"""Lets fused experts call their matrices one by one while inputs are counted, so that hooks see each as a layer.

Routing is as always: an expert gets its tokens and no others. What it computes is the same, too, but for rounding. An
error in what an expert gives counts as much as the router's share of it, by which the loss feels it. So the matrices
are shown their inputs times the share, and gradients of outputs over it: a layer y = W x with a share s is W (s x).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from thanos_lightning.models.experts import ExpertMatrix, Layout, layout_of, matrices_of, unscaled
from thanos_lightning.models.targets import PrunableLayer

_LEAST_SHARE = 1e-4  # gradients are divided by shares


def one_by_one(layers: Iterable[PrunableLayer]) -> Callable[[], None]:
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


def _routed(
    experts: Any, layout: Layout, matrices: Mapping[str, ExpertMatrix], *args: Tensor, **kwargs: Tensor
) -> Tensor:
    hidden, chosen, shares = (*args, *kwargs.values())  # (tokens, hidden), (tokens, top k), (tokens, top k)
    weights = _weights(experts, matrices)
    reached, inner = [], []
    for expert, (tokens, places) in enumerate(_by_expert(chosen, len(experts.down_proj))):
        if len(tokens):
            share = shares[tokens, places].unsqueeze(1)
            reached.append((expert, tokens, share))
            seen = _Seen(hidden[tokens], tokens, len(hidden), share.detach().clamp(min=_LEAST_SHARE))
            inner.append(_up(experts, layout, matrices, weights, expert, seen))
    # called once, as by the model itself: ZeRO-3 counts the calls of modules, and they must be alike on all ranks
    whole = torch.cat(inner) if inner else hidden.new_zeros(0, _width(layout, matrices))
    whole = experts._apply_gate(whole) if experts.has_gate else experts.act_fn(whole)
    result = torch.zeros_like(hidden)
    for (expert, tokens, share), one in zip(reached, whole.split([len(one) for one in inner]), strict=True):
        matrix = matrices[f"{expert}.down_proj"]
        shown = (one * share).to(one.dtype)
        given = matrix(shown, tokens=tokens, of=len(hidden), weight=weights[matrix.parameter][expert])
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
    weights = _weights(experts, matrices)
    reached, inner = [], []
    for expert, inputs in enumerate(by_expert):
        tokens = inputs.any(1).nonzero().squeeze(1)
        if len(tokens):
            reached.append((expert, tokens))
            seen = _Seen(inputs[tokens], tokens, len(inputs), None)
            inner.append(_up(experts, layout, matrices, weights, expert, seen))
    whole = torch.cat(inner) if inner else hidden.new_zeros(0, _width(layout, matrices))
    gate, up = whole.chunk(2, dim=-1)
    whole = up * experts.act_fn(gate)
    results = list(torch.zeros_like(by_expert))
    for (expert, tokens), one in zip(reached, whole.split([len(one) for one in inner]), strict=True):
        matrix = matrices[f"{expert}.down_proj"]
        given = matrix(one, tokens=tokens, of=by_expert.shape[1], weight=weights[matrix.parameter][expert])
        results[expert] = results[expert].index_add(0, tokens, given.to(hidden.dtype))
    return torch.cat(results)


class _Seen(NamedTuple):
    """The inputs of an expert, which of so many tokens they are, and the router's share of each."""

    inputs: Tensor
    tokens: Tensor
    of: int
    share: Tensor | None


def _weights(experts: Any, matrices: Mapping[str, ExpertMatrix]) -> dict[str, tuple[Tensor, ...]]:
    """The weight of each expert by parameter: taken apart once, or each backward would fill a whole gradient."""
    return {name: getattr(experts, name).unbind(0) for name in {one.parameter for one in matrices.values()}}


def _width(layout: Layout, matrices: Mapping[str, ExpertMatrix]) -> int:
    return sum(matrices[f"0.{name}"].shape[0] for name in layout.ups)


def _up(
    experts: Any,
    layout: Layout,
    matrices: Mapping[str, ExpertMatrix],
    weights: Mapping[str, tuple[Tensor, ...]],
    expert: int,
    seen: _Seen,
) -> Tensor:
    inputs, tokens, of, share = seen
    shown = inputs if share is None else (inputs.detach() * share).to(inputs.dtype)
    given = []
    for name in layout.ups:
        matrix = matrices[f"{expert}.{name}"]
        own = matrix(shown, inputs, share, tokens, of=of, weight=weights[matrix.parameter][expert])
        given.append(own if share is None else unscaled(own, share))
    whole = torch.cat(given, dim=-1) if len(given) > 1 else given[0]
    bias = getattr(experts, f"{next(iter(layout.ups.values()))[0]}_bias", None)
    return whole if bias is None else whole + bias[expert]
