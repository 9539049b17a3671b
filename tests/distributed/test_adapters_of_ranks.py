"""Real ranks over gloo that train LoRA adapters on layers that are pruned meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Trainings, agreement, check_resumed, check_zeros, only, results, train
from toy import tiny_llama
from transformers import LlamaForCausalLM

from thanos_lightning import export_checkpoint

STRATEGIES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "zero2": {},
    "zero3": {},
    "zero3, in configure_model": {"strategy": "zero3", "configure_model": True, "tells_transformers": True},
    "zero3, its model called directly": {"strategy": "zero3", "direct": True},
    "fsdp": {"distributed": False},
}
EVENTS = {"during the training": {}, "before the first step": {"schedule": [0, 0, 1], "calibration_batches": 2}}


RESUMED = ("zero2", "zero3", "fsdp")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trainings:
    root = tmp_path_factory.mktemp("adapters")
    tiny_llama().save_pretrained(root / "model")
    pretrained = {"pretrained": str(root / "model")}
    cases: dict[str, dict[str, Any]] = {
        f"{name}, {when}": {
            "strategy": name,
            "lora": True,
            "save": [10],
            **own,
            **event,
            **(pretrained if "configure_model" in own else {}),
        }
        for name, own in STRATEGIES.items()
        for when, event in EVENTS.items()
    }
    for name in RESUMED:
        whole = f"{name}, during the training"
        cases[whole]["save"] = [5, 10]  # 5: while inputs are counted
        cases[f"{name}, resumed"] = {**cases[whole], "save": [10], "resume": (whole, 5)}
    return Trainings(root, cases)


def exported(folder: Path) -> LlamaForCausalLM:
    out = folder / "exported"
    if not out.exists():
        with pytest.warns(UserWarning, match="no tokenizer"):
            assert len(export_checkpoint(folder / "step=10.ckpt", out)) == 14
    return LlamaForCausalLM.from_pretrained(out).eval()


@pytest.mark.parametrize("when", only(["during the training"], EVENTS))
@pytest.mark.parametrize("name", only(["ddp", "zero3"], STRATEGIES))
def test_what_adapters_learn_keeps_zeros(name: str, when: str, trained: Trainings) -> None:
    folder, reference = trained(f"{name}, {when}"), trained(f"ddp, {when}")
    check_zeros(results(folder))
    for seen in results(folder):
        assert seen["checked"]["weight"] > 0
        assert len(seen["ordered"]) == (2 if when == "before the first step" else 0)
    with torch.no_grad():
        logits = exported(folder)(input_ids=torch.arange(16).unsqueeze(0)).logits
    for rank in range(2):
        torch.testing.assert_close(torch.load(folder / f"logits{rank}.pt"), logits)
    if name == "zero3, in configure_model":  # lora_A is drawn otherwise, but lora_B is 0 at the start, too
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


@pytest.mark.parametrize("name", only([], RESUMED))
def test_a_resumed_training_ends_with_the_same_bits(name: str, trained: Trainings) -> None:
    check_resumed(trained(f"{name}, during the training"), trained(f"{name}, resumed"), 5)
