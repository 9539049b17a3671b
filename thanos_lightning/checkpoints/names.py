"""Under which names the files of a Hugging Face folder have a model's parameters."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers.core_model_loading import revert_weight_conversion

from thanos_lightning.checkpoints.adapters import plain_name
from thanos_lightning.checkpoints.format import exported_model
from thanos_lightning.checkpoints.huggingface import build_model, near, parameter_aliases
from thanos_lightning.checkpoints.lazy import part_of, whole_of
from thanos_lightning.layers.targets import Layer
from thanos_lightning.layers.wrappers import class_of
from thanos_lightning.ranks.view import whole_shape


def stored_names(model: transformers.PreTrainedModel, names: Collection[str]) -> dict[str, list[str]]:
    """Map names of parameters, of experts with the place of a matrix, to the names that the files may have them under.

    Tied parameters are in the files once, under one of the names. transformers renames what it saves: the head of
    GPT-NeoX is "embed_out.weight" there. The matrices of most models' experts it writes one by one, under names such as
    "experts.7.up_proj.weight", and those of gpt-oss and Llama 4 as they are. So transformers is asked what it makes of
    tensors whose rows are numbered. Raises ValueError if a parameter, or a matrix, is not in the files as a whole.
    """
    if not names:
        return {}
    aliases = parameter_aliases(model)
    of = {name: aliases.get(whole_of(name), [whole_of(name)]) for name in names}
    wholes = {alias for group in of.values() for alias in group}
    beside = {near(name) for name in wholes}
    numbers: dict[str, torch.Tensor] = {}
    count = 0
    for name, tensor in model.state_dict().items():
        # What is beside a parameter may be written into one tensor with it
        if name in wholes or (near(name) in beside and 0 < tensor.ndim < 3):
            shape = (*tensor.shape[:-1], 1) if tensor.ndim > 1 else tuple(tensor.shape)
            numbers[name] = torch.arange(count, count + torch.Size(shape).numel()).view(shape)
            count += numbers[name].numel()
    try:
        places = {_key(rows): name for name, rows in revert_weight_conversion(model, dict(numbers)).items()}
    except Exception as error:  # of what a family has registered there
        raise ValueError(
            f"transformers {transformers.__version__} can't save {type(model).__name__} ({type(error).__name__}: "
            f"{error}): train a model that save_pretrained can write"
        ) from error
    stored = {}
    for name, group in of.items():
        wholes_stored = [places[key] for alias in group if (key := _key(numbers[alias])) in places]
        whole = whole_of(name)
        if whole != name and (alone := places.get(_key(part_of(numbers[whole], name)))) is not None:
            stored[name] = [alone]
        elif wholes_stored:
            stored[name] = [name.replace(whole, place) for place in wholes_stored]
        else:
            raise ValueError(
                f"{type(model).__name__} is saved in a form in which {name} is no tensor of its own: add such layers "
                "to ignore, or train a model whose layers are saved one by one"
            )
    return stored


def why_not_exported(module: nn.Module, layers: Mapping[str, Layer]) -> str | None:
    """Why an export would refuse a model in which these layers are pruned, by what is known before the training.

    None if nothing is known against it, and if none of the layers is in a Hugging Face model, since nothing would be
    exported. No weight is read, and of layers whose names differ in numbers alone only the first is looked at.
    """
    prefix, model = exported_model(module, layers) or ("", None)
    if model is None or not any(name.startswith(prefix) for name in layers):
        return None
    architecture = class_of(model).__name__
    try:
        built = build_model(architecture, model.config.to_dict(), Path("the LightningModule"))
        trained = {name: whole_shape(value) for name, value in model.state_dict(keep_vars=True).items()}
        shapes = {name: tuple(value.shape) for name, value in built.state_dict().items()}
        if not any(".lora_" in name for name in trained) and trained != shapes:
            name = next(name for name in {**trained, **shapes} if trained.get(name) != shapes.get(name))
            return (
                f"{prefix}{name} has the shape {trained.get(name)}, and {shapes.get(name)} in the {architecture} "
                "that its configuration describes: change the configuration with the model"
            )
        kinds: dict[str, str] = {}
        for name, layer in layers.items():
            if name.startswith(prefix):
                kinds.setdefault(re.sub(r"\d+", "#", name), plain_name(layer.parameter_name.removeprefix(prefix)))
        stored_names(built, [*kinds.values()])
    except ValueError as error:
        return str(error)
    return None


def _key(rows: torch.Tensor) -> tuple[int, ...]:
    """What tells a tensor of numbered rows from others; each row is in order after the one before it."""
    flat = rows.flatten()
    in_order = bool((flat.diff() == 1).all())
    return (int(flat[0]), *rows.shape) if in_order else (-1,)
