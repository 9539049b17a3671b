"""A decoder's channels whose order is free, and where they lie in its parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

_SUPPORTED = "decoders that are built like Llama's are (Llama, Mistral, Qwen2, Qwen3, SmolLM2)"
_ATTENTION, _MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
_PER_HEAD = ("q_norm", "k_norm")  # they act on queries and keys, whose order is not free


@dataclass(frozen=True)
class Place:
    """Where channels lie in a parameter.

    Attributes:
        parameter: Name of the parameter.
        dim: The dimension along which the channels lie: 1 is the inputs of a linear layer.
        starts: Where the channels begin along `dim`; several places if several heads read the same channels.
    """

    parameter: str
    dim: int
    starts: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Channels:
    """Channels that may have any order, as long as it is the same in all places."""

    name: str
    size: int
    places: tuple[Place, ...]


def exchangeable_channels(model: PreTrainedModel) -> list[Channels]:
    """The channels whose order is free: the residual stream, and for each decoder layer its MLP and its value heads.

    Raises:
        ValueError: If the model has no decoder layers that are built like Llama's, or if it has a parameter for which
            the effect of a reordering is unknown.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=16, intermediate_size=24, num_attention_heads=2, num_hidden_layers=1, vocab_size=8)
        >>> [channels.name for channels in exchangeable_channels(LlamaForCausalLM(LlamaConfig(**sizes)))]
        ['residual stream', 'model.layers.0.mlp', 'model.layers.0.self_attn head 0', 'model.layers.0.self_attn head 1']
    """
    parameters = dict(model.named_parameters())
    residual: list[Place] = []
    others: list[Channels] = []
    known: set[str] = set()

    def place(name: str, dim: int, *starts: int) -> list[Place]:
        known.add(name)
        return [Place(name, dim, starts or (0,))] if name in parameters else []

    for prefix, layer in _decoder_layers(model):
        attention, mlp = layer.self_attn, layer.mlp
        for name, written in ((f"{prefix}.self_attn", "o_proj"), (f"{prefix}.mlp", "down_proj")):
            residual += place(f"{name}.{written}.weight", 0) + place(f"{name}.{written}.bias", 0)
        for name in (*(f"self_attn.{n}" for n in _ATTENTION[:3]), *(f"mlp.{n}" for n in _MLP[:2])):
            residual += place(f"{prefix}.{name}.weight", 1)
            known.add(f"{prefix}.{name}.bias")
        for name, _ in layer.named_parameters(recurse=True):
            owner = name.split(".")[0]
            if owner.endswith("layernorm"):
                residual += place(f"{prefix}.{name}", 0)
            elif owner == "self_attn" and name.split(".")[1] in _PER_HEAD:
                known.add(f"{prefix}.{name}")
        halves = [
            *(p for n in _MLP[:2] for kind in ("weight", "bias") for p in place(f"{prefix}.mlp.{n}.{kind}", 0)),
            *place(f"{prefix}.mlp.down_proj.weight", 1),
        ]
        others.append(Channels(f"{prefix}.mlp", mlp.down_proj.in_features, tuple(halves)))
        width = int(attention.head_dim)
        heads, queries = attention.v_proj.out_features // width, attention.o_proj.in_features // width
        name = f"{prefix}.self_attn"
        for head in range(heads):
            readers = range(head * queries // heads, (head + 1) * queries // heads)
            places = [
                *(p for kind in ("weight", "bias") for p in place(f"{name}.v_proj.{kind}", 0, head * width)),
                *place(f"{name}.o_proj.weight", 1, *(reader * width for reader in readers)),
            ]
            others.append(Channels(f"{name} head {head}", width, tuple(places)))
    names = {parameter: name for name, parameter in parameters.items()}
    for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
        if embedding is not None and (name := names[embedding.weight]) not in known:  # may be tied: one parameter
            residual += place(name, 1)
            known.add(f"{name.removesuffix('weight')}bias")
    final = f"{model.base_model_prefix}.norm"
    residual += place(f"{final}.weight", 0) + place(f"{final}.bias", 0)
    unknown = [name for name in parameters if name not in known]
    if unknown or not others:
        what = f"its parameter {unknown[0]} is none of theirs" if unknown else "it has no such layers"
        raise ValueError(
            f"the channels of a {type(model).__name__} can't be reordered: known are {_SUPPORTED}, and {what}. Prune "
            "it in the order that it has"
        )
    size = model.get_input_embeddings().weight.shape[1]
    return [Channels("residual stream", size, tuple(residual)), *others]


def _decoder_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        parts = [(getattr(module, "self_attn", None), _ATTENTION), (getattr(module, "mlp", None), _MLP)]
        if all(isinstance(getattr(part, linear, None), nn.Linear) for part, linears in parts for linear in linears):
            yield name, module


@torch.no_grad()
def reorder(parameters: Mapping[str, nn.Parameter], channels: Channels, order: Int[Tensor, " size"]) -> None:
    """Bring channels into a given order in every place where they lie."""
    for place in channels.places:
        parameter = parameters[place.parameter]
        for start in place.starts:
            part = parameter.narrow(place.dim, start, channels.size)
            part.copy_(part.index_select(place.dim, order.to(part.device)))
