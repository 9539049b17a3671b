"""Trainings whose forwards gradient checkpointing computes twice: each token counts once, and no result differs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from tiny_mixtures import tiny_mixture
from toy import ToyLM, grouped, loader, tiny_gpt2, tiny_llama, trainer

from thanos_lightning import SparsitySchedule, ThanosPruningCallback


def compiled() -> Any:
    model = tiny_llama()
    for block in model.model.layers:
        block.compile(backend="eager")
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "Llama": tiny_llama,
    "GPT-2": tiny_gpt2,
    "LoRA": lambda: inject_adapter_in_model(LoraConfig(r=4, target_modules="all-linear"), tiny_llama()),
    "experts": lambda: tiny_mixture("qwen2"),
    "compiled blocks": compiled,
}
HALF: dict[str, Any] = {"pattern": "unstructured", "sparsity": 0.5}
TRAINING: dict[str, Any] = {"schedule": SparsitySchedule(at=[2]), "steps": 2}
WAYS: dict[str, dict[str, Any]] = {
    "training batches": {"pattern": "2:4", **TRAINING},
    "training batches and their gradients": {**HALF, **TRAINING},
    "a calibration set and its gradients": {**HALF, "schedule": SparsitySchedule(at=[0]), "block_steps": 4},
}


@pytest.mark.parametrize("padding", [5, pytest.param(0, marks=pytest.mark.rest)])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_the_same_is_counted_and_pruned_where_forwards_are_recomputed(
    name: str, way: str, padding: int, tmp_path: Path
) -> None:
    options = WAYS[way] | ({} if "steps" in WAYS[way] else {"batches": list(loader(16, padding=padding))})
    found = []
    for recomputes in (False, True):
        model = MODELS[name]()
        if recomputes:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        module = ToyLM(model, lambda ps: torch.optim.AdamW([p for p in ps if p.requires_grad], lr=1e-3))
        pruning = ThanosPruningCallback(**grouped(**options))
        trainer(tmp_path, pruning, max_steps=4).fit(module, loader(16, padding=padding))
        layers = pruning.report.events[0].layers
        found.append(({one.name: one.tokens for one in layers}, [one.loss for one in layers], module.losses))
    (tokens, losses, training), (tokens_again, losses_again, training_again) = found
    assert tokens == tokens_again
    assert len(losses) > 6
    torch.testing.assert_close(losses_again, losses, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(training_again, training, rtol=1e-5, atol=1e-6)
