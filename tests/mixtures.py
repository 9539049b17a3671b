"""Tiny models with experts of every family whose experts transformers keeps in one parameter."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

_SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "num_experts_per_tok": 2, "eos_token_id": 0,
    "pad_token_id": None, "bos_token_id": None,
}  # fmt: skip
_LATENT = {
    "num_key_value_heads": 4, "n_routed_experts": 4, "moe_intermediate_size": 24, "first_k_dense_replace": 1,
    "kv_lora_rank": 16, "q_lora_rank": None, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip

# name -> class, and what its configuration has beside the common sizes
_MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "mixtral": (transformers.MixtralForCausalLM, transformers.MixtralConfig, {"num_local_experts": 4}),
    "qwen2-moe": (
        transformers.Qwen2MoeForCausalLM,
        transformers.Qwen2MoeConfig,
        {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24},
    ),
    "qwen3-moe": (
        transformers.Qwen3MoeForCausalLM,
        transformers.Qwen3MoeConfig,
        {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 8},
    ),
    "olmoe": (transformers.OlmoeForCausalLM, transformers.OlmoeConfig, {"num_experts": 4}),
    "deepseek-v2": (transformers.DeepseekV2ForCausalLM, transformers.DeepseekV2Config, _LATENT),
    "deepseek-v3": (transformers.DeepseekV3ForCausalLM, transformers.DeepseekV3Config, _LATENT),
    "gpt-oss": (
        transformers.GptOssForCausalLM,
        transformers.GptOssConfig,
        {"num_local_experts": 4, "head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ),
    "llama4": (
        transformers.Llama4ForCausalLM,
        transformers.Llama4TextConfig,
        {
            "num_local_experts": 4, "head_dim": 8, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 1,
            "attention_chunk_size": 32, "num_experts_per_tok": 1,
        },
    ),
}  # fmt: skip
FAMILIES = tuple(_MODELS)


def tiny_mixture(family: str = "mixtral", seed: int = 0, **config: Any) -> transformers.PreTrainedModel:
    """A random model whose experts and routers are far from zero, so that each has a say."""
    kind, configuration, own = _MODELS[family]
    torch.manual_seed(seed)
    model: transformers.PreTrainedModel = kind(configuration(**{**_SIZES, **own, **config}))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 3 or name.endswith(("gate.weight", "router.weight")):
            nn.init.normal_(parameter, std=0.2)
    return model
