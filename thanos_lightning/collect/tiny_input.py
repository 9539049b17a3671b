"""Runs a LightningModule on a small input, to see what its layers do to each other."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from transformers import PreTrainedModel

from thanos_lightning.collect.calibration_set import evaluation_mode
from thanos_lightning.layers.wrappers import run_eagerly
from thanos_lightning.report.progress import hidden, open_phase

_TOKENS = 8


@contextmanager
def tiny_run(trainer: Trainer, module: LightningModule) -> Iterator[Callable[[], Any]]:
    """Yield a function that runs the module in evaluation mode, on always the same input, the same on all ranks.

    The input is the module's `example_input_array` if it has one. Else it is a few token ids, or one image, for the
    transformers model in it: through the module's forward if that takes any keyword, else through the model's.

    Raises:
        ValueError: If there is neither, or the module can't run on it.
    """
    called, args, kwargs = _inputs(module)
    args, kwargs = trainer.strategy.broadcast((args, kwargs))  # an example may be drawn at random
    args, kwargs = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input((args, kwargs)))

    def run() -> Any:
        with trainer.precision_plugin.forward_context():
            output = called(*args, **kwargs)
        phase.advance()
        return output

    with (
        ExitStack() as undone,
        evaluation_mode(module),
        torch.random.fork_rng(devices=[module.device] if module.device.type == "cuda" else []),
        hidden(trainer.progress_bar_callback is None),
        open_phase("Looking for feed-forward blocks", unit="forwards") as phase,
    ):
        undone.callback(run_eagerly(module))  # graphs call no new hooks
        try:
            with torch.no_grad():
                run()
        except Exception as error:  # whatever a model raises on an input that it doesn't take
            raise ValueError(
                f"{type(module).__name__} can't be run on a small input, by which its feed-forward blocks are "
                f"found ({type(error).__name__}: {str(error).partition(chr(10))[0]}): set its "
                "example_input_array to a small input of forward"
            ) from error
        yield run


def _inputs(module: LightningModule) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    example = module.example_input_array
    if isinstance(example, Mapping):
        return module, (), {name: _drawn(value) for name, value in example.items()}
    if example is not None:
        return module, tuple(map(_drawn, example if isinstance(example, (tuple, list)) else (example,))), {}
    models = [part for part in module.modules() if isinstance(part, PreTrainedModel)]
    # a teacher may stand beside the model that is trained
    model = max(models, key=lambda part: any(p.requires_grad for p in part.parameters()), default=None)
    if model is None or model.main_input_name not in ("input_ids", "pixel_values"):
        raise ValueError(
            f"the feed-forward blocks of {type(module).__name__} are found by running it on a small input, and it has "
            "none: set its example_input_array to a small input of forward"
        )
    kinds = {parameter.kind for parameter in inspect.signature(module.forward).parameters.values()}
    takes_any = inspect.Parameter.VAR_KEYWORD in kinds and type(module).forward is not LightningModule.forward
    return module if takes_any else model, (), _of_transformers(model)


def _drawn(example: Any) -> Any:
    """Draw random numbers of an example of zeros, Lightning's idiom for a shape: zeros hide what a layer does."""
    if not isinstance(example, Tensor) or not example.is_floating_point() or example.any():
        return example
    generator = torch.Generator().manual_seed(0)
    return torch.randn(example.shape, generator=generator, device="cpu").to(example)


def _of_transformers(model: PreTrainedModel) -> dict[str, Tensor]:
    config: Any = model.config
    if model.main_input_name == "pixel_values":
        size = getattr(config, "image_size", None) or 224
        sides = (size, size) if isinstance(size, int) else tuple(size)
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randn(1, config.num_channels, *sides, generator=generator, device="cpu")
        return {"pixel_values": pixels.to(model.dtype)}
    vocabulary = config.get_text_config().vocab_size
    # The first tokens may be padding, whose embeddings may be zero and hide what a layer does
    tokens = torch.arange(vocabulary // 2, vocabulary // 2 + _TOKENS, device="cpu").remainder(vocabulary).unsqueeze(0)
    return {"input_ids": tokens, **({"decoder_input_ids": tokens} if config.is_encoder_decoder else {})}
