"""Models that are built from the configuration of another, and written shard by shard."""

import json
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tiny_mixtures import tiny_mixture
from torch import Tensor
from toy import tiny_llama
from transformers import AutoConfig, AutoModelForCausalLM

from thanos_lightning.checkpoints.huggingface import build_model, first_line, near, write_model
from thanos_lightning.checkpoints.lazy import LazyTensors

KERNEL = "owner/kernel"


@pytest.mark.parametrize("as_object", [False, True])
def test_a_kernel_that_a_configuration_names_is_not_used(tmp_path: Path, as_object: bool) -> None:
    """transformers would download it and run its code."""
    content = {**tiny_llama().config.to_dict(), "_attn_implementation": KERNEL, "attn_implementation": KERNEL}
    config = AutoConfig.for_model(**content) if as_object else content
    if as_object:
        assert config._attn_implementation == KERNEL
    assert build_model("LlamaForCausalLM", config, tmp_path).config._attn_implementation == "eager"


@pytest.mark.parametrize("build", [partial(tiny_llama, num_hidden_layers=6), tiny_mixture])
def test_a_shard_at_a_time_is_in_memory(tmp_path: Path, build: Callable[[], Any]) -> None:
    model = build()
    state = model.state_dict()
    alive: list[int] = []
    most = 0

    def read(name: str) -> Tensor:
        nonlocal most
        tensor = state[name].clone()
        alive.append(tensor.nbytes)
        weakref.finalize(tensor, alive.remove, tensor.nbytes)
        most = max(most, sum(alive))
        return tensor

    written = {name: value.nbytes for name, value in state.items() if name not in model.all_tied_weights_keys}
    together: dict[str, int] = {}
    for name, size in written.items():
        together[near(name)] = together.get(near(name), 0) + size
    shard_bytes = sum(written.values()) // 5
    empty = build_model(type(model).__name__, model.config.to_dict(), tmp_path)
    write_model(tmp_path, empty, LazyTensors({name: partial(read, name) for name in state}), shard_bytes)

    assert most <= shard_bytes + max(together.values())
    assert len(list(tmp_path.glob("*.safetensors"))) >= 5
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(written.values())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert loaded.keys() == state.keys()
    assert all(loaded[name].equal(value) for name, value in state.items())


@pytest.mark.parametrize(("error", "line"), [(ValueError(), "ValueError"), (OSError("\nfirst\nsecond"), "first")])
def test_an_error_without_words_has_a_line_too(error: Exception, line: str) -> None:
    assert first_line(error) == line
