"""Drops whole decoder layers, those that a model's loss misses least: a shallower dense model."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from thanos_lightning.calibration.fisher import TOKENS_PER_CHUNK, counted_predictions
from thanos_lightning.checkpoints.format import architecture_of
from thanos_lightning.checkpoints.huggingface import build_model
from thanos_lightning.checkpoints.shrink import resized
from thanos_lightning.models.targets import refuse_compiled
from thanos_lightning.report.progress import open_phase

# Largest error of the logits over their norm: for float32 and float64, and for narrower dtypes. Both models have the
# same layers and kernels, so on a CPU not even rounding differs.
_TOLERANCE, _TOLERANCE_OF_HALVES = 1e-4, 1e-2
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Dropped:
    """A model without some of its decoder layers.

    Attributes:
        model: The smaller model. It shares its weights with the one that it was made of: training one changes both.
        layers: Numbers of the layers that went, counted from 0 in the first model, in the order in which they went.
        losses: Mean loss for each predicted token: of the whole model, then after each layer that went.
    """

    model: PreTrainedModel
    layers: list[int]
    losses: list[float]


@torch.no_grad()
def drop_layers(model: PreTrainedModel, batches: Iterable[Mapping[str, Any]], number: int) -> Dropped:
    """Drop decoder layers one after the other, each time the one without which the loss on the batches is lowest.

    A layer stays if the configuration can't describe the model without it, such as the one dense layer of some mixtures
    of experts. The smaller model is built from its configuration, and checked: it computes what the model computes if
    the dropped layers pass on what they get.

    Args:
        model: A causal LM, in any floating dtype, on one device. It keeps its layers.
        batches: Arguments of the model's forward, such as {"input_ids": (batch, length)}; labels or an attention_mask
            say which predictions count. They are run once for each layer that is left, each time one goes: some
            thousand tokens are enough.
        number: How many layers go, at least 1; at least one stays.

    Raises:
        ValueError: If so many layers can't go, if the model has no stack of layers that its configuration counts, or
            more than one, if there is nothing to predict in the batches, or their loss is not finite, or if the smaller
            model computes something else.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=16, intermediate_size=24, num_attention_heads=2, num_hidden_layers=3, vocab_size=8)
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes))
        >>> dropped = drop_layers(model, [{"input_ids": torch.arange(8).view(1, 8)}], 1)
        >>> dropped.model.config.num_hidden_layers, len(dropped.layers), len(dropped.losses)
        (2, 1, 2)
    """
    refuse_compiled(model)
    batches = list(batches)
    stack = _stack(model)
    layers = list(model.get_submodule(stack).children())
    if not 1 <= number < len(layers):
        raise ValueError(f"{number} of the {len(layers)} layers can't be dropped: give 1 to {len(layers) - 1}")
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        gone: list[int] = []
        losses = [_loss(model, batches)]
        if not math.isfinite(losses[0]):
            raise ValueError(f"the loss on the batches is {losses[0]}: load the model in another dtype")
        choices = sum(len(layers) - before for before in range(number))
        with open_phase("Searching for layers", choices, "choices") as phase:
            for _ in range(number):
                found: dict[int, float] = {}
                for tried in (other for other in range(len(layers)) if other not in gone):
                    if _configuration(model, stack, (*gone, tried)) is not None:
                        with _passing_on([layers[index] for index in (*gone, tried)]):
                            loss = _loss(model, batches)
                        found[tried] = loss if math.isfinite(loss) else math.inf
                    phase.advance()
                if not found:
                    raise ValueError(
                        f"no configuration of {architecture_of(model)} describes it with "
                        f"{len(layers) - len(gone) - 1} of its {len(layers)} layers: drop {len(gone) or 'none'}"
                    )
                gone.append(min(found, key=found.__getitem__))
                losses.append(found[gone[-1]])
        smaller = _without(model, stack, gone)
        with _passing_on([layers[index] for index in gone]):
            expected = _logits(model, batches[0]).float()
        error = float((_logits(smaller, batches[0]).float() - expected).norm() / expected.norm())
    finally:
        for module, mode in modes:
            module.training = mode
    if not error <= (_TOLERANCE if model.dtype in (torch.float32, torch.float64) else _TOLERANCE_OF_HALVES):
        raise ValueError(
            f"what a layer of {architecture_of(model)} computes depends on where it is: built from its configuration "
            f"without layer(s) {', '.join(map(str, gone))}, it computes other logits than if these pass on what they "
            f"get ({error:.1%} of their norm). Don't drop layers of this model"
        )
    return Dropped(smaller.train(model.training), gone, losses)


def _stack(model: PreTrainedModel) -> str:
    """The name of the one list of layers whose length the configuration gives, and which is in no other one."""
    sizes = set(_leaves(model.config.to_dict()))
    found: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in found):  # such as the experts of a layer
            continue
        if isinstance(module, nn.ModuleList) and len(module) in sizes and len({type(layer) for layer in module}) == 1:
            found.append(name)
    if len(found) == 1 and model.can_generate():
        return found[0]
    if not model.can_generate():
        why = "is no causal language model"
    elif found:
        why = f"has {len(found)} stacks of layers ({', '.join(found)})"
    else:
        why = "has no stack of layers of one kind whose number is in its configuration"
    raise ValueError(f"{architecture_of(model)} {why}, and no layer can be dropped: prune it in another way")


@contextmanager
def _passing_on(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Make layers give what they get."""

    def replace(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        given = args[0] if args else next(iter(kwargs.values()))
        return (given, *output[1:]) if isinstance(output, tuple) else given

    handles = [layer.register_forward_hook(replace, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _kept(model: PreTrainedModel, stack: str, gone: Collection[int]) -> list[int]:
    size = len(list(model.get_submodule(stack).children()))
    return [index for index in range(size) if index not in gone]


def _configuration(model: PreTrainedModel, stack: str, gone: Collection[int]) -> dict[str, Any] | None:
    """The configuration of the model that is left; None if there is none."""
    kept = _kept(model, stack, gone)
    size = len(kept) + len(gone)
    shapes = {name: value.shape for name, value in _renumbered(model.state_dict(), stack, kept).items()}
    whole = _filtered(model.config.to_dict(), size, kept)
    return resized(architecture_of(model), whole, shapes, (size, len(kept)), Path(architecture_of(model)))


def _without(model: PreTrainedModel, stack: str, gone: Collection[int]) -> PreTrainedModel:
    """Build the model that is left, on the same weights."""
    kept = _kept(model, stack, gone)
    smaller = build_model(architecture_of(model), _configuration(model, stack, gone), Path(architecture_of(model)))
    smaller.load_state_dict(_renumbered(model.state_dict(), stack, kept), assign=True)
    for name, value in _renumbered(dict(model.named_buffers()), stack, kept).items():  # also those that no file holds
        home, _, own = name.rpartition(".")
        smaller.get_submodule(home)._buffers[own] = value
    smaller.tie_weights()
    smaller.set_attn_implementation(model.config._attn_implementation)
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for name, is_trained in _renumbered(trained, stack, kept).items():
        smaller.get_parameter(name).requires_grad_(is_trained)
    smaller.generation_config = copy.deepcopy(model.generation_config)
    return smaller.eval()


def _renumbered(values: Mapping[str, _Value], stack: str, kept: Sequence[int]) -> dict[str, _Value]:
    """The values by name, without those of layers that went, by their new names."""
    new = {old: index for index, old in enumerate(kept)}
    renumbered: dict[str, _Value] = {}
    for name, value in values.items():
        if not name.startswith(f"{stack}."):
            renumbered[name] = value
            continue
        number, _, own = name.removeprefix(f"{stack}.").partition(".")
        if int(number) in new:
            renumbered[f"{stack}.{new[int(number)]}.{own}"] = value
    return renumbered


def _filtered(config: Mapping[str, Any], size: int, kept: Sequence[int]) -> dict[str, Any]:
    """The configuration with what its lists say of the layers that are kept, such as each layer's kind.

    Lists of another kind may be as long: several tokens that end a text, factors of a rotary embedding.
    """
    filtered: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and not str(name).startswith("rope_"):
            filtered[name] = _filtered(value, size, kept)
        elif isinstance(value, (list, tuple)) and len(value) == size and not str(name).endswith("_token_id"):
            filtered[name] = [value[index] for index in kept]
        else:
            filtered[name] = value
    return filtered


def _leaves(config: Mapping[str, Any]) -> Iterator[Any]:
    for value in config.values():
        if isinstance(value, Mapping):
            yield from _leaves(value)
        elif isinstance(value, int):
            yield value


# Forwards of the model


def _loss(model: PreTrainedModel, batches: Iterable[Mapping[str, Any]]) -> float:
    """Mean over all predictions that count."""
    total, number = 0.0, 0
    for batch in batches:
        logits = _logits(model, batch)
        counted = counted_predictions(batch, logits)
        following = batch["labels"] if "labels" in batch else batch["input_ids"]
        following = torch.roll(following, -1, dims=1).to(logits.device)
        for of_chunk, labels in zip(
            torch.split(logits[counted], TOKENS_PER_CHUNK),
            torch.split(following[counted], TOKENS_PER_CHUNK),
            strict=True,
        ):
            total += float(functional.cross_entropy(of_chunk.float(), labels, reduction="sum"))
        number += int(counted.count_nonzero())
    if number == 0:
        raise ValueError("there is nothing to predict in the batches: give some, such as of the training text")
    return total / number


def _logits(model: PreTrainedModel, batch: Mapping[str, Any]) -> Tensor:
    arguments = {
        name: value.to(model.device) if isinstance(value, Tensor) else value
        for name, value in batch.items()
        if name != "labels"
    }
    logits: Tensor = model(**arguments, use_cache=False).logits
    return logits
