"""Takes channels that are zero out of a model: a smaller dense model that computes the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor

from thanos_lightning.checkpoints.huggingface import build_model
from thanos_lightning.sharding.masks import LayerMask
from thanos_lightning.solver import Channels


def channel_masks(masks: Mapping[str, LayerMask]) -> dict[str, LayerMask]:
    """Those of the masks that are of channels."""
    return {name: mask for name, mask in masks.items() if isinstance(mask.pattern, Channels)}


def shrink(
    model: transformers.PreTrainedModel, masks: Mapping[str, LayerMask], path: Path
) -> transformers.PreTrainedModel:
    """Make a model without the rows and columns that the masks prune as a whole. It shares the other tensors.

    The configuration says how wide feed-forward blocks are. Which entry of it does is found by trying: the model that
    is built from the changed configuration has to have the shapes that are left.

    Args:
        model: With its weights, of which all that the masks prune are zero.
        masks: Parameter name -> mask of channels, at least one.
        path: Of the checkpoint, for messages.

    Raises:
        ValueError: If the configuration has no such entry.
    """
    state = dict(model.state_dict())
    for name, mask in masks.items():
        state[name] = _without(state[name], mask)
    before, after = _widths(masks)
    shapes = {name: value.shape for name, value in state.items()}
    config = model.config.to_dict()
    for entry in _entries(config, before):
        changed = _changed(config, entry, after)
        smaller = build_model(type(model).__name__, changed, path)
        if {name: value.shape for name, value in smaller.state_dict().items()} == shapes:
            smaller.load_state_dict(state, assign=True)
            smaller.tie_weights()
            smaller.generation_config = model.generation_config
            return smaller
    raise ValueError(
        f"the configuration of {type(model).__name__} has no entry that makes feed-forward blocks {after} channels "
        f"wide instead of {before}: export it with --keep-shape, which leaves the zeros"
    )


def _widths(masks: Mapping[str, LayerMask]) -> tuple[int, int]:
    """How many channels blocks have, and how many are left: what the narrowest dimension that shrinks tells."""
    pairs = [
        (size, kept)
        for mask in masks.values()
        for size, kept in zip(mask.shape, _kept(mask), strict=True)
        if kept < size
    ]
    return min(pairs)


def _kept(mask: LayerMask) -> tuple[int, int]:
    keep = mask.keep
    return int(keep.any(1).count_nonzero()), int(keep.any(0).count_nonzero())


def shrunk_shape(mask: LayerMask) -> tuple[int, ...]:
    """The shape of a parameter without what its mask prunes as a whole, as a matrix that the model stores."""
    rows, cols = _kept(mask)
    return (cols, rows) if mask.transposed else (rows, cols)


def _without(value: Tensor, mask: LayerMask) -> Tensor:
    keep = mask.keep
    rows, cols = keep.any(1), keep.any(0)
    if value.ndim == 1:  # a bias is a matrix of one column
        return value[rows]
    return value[cols][:, rows].contiguous() if mask.transposed else value[rows][:, cols].contiguous()


def _entries(config: Mapping[str, Any], width: int) -> Iterator[tuple[str, ...]]:
    """Entries that are the width, or that could be: GPT-2's n_inner is None where it is four times another."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from ((name, *inner) for inner in _entries(value, width))
        elif (value == width and not isinstance(value, bool)) or (value is None and "inner" in name):
            yield (name,)


def _changed(config: Mapping[str, Any], entry: tuple[str, ...], value: int) -> dict[str, Any]:
    first, *inner = entry
    return {**config, first: _changed(config[first], tuple(inner), value) if inner else value}
