"""Real ranks over gloo that train LoRA adapters on layers that are pruned meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import agreement, check_resuming, check_zeros, only, results, train, trained
from toy import tiny_llama
from transformers import LlamaForCausalLM

from thanos_lightning import export_checkpoint

STRATEGIES: dict[str, dict[str, Any]] = {
    "ddp": {"strategy": "ddp"},
    "zero2": {"strategy": "zero2"},
    "zero3": {"strategy": "zero3"},
    "zero3, in configure_model": {"strategy": "zero3", "configure_model": True, "tells_transformers": True},
    "zero3, its model called directly": {"strategy": "zero3", "direct": True},
    "fsdp": {"strategy": "fsdp", "distributed": False},
}
EVENTS: dict[str, dict[str, Any]] = {
    "during the training": {"save": [5, 10]},  # 5: while inputs are counted
    "before the first step": {"save": [10], "schedule": [0, 0, 1], "calibration_batches": 2},
}


def exported(folder: Path) -> LlamaForCausalLM:
    out = folder / "exported"
    if not out.exists():
        with pytest.warns(UserWarning, match="no tokenizer"):
            assert len(export_checkpoint(folder / "step=10.ckpt", out)) == 14
    return LlamaForCausalLM.from_pretrained(out).eval()


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("adapters")
    tiny_llama().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("when", only(["during the training"], EVENTS))
@pytest.mark.parametrize("case", only(["ddp", "zero3"], STRATEGIES))
def test_what_adapters_learn_keeps_zeros(case: dict[str, Any], when: dict[str, Any], pretrained: str) -> None:
    is_made_there = "configure_model" in case
    own = {**case, "pretrained": pretrained} if is_made_there else case
    folder, reference = trained(**own, **when, lora=True), trained(strategy="ddp", **when, lora=True)
    check_zeros(results(folder))
    for seen in results(folder):
        assert seen["checked"]["weight"] > 0
        assert len(seen["ordered"]) == (2 if "calibration_batches" in when else 0)
    with torch.no_grad():
        logits = exported(folder)(input_ids=torch.arange(16).unsqueeze(0)).logits
    for rank in range(2):
        torch.testing.assert_close(torch.load(folder / f"logits{rank}.pt"), logits)
    if is_made_there:  # lora_A is drawn otherwise, but lora_B is 0 at the start, too
        own, others = (results(one)[0]["losses"] for one in (folder, reference))
        assert own[0] == pytest.approx(others[0], rel=1e-5)
        assert own[-1] == pytest.approx(others[-1], rel=0.05)
        return
    assert agreement(folder, reference) == 1.0
    theirs = exported(reference).state_dict()
    for parameter, weight in exported(folder).state_dict().items():
        torch.testing.assert_close(weight, theirs[parameter], rtol=1e-3, atol=1e-5)


@pytest.mark.rest
def test_parts_of_an_adapted_layer_that_are_sharded_one_by_one_are_refused(tmp_path: Path) -> None:
    for seen in train(tmp_path, strategy="fsdp", fsdp={"how": "linears"}, lora=True, watch=False):
        assert "call fully_shard on a module that holds the LoRA layer, such as a block" in seen["error"]


@pytest.mark.rest
@pytest.mark.parametrize("name", ["zero2", "zero3", "fsdp"])
def test_a_resumed_training_ends_with_the_same_bits(name: str) -> None:
    check_resuming(5, **STRATEGIES[name], **EVENTS["during the training"], lora=True)
