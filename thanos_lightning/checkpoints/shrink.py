"""Takes channels and experts that are zero out of a model: a smaller dense model that computes the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from thanos_lightning.checkpoints.huggingface import build_model
from thanos_lightning.checkpoints.lazy import LazyTensors, changed
from thanos_lightning.layers.experts import Mixture, find_mixtures, matrices_of
from thanos_lightning.layers.targets import layer_of
from thanos_lightning.layers.wrappers import class_of
from thanos_lightning.ranks.masks import LayerMask
from thanos_lightning.solver import Channels, Experts


def channel_masks(masks: Mapping[str, LayerMask]) -> dict[str, LayerMask]:
    """Those of the masks that are of channels, of which some are pruned."""
    return {name: mask for name, mask in masks.items() if isinstance(mask.pattern, Channels) and not _kept(mask).all()}


def shrink(
    model: transformers.PreTrainedModel, tensors: Mapping[str, Tensor], masks: Mapping[str, LayerMask], path: Path
) -> tuple[transformers.PreTrainedModel, LazyTensors]:
    """Make a model without the channels that the masks prune, at least one.

    `tensors` are the model's, where all weights that the masks prune are zero. `path` is the checkpoint's, for
    messages. Return the smaller model, without weights, and its tensors, each cut when it is read. Raises ValueError
    if no entry of the configuration makes the blocks so wide.
    """
    cuts = {name: partial(_without, mask=mask) for name, mask in masks.items()}
    widths = min((kept.numel(), int(kept.count_nonzero())) for kept in map(_kept, masks.values()))
    shapes = {name: value.shape for name, value in changed(model.state_dict(), cuts).items()}
    config = resized(model, shapes, widths)
    if config is None:
        raise ValueError(
            f"the configuration of {type(model).__name__} has no entry that makes feed-forward blocks {widths[1]} "
            f"channels wide instead of {widths[0]}: export it with --keep-shape, which leaves the zeros"
        )
    return _built(model, config, path), changed(tensors, cuts)


def _built(model: transformers.PreTrainedModel, config: Mapping[str, Any], path: Path) -> transformers.PreTrainedModel:
    smaller = build_model(type(model).__name__, config, path)
    if model.can_generate():
        smaller.generation_config = model.generation_config
    return smaller


def without_experts(
    model: transformers.PreTrainedModel, tensors: Mapping[str, Tensor], masks: Mapping[str, LayerMask], path: Path
) -> tuple[transformers.PreTrainedModel, LazyTensors, dict[str, LayerMask], dict[str, LayerMask]]:
    """Make a model without the experts that masks of the pattern `Experts` prune.

    `tensors` are the model's. `masks` are of all that is pruned, by parameter name with its place. `path` is the
    checkpoint's, for messages. Return the smaller model, without weights; its tensors, each cut when it is read; masks
    of the routers' parameters, of which rows went, and of the matrices of experts that stay, which have no zeros; and
    all other masks. Names are those in the smaller model. Raises ValueError if mixtures would have unequal numbers of
    experts, or the configuration can't give the number.
    """
    patterns = [mask.pattern for mask in masks.values() if isinstance(mask.pattern, Experts)]
    pattern = max(patterns, key=attrgetter("sparsity"))
    mixtures = find_mixtures(model)
    state, others = model.state_dict(), dict(masks)
    cuts: dict[str, Callable[[Tensor], Tensor]] = {}
    routers: dict[str, LayerMask] = {}
    dense: dict[str, LayerMask] = {}
    numbers = set()
    for name, mixture in mixtures.items():
        matrices = []
        for place, matrix in matrices_of(mixture.experts).items():
            layer = layer_of(f"{name}.{place}", matrix)
            matrices.append((int(place.partition(".")[0]), layer, others.pop(layer.parameter_name, None)))
        gone = {expert for expert, _, mask in matrices if mask is not None and isinstance(mask.pattern, Experts)}
        kept = [expert for expert in range(mixture.size) if expert not in gone]
        numbers.add(len(kept))
        for parameter in (f"{mixture.router_name}.{last}" for last in mixture.of_router):
            value = state[parameter]
            keep = torch.zeros(len(value), value.numel() // len(value), dtype=torch.bool)
            keep[kept] = True
            routers[parameter] = LayerMask.of(keep, pattern)
        cuts |= dict.fromkeys(_with_entries(mixture), itemgetter(kept))
        for expert, layer, mask in matrices:
            if expert in gone:
                continue
            parameter = layer.parameter_name.replace(f"[{expert}", f"[{kept.index(expert)}")
            if mask is not None:
                others[parameter] = mask
            else:
                keep = torch.ones(layer.rows, layer.cols, dtype=torch.bool)
                dense[parameter] = LayerMask.of(keep, pattern, layer.transposed)
    if len(numbers) > 1:
        raise ValueError(f"{path} has mixtures of unequal numbers of experts: export a checkpoint from after an event")
    (number,) = numbers
    config = configuration_with(model, next(iter(mixtures.values())).size - number, path)
    if config is None:
        raise ValueError(f"the configuration of {type(model).__name__} has no entry that leaves it {number} experts")
    return _built(model, config, path), changed(tensors, cuts), routers | dense, others


def configuration_with(model: transformers.PreTrainedModel, dropped: int, path: Path) -> dict[str, Any] | None:
    """The configuration of a model that lacks so many experts of each of its mixtures; None if there is none."""
    # without what a training adds, such as adapters
    whole = build_model(class_of(model).__name__, model.config.to_dict(), path)
    shapes = {name: list(value.shape) for name, value in whole.state_dict().items()}
    size = 0
    for mixture in find_mixtures(whole).values():
        size = mixture.size
        for name in _with_entries(mixture):
            shapes[name][0] -= dropped
    return resized(model, shapes, (size, size - dropped))


def _with_entries(mixture: Mixture) -> list[str]:
    """Names of all parameters and buffers with an entry for each expert."""
    return [
        *(f"{mixture.router_name}.{last}" for last in mixture.of_router),
        *(f"{mixture.name}.{last}" for last in mixture.of_experts),
    ]


def resized(
    model: transformers.PreTrainedModel, shapes: Mapping[str, Sequence[int]], sizes: tuple[int, int]
) -> dict[str, Any] | None:
    """Find the configuration of a smaller model by trying; None if there is none.

    What is tried is each entry that is the old size, or None where its name says inner, and all of them together. The
    model that is built from it has to have `shapes`, of parameters and buffers by name. `sizes` are the numbers of
    channels or experts in the model, and in the smaller one.
    """
    config = model.config.to_dict()
    entries = list(_entries(config, sizes[0]))
    wanted = {name: tuple(shape) for name, shape in shapes.items()}
    for tried in (*([entry] for entry in entries), entries):
        changed = dict(config)
        for entry in tried:
            changed = _changed(changed, entry, sizes[1])
        try:
            smaller = build_model(class_of(model).__name__, changed, Path())
        except Exception:  # another size, such as one that the number of heads has to divide
            continue
        if {name: tuple(value.shape) for name, value in smaller.state_dict().items()} == wanted:
            return changed
    return None


def shrunk_shape(mask: LayerMask) -> tuple[int, ...]:
    """The shape of a parameter without what its mask prunes, channels or rows of experts, as the model stores it."""
    sizes = list(mask.shape)
    if isinstance(mask.pattern, Experts):
        sizes[0] = int(mask.keep.any(1).count_nonzero())
    else:
        assert isinstance(mask.pattern, Channels)
        sizes[mask.pattern.dim] = int(_kept(mask).count_nonzero())
    return (sizes[1], sizes[0]) if mask.transposed else tuple(sizes)


def _kept(mask: LayerMask) -> Tensor:
    """Bool (channels,): those of which some entry is kept."""
    assert isinstance(mask.pattern, Channels)
    return mask.keep.any(1 - mask.pattern.dim)


def _without(value: Tensor, mask: LayerMask) -> Tensor:
    assert isinstance(mask.pattern, Channels)
    dim = mask.pattern.dim if value.ndim == 2 else 0  # a bias has but one
    places = _kept(mask).nonzero().squeeze(1).to(value.device)
    return value.index_select(1 - dim if mask.transposed else dim, places)


def _entries(config: Mapping[str, Any], size: int) -> Iterator[tuple[str, ...]]:
    """Entries that are the size, or that could be: GPT-2's n_inner is None where it is four times another."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from ((name, *inner) for inner in _entries(value, size))
        elif (value == size and not isinstance(value, bool)) or (value is None and "inner" in name):
            yield (name,)


def _changed(config: Mapping[str, Any], entry: tuple[str, ...], value: Any) -> dict[str, Any]:
    first, *inner = entry
    return {**config, first: _changed(config[first], tuple(inner), value) if inner else value}
