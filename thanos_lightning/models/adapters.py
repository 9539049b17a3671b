"""Layers that peft has put an adapter on, and what such an adapter may be where zeros have to stay."""

from __future__ import annotations

import sys
from abc import abstractmethod
from typing import NamedTuple

from torch import nn


class LowRank(NamedTuple):
    """A low-rank matrix that is added to a layer's weight where the weight is not 0: scale · up · down."""

    name: str  # of the adapter in peft, such as "default"
    down: nn.Linear  # holds lora_A: (rank, in_features)
    up: nn.Linear  # holds lora_B: (out_features, rank)
    scale: float


class MaskedAdapter:
    """The part of a layer with masked adapters that can be read without peft."""

    @abstractmethod
    def low_ranks(self) -> list[LowRank]:
        """The active adapters; none where they are merged or disabled."""

    @property
    @abstractmethod
    def is_plain(self) -> bool:
        """Whether adapters are products of two matrices and no more, and the layer multiplies and does no more."""


def tuner_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that peft has put in the place of others, by name."""
    if "peft" not in sys.modules:  # otherwise no layer can be of it
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}  # type: ignore[misc]


def saved_modules(model: nn.Module) -> dict[str, list[str]]:
    """Modules of which peft trains a whole copy (modules_to_save), by name with a dot, and the active copies."""
    return {
        f"{name}.": list(module.active_adapters)
        for name, module in model.named_modules()
        if "peft" in sys.modules and hasattr(module, "modules_to_save") and hasattr(module, "original_module")
    }


def base_of(module: nn.Module) -> nn.Module:
    """The layer that an adapter is on, or the module itself if it has none."""
    base = getattr(module, "get_base_layer", None)
    return module if base is None else base()
