"""Lets fused experts call their matrices one by one while inputs are counted, so that hooks see each as a layer.

Routing is as always: an expert gets its tokens and no others. What it computes is the same, too, but for rounding. An
error in what an expert gives counts as much as the router's share of it, by which the loss feels it. So the matrices
are shown their inputs times the share, and gradients of outputs over it: a layer y = W x with a share s is W (s x).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

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
    result = torch.zeros_like(hidden)
    for expert, (tokens, places) in enumerate(_by_expert(chosen, len(experts.down_proj))):
        if not len(tokens):
            continue
        share = shares[tokens, places].unsqueeze(1)
        inner = _up(experts, layout, matrices, expert, hidden[tokens], tokens, share)
        inner = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
        given = matrices[f"{expert}.down_proj"]((inner * share).to(inner.dtype), tokens=tokens)
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
    results = []
    for expert, inputs in enumerate(by_expert):
        tokens = inputs.any(1).nonzero().squeeze(1)
        if not len(tokens):
            results.append(torch.zeros_like(inputs))
            continue
        gate, up = _up(experts, layout, matrices, expert, inputs[tokens], tokens, None).chunk(2, dim=-1)
        given = matrices[f"{expert}.down_proj"](up * experts.act_fn(gate), tokens=tokens)
        results.append(torch.zeros_like(inputs).index_add(0, tokens, given.to(inputs.dtype)))
    return torch.cat(results)


def _up(
    experts: Any,
    layout: Layout,
    matrices: Mapping[str, ExpertMatrix],
    expert: int,
    inputs: Tensor,
    tokens: Tensor,
    share: Tensor | None,
) -> Tensor:
    own = [matrices[f"{expert}.{name}"] for name in layout.ups]
    if share is None:
        given = [matrix(inputs, tokens=tokens) for matrix in own]
    else:
        share = share.detach().clamp(min=_LEAST_SHARE)
        shown = (inputs.detach() * share).to(inputs.dtype)
        given = [unscaled(matrix(shown, inputs, share, tokens), share) for matrix in own]
    whole = torch.cat(given, dim=-1) if len(given) > 1 else given[0]
    bias = getattr(experts, f"{next(iter(layout.ups.values()))[0]}_bias", None)
    return whole if bias is None else whole + bias[expert]
