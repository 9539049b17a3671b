"""Runs a LightningModule on a small input, to see what its layers do to each other."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from transformers import PreTrainedModel

_TOKENS = 8


@contextmanager
def tiny_run(module: LightningModule) -> Iterator[Callable[[], Any]]:
    """Yield a function that runs the module in evaluation mode, on always the same input.

    The input is the module's `example_input_array` if it has one. Else it is a few token ids, or one image, for the
    transformers model in it: through the module's forward if that takes any keyword, else through the model's.

    Raises:
        ValueError: If there is neither.
    """
    inputs = _inputs(module)
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.random.fork_rng():
            yield inputs
    finally:
        for part, mode in modes:
            part.training = mode


def _inputs(module: LightningModule) -> Callable[[], Any]:
    example = module.example_input_array
    if isinstance(example, Mapping):
        return partial(module, **{name: _moved(value, module) for name, value in example.items()})
    if example is not None:
        values = example if isinstance(example, (tuple, list)) else (example,)
        return partial(module, *(_moved(value, module) for value in values))
    models = [part for part in module.modules() if isinstance(part, PreTrainedModel)]
    # a teacher may stand beside the model that is trained
    model = max(models, key=lambda part: any(p.requires_grad for p in part.parameters()), default=None)
    if model is None:
        raise ValueError(
            f"the feed-forward blocks of {type(module).__name__} are found by running it on a small input, and it has "
            "none: set its example_input_array, as a sequence of some tokens"
        )
    kinds = {parameter.kind for parameter in inspect.signature(module.forward).parameters.values()}
    takes_any = inspect.Parameter.VAR_KEYWORD in kinds and type(module).forward is not LightningModule.forward
    return partial(module if takes_any else model, **_of_transformers(model, module.device))


def _of_transformers(model: PreTrainedModel, device: torch.device) -> dict[str, Tensor]:
    config: Any = model.config
    if model.main_input_name == "pixel_values":
        side = config.image_size if isinstance(config.image_size, int) else max(config.image_size)
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randn(1, config.num_channels, side, side, generator=generator, device="cpu")
        return {"pixel_values": pixels.to(device, model.dtype)}
    vocabulary = config.get_text_config().vocab_size
    # The first tokens may be padding, whose embeddings may be zero and hide what a layer does
    tokens = torch.arange(vocabulary // 2, vocabulary // 2 + _TOKENS, device=device).remainder(vocabulary).unsqueeze(0)
    decoded = {"decoder_input_ids": tokens} if config.is_encoder_decoder else {}
    return {model.main_input_name: tokens, **decoded}


def _moved(value: Any, module: LightningModule) -> Any:
    return value.to(module.device) if isinstance(value, Tensor) else value
