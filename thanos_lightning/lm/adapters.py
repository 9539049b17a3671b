"""Puts LoRA adapters of peft on a loaded model."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from thanos_lightning.sharding.adapters import initialise_partitioned
from thanos_lightning.training.adapters import mask_adapters


def add_lora(model: PreTrainedModel, arguments: Mapping[str, Any]) -> None:
    """Put a masked adapter on a model, in place, and freeze all but the adapter.

    Args:
        model: A loaded model.
        arguments: Of peft's LoraConfig.

    Raises:
        ImportError: If peft is missing.
        ValueError: If peft refuses the arguments, or the model has no such layers.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=1))
        >>> add_lora(model, {"r": 2, "target_modules": ["up_proj"]})
        >>> sorted(name for name, parameter in model.named_parameters() if parameter.requires_grad)[0]
        'model.layers.0.mlp.up_proj.lora_A.default.weight'
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
