"""Where the matrices of fused experts lie in the files of a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import transformers
from transformers.core_model_loading import revert_weight_conversion

from thanos_lightning.checkpoints.lazy import whole_of
from thanos_lightning.models.targets import layer_of, prunable_modules


def stored_names(model: transformers.PreTrainedModel, beside: Iterable[str] = ()) -> dict[str, str]:
    """Map the parameter name of each matrix of fused experts, with its place, to its name in the files.

    `beside` has names of parameters or buffers that are written as a whole, but perhaps under others, too.

    transformers writes the matrices of most models one by one, under names such as "experts.7.up_proj.weight", and
    those of gpt-oss and Llama 4 as they are. It is asked what it makes of tensors whose rows are numbered.

    Raises:
        ValueError: If a matrix is not in the files as a whole.
    """
    layers = [layer_of(name, module) for name, module in prunable_modules(model).items()]
    layers = [layer for layer in layers if layer.expert is not None]
    numbers: dict[str, torch.Tensor] = {}
    count = 0
    for layer in layers:
        name = whole_of(layer.parameter_name)
        if name not in numbers:
            shape = (*layer.parameter.shape[:2], 1)
            numbers[name] = torch.arange(count, count + shape[0] * shape[1]).view(shape)
            count += numbers[name].numel()
    state = model.state_dict()
    for name in beside:
        numbers[name] = torch.arange(count, count + len(state[name]))
        count += len(state[name])
    stored = revert_weight_conversion(model, dict(numbers)) if numbers else {}
    places = {_key(rows): name for name, rows in stored.items()}
    found = {name: places[_key(numbers[name])] for name in beside}
    for layer in layers:
        name = layer.parameter_name
        whole = numbers[whole_of(name)]
        if (alone := places.get(_key(layer.own(whole)))) is not None:
            found[name] = alone
        elif (fused := places.get(_key(whole))) is not None:
            found[name] = name.replace(whole_of(name), fused)
        else:
            raise ValueError(
                f"{type(model).__name__} is saved in a form in which {layer.name} is no tensor of its own: add the "
                "experts to ignore, or train a model whose experts are saved one by one"
            )
    return found


def _key(rows: torch.Tensor) -> tuple[int, ...]:
    """What tells a tensor of numbered rows from others; each row is in order after the one before it."""
    flat = rows.flatten()
    in_order = bool((flat.diff() == 1).all())
    return (int(flat[0]), *rows.shape) if in_order else (-1,)
