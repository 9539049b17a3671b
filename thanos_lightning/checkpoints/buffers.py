"""Buffers that no checkpoint holds, such as rotary frequencies, as transformers makes them when it loads a model."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from thanos_lightning.models.stack import class_of


@torch.inference_mode(False)  # a validation's mode would stay with the tensors
@torch.no_grad()
def uncast_buffers(module: nn.Module) -> None:
    """Give the buffers that no checkpoint holds the dtype and the values that they have in a loaded model.

    A precision such as "bf16-true" casts a model's buffers with its parameters, and so does `to(dtype)`. But
    transformers makes some buffers in float32 whatever the parameters are, such as rotary frequencies. So a loaded
    model would compute something else than the model that was trained.

    Only buffers of Hugging Face models change, and only where their dtype is not that of a loaded model.
    """
    inside: set[nn.Module] = set()
    for model in module.modules():
        if isinstance(model, PreTrainedModel) and model not in inside:
            inside.update(model.modules())
            _uncast(model)


def _uncast(model: PreTrainedModel) -> None:
    dtype = next((one.dtype for one in model.parameters() if one.is_floating_point()), torch.float32)
    buffers = {name: (part, own) for name, part, own in _unsaved(model)}
    if all(own.dtype == dtype == torch.float32 for _, own in buffers.values()):
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # as transformers does to build a model that it loads
    try:
        with torch.device("meta"):
            loaded = class_of(model)(type(model.config).from_dict(model.config.to_dict()))
    finally:
        torch.set_default_dtype(before)
    for name, part, made in list(_unsaved(loaded)):
        owner, own = buffers.get(name, (None, made))
        if owner is None or own.shape != made.shape or own.dtype == made.dtype:
            continue
        path, _, last = name.rpartition(".")
        part._buffers[last] = value = torch.zeros_like(made, device="cpu")
        _innermost(loaded, path)._init_weights(part)
        owner._buffers[last] = value.to(own.device)


def _unsaved(model: nn.Module) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Name, module and value of each floating point buffer that is not in the state dict."""
    for path, part in model.named_modules():
        for last in part._non_persistent_buffers_set:
            value = part._buffers.get(last)
            if value is not None and value.is_floating_point():
                yield f"{path}.{last}" if path else last, part, value


def _innermost(model: PreTrainedModel, path: str) -> PreTrainedModel:
    """The innermost model with a module, which is the model that initialises it."""
    while path:
        part = model.get_submodule(path)
        if isinstance(part, PreTrainedModel):
            return part
        path = path.rpartition(".")[0]
    return model
