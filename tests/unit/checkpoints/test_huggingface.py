"""Models that are built from the configuration of another."""

from pathlib import Path

import pytest
from toy import tiny_llama
from transformers import AutoConfig

from thanos_lightning.checkpoints.huggingface import build_model

KERNEL = "owner/kernel"


@pytest.mark.parametrize("as_object", [False, True])
def test_a_kernel_that_a_configuration_names_is_not_used(tmp_path: Path, as_object: bool) -> None:
    """transformers would download it and run its code."""
    content = {**tiny_llama().config.to_dict(), "_attn_implementation": KERNEL, "attn_implementation": KERNEL}
    config = AutoConfig.for_model(**content) if as_object else content
    if as_object:
        assert config._attn_implementation == KERNEL
    assert build_model("LlamaForCausalLM", config, tmp_path).config._attn_implementation == "eager"
