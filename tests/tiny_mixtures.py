"""Tiny mixtures of experts with random weights: a model of each family whose experts transformers fuses."""

from __future__ import annotations

from typing import Any

import torch
import transformers as t
from toy import VOCABULARY

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": 1,
}
OWN_WIDTH: dict[str, Any] = {**SIZES, "moe_intermediate_size": 12}  # of the experts
DEEPSEEK: dict[str, Any] = {
    **OWN_WIDTH,
    "num_key_value_heads": 2,
    "first_k_dense_replace": 0,
    "kv_lora_rank": 8,
    "q_lora_rank": None,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
}
# family -> class of its configuration, what that calls the number of experts, and what it has
MIXTURES: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "mixtral": (t.MixtralConfig, "num_local_experts", SIZES),
    "qwen2": (t.Qwen2MoeConfig, "num_experts", {**OWN_WIDTH, "shared_expert_intermediate_size": 12}),
    "qwen3": (t.Qwen3MoeConfig, "num_experts", {**OWN_WIDTH, "head_dim": 8, "norm_topk_prob": True}),
    "olmoe": (t.OlmoeConfig, "num_experts", {**SIZES, "pad_token_id": 0}),
    "deepseek 2": (t.DeepseekV2Config, "n_routed_experts", DEEPSEEK),
    "deepseek 3": (t.DeepseekV3Config, "n_routed_experts", DEEPSEEK),
    "deepseek 3, in groups": (t.DeepseekV3Config, "n_routed_experts", {**DEEPSEEK, "n_group": 2}),
    "gpt-oss": (
        t.GptOssConfig,
        "num_local_experts",
        {**SIZES, "head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ),
    "llama 4": (
        t.Llama4TextConfig,
        "num_local_experts",
        {**SIZES, "head_dim": 8, "intermediate_size_mlp": 24, "num_experts_per_tok": 1}
        | {"interleave_moe_layer_step": 1, "attention_chunk_size": 32},
    ),
}


def tiny_mixture(family: str = "mixtral", number: int = 8, seed: int = 0, **config: Any) -> Any:
    """A model of the family with so many experts, all of whose parameters and biases of choice are random."""
    configuration, name, own = MIXTURES[family]
    torch.manual_seed(seed)
    model = t.AutoModelForCausalLM.from_config(configuration(**{**own, name: number, **config}))
    for parameter in model.parameters():
        if parameter.ndim > 1 or len(parameter) == number:
            torch.nn.init.normal_(parameter, std=0.2)
    for buffer in model.buffers():
        if buffer.shape == (number,):
            buffer.normal_(std=0.1)
    return model
