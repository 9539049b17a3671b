"""Puts LoRA adapters of peft on a loaded model."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from thanos_lightning.sharding.adapters import initialise_partitioned
from thanos_lightning.training.adapters import mask_adapters


def add_lora(model: PreTrainedModel, arguments: Mapping[str, Any]) -> None:
    """Put a masked adapter on a loaded model, in place, and freeze all but the adapter.

    `arguments` are those of peft's LoraConfig. Raises ValueError if peft refuses them, or the model has no such layers.
    """
    if importlib.util.find_spec("peft") is None:
        raise ImportError("lora needs peft: pip install 'thanos-lightning[lora]'")
    from peft import LoraConfig, inject_adapter_in_model

    try:
        inject_adapter_in_model(LoraConfig(**arguments), model)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"lora is {dict(arguments)}, which peft refuses ({str(error).splitlines()[0]}): give arguments of its "
            "LoraConfig, such as {r: 16, lora_alpha: 32, target_modules: all-linear}"
        ) from error
    mask_adapters(model)
    initialise_partitioned(model, arguments.get("init_lora_weights", True))
