"""Drops whole decoder layers, those that a model's loss misses least: a shallower dense model."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
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
from thanos_lightning.models.targets import refuse_wrapped
from thanos_lightning.report.progress import Phase, open_phase

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
            say which predictions count. Each time a layer goes, they are run once for each layer that is left, from
            there on: some thousand tokens are enough. What each layer gets for one batch is held in memory.
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
    refuse_wrapped(model)
    batches = list(batches)
    stack = _stack(model)
    layers = list(model.get_submodule(stack).children())
    if not 1 <= number < len(layers):
        raise ValueError(f"{number} of the {len(layers)} layers can't be dropped: give 1 to {len(layers) - 1}")
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        gone: list[int] = []
        losses: list[float] = []
        rounds = [len(layers) - before for before in range(number)]
        with open_phase("Searching for layers", sum(rounds) * len(batches), "forwards") as phase:
            for left in rounds:
                tried = [index for index in range(len(layers)) if index not in gone]
                tried = [index for index in tried if _configuration(model, stack, (*gone, index)) is not None]
                if not tried:
                    raise ValueError(
                        f"no configuration of {architecture_of(model)} describes it with {left - 1} of its "
                        f"{len(layers)} layers: drop {len(gone) or 'none'}"
                    )
                phase.advance((left - len(tried)) * len(batches))
                before, found = _losses_without_each(model, batches, layers, gone, tried, phase)
                if not gone:
                    losses.append(before)
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


def _losses_without_each(
    model: PreTrainedModel,
    batches: Sequence[Mapping[str, Any]],
    layers: Sequence[nn.Module],
    gone: Collection[int],
    tried: Sequence[int],
    phase: Phase,
) -> tuple[float, dict[int, float]]:
    """Mean loss of the model without the layers that are gone, and that of each try: without one more.

    Raises:
        ValueError: If the first one is not finite, before any try, or there is nothing to predict.
    """
    before, number = 0.0, 0
    without = dict.fromkeys(tried, 0.0)
    for batch in batches:
        with _passing_on([layers[index] for index in gone]), _seeing(layers) as seen:
            loss, counted = _loss(model, batch)
        if not math.isfinite(loss):
            raise ValueError(f"the loss on the batches is {loss}: load the model in another dtype")
        before, number = before + loss, number + counted
        if not counted:
            phase.advance(len(tried))
            continue
        for index in tried:
            with _beginning_after(index, layers, gone, seen):
                without[index] += _loss(model, batch)[0]
            phase.advance()
    if number == 0:
        raise ValueError("there is nothing to predict in the batches: give some, such as of the training text")
    means = {index: loss / number for index, loss in without.items()}
    return before / number, {index: mean if math.isfinite(mean) else math.inf for index, mean in means.items()}


@contextmanager
def _passing_on(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Make layers give what they get."""

    def replace(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return _in_place_of(output, _given(args, kwargs))

    handles = [layer.register_forward_hook(replace, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _seeing(layers: Sequence[nn.Module]) -> Iterator[dict[nn.Module, tuple[Tensor, Any]]]:
    """Note what each layer gets, and its output."""
    seen: dict[nn.Module, tuple[Tensor, Any]] = {}

    def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        seen[layer] = _given(args, kwargs), output

    handles = [layer.register_forward_hook(note, with_kwargs=True) for layer in layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _beginning_after(
    first: int, layers: Sequence[nn.Module], gone: Collection[int], seen: Mapping[nn.Module, tuple[Tensor, Any]]
) -> Iterator[None]:
    """Compute no layer up to `first`, nor those that are gone: the next ones get what `first` got, as was seen."""
    skipped = [layer for index, layer in enumerate(layers) if index <= first or index in gone]
    own = [layer.__dict__.get("forward") for layer in skipped]
    for layer in skipped:
        given, output = seen[layer]
        layer.forward = partial(_stand_in, output, given if layer is layers[first] else None)
    try:
        yield
    finally:
        for layer, forward in zip(skipped, own, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward


def _stand_in(output: Any, given: Tensor | None, *args: Any, **kwargs: Any) -> Any:
    return _in_place_of(output, _given(args, kwargs) if given is None else given)


def _given(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()))


def _in_place_of(output: Any, hidden: Any) -> Any:
    """Hidden states in the form of a layer's output."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


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


def _loss(model: PreTrainedModel, batch: Mapping[str, Any]) -> tuple[float, int]:
    """The sum over all predictions that count, and their number."""
    logits = _logits(model, batch)
    counted = counted_predictions(batch, logits)
    following = batch["labels"] if "labels" in batch else batch["input_ids"]
    following = torch.roll(following, -1, dims=1).to(logits.device)
    chunks = zip(
        torch.split(logits[counted], TOKENS_PER_CHUNK), torch.split(following[counted], TOKENS_PER_CHUNK), strict=True
    )
    losses = [functional.cross_entropy(of_chunk.float(), labels, reduction="sum") for of_chunk, labels in chunks]
    return float(sum(losses)), int(counted.count_nonzero())


def _logits(model: PreTrainedModel, batch: Mapping[str, Any]) -> Tensor:
    arguments = {
        name: value.to(model.device) if isinstance(value, Tensor) else value
        for name, value in batch.items()
        if name != "labels"
    }
    logits: Tensor = model(**arguments, use_cache=False).logits
    return logits
