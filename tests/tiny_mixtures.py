"""Tiny mixtures of experts with random weights: a model of each family whose experts are fused."""

from __future__ import annotations

from collections.abc import Callable
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
}
NARROW: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 12}
DEEPSEEK: dict[str, Any] = {
    **SIZES,
    **NARROW,
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

MIXTURES: dict[str, Callable[..., t.PreTrainedModel]] = {
    "mixtral": lambda number: t.MixtralForCausalLM(t.MixtralConfig(**SIZES, num_local_experts=number)),
    "qwen2": lambda number: t.Qwen2MoeForCausalLM(
        t.Qwen2MoeConfig(**SIZES, **NARROW, num_experts=number, shared_expert_intermediate_size=12)
    ),
    "qwen3": lambda number: t.Qwen3MoeForCausalLM(
        t.Qwen3MoeConfig(**SIZES, **NARROW, head_dim=8, num_experts=number, norm_topk_prob=True)
    ),
    "olmoe": lambda number: t.OlmoeForCausalLM(
        t.OlmoeConfig(**SIZES, num_experts=number, num_experts_per_tok=2, pad_token_id=0, eos_token_id=1)
    ),
    "deepseek 2": lambda number: t.DeepseekV2ForCausalLM(t.DeepseekV2Config(**DEEPSEEK, n_routed_experts=number)),
    "deepseek 3": lambda number: t.DeepseekV3ForCausalLM(t.DeepseekV3Config(**DEEPSEEK, n_routed_experts=number)),
    "deepseek 3, in groups": lambda number: t.DeepseekV3ForCausalLM(
        t.DeepseekV3Config(**{**DEEPSEEK, "n_group": 2}, n_routed_experts=number)
    ),
    "gpt-oss": lambda number: t.GptOssForCausalLM(
        t.GptOssConfig(**SIZES, head_dim=8, num_local_experts=number, num_experts_per_tok=2)
    ),
    "llama 4": lambda number: t.Llama4ForCausalLM(
        t.Llama4TextConfig(
            **SIZES,
            head_dim=8,
            intermediate_size_mlp=24,
            num_local_experts=number,
            num_experts_per_tok=1,
            interleave_moe_layer_step=1,
            attention_chunk_size=32,
        )
    ),
}


def tiny_mixture(family: str = "mixtral", number: int = 8, seed: int = 0) -> t.PreTrainedModel:
    """A model of the family with so many experts, all of whose parameters and biases of choice are random."""
    torch.manual_seed(seed)
    model = MIXTURES[family](number)
    for parameter in model.parameters():
        if parameter.ndim > 1 or len(parameter) == number:
            torch.nn.init.normal_(parameter, std=0.2)
    for buffer in model.buffers():
        if buffer.shape == (number,):
            buffer.normal_(std=0.1)
    return model
