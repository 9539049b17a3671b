"""Blocks are trained, and their channels ordered, by one rank each; every strategy gives what one process gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import OFFLOADED, agreement, only, results, trained
from torch import Tensor
from toy import tiny_gpt2, tiny_llama

STRATEGIES: dict[str, dict[str, Any]] = {
    "ddp": {"strategy": "ddp"},
    "zero1, bf16": {"strategy": "zero1", "precision": "bf16-true"},
    "zero3": {"strategy": "zero3"},
    "zero3, all offloaded": {"strategy": "zero3", **OFFLOADED},
    "fsdp": {"strategy": "fsdp"},
    "fsdp, all as one": {"strategy": "fsdp", "fsdp": {"how": "root"}},
    **{f"{name}, with biases, transposed": {"strategy": name, "model": "gpt2"} for name in ("ddp", "zero3", "fsdp")},
}


def at_once(ranks: int = 2, **case: Any) -> Path:
    return trained(ranks, schedule=(0, 0, 1), calibration_batches=6, max_steps=1, optimizer="still", **case)


@pytest.mark.parametrize("name", only(["ddp", "zero3", "fsdp"], STRATEGIES))
def test_blocks_become_what_one_process_makes_of_them(name: str) -> None:
    case = {key: value for key, value in STRATEGIES[name].items() if key in ("model", "precision")}
    alone, together = at_once(1, strategy="auto", **case), at_once(**STRATEGIES[name])
    (one,), several = results(alone, 1), results(together)
    assert one["error"] is None
    assert [rank["error"] for rank in several] == [None, None]
    assert len(one["blocks"]) == len(one["ordered"]) == 2
    for rank in several:
        assert rank["violations"] == []
        assert rank["ordered"] == one["ordered"]
        assert rank["blocks"] == pytest.approx(one["blocks"], rel=5e-2 if "bf16" in name else 1e-3)
    assert agreement(alone, together) >= (0.99 if "bf16" in name else 0.999)
    one_gives, several_give = (logits(folder, case.get("model")) for folder in (alone, together))
    error = torch.linalg.vector_norm(several_give - one_gives) / torch.linalg.vector_norm(one_gives)
    assert error < (0.05 if "bf16" in name else 1e-4)


def logits(folder: Path, model: str | None) -> Tensor:
    """What the model computes with the weights that a training has left."""
    own = (tiny_gpt2() if model == "gpt2" else tiny_llama()).eval()
    _, unexpected = own.load_state_dict(torch.load(folder / "state0.pt")["weights"], strict=False)
    assert not unexpected
    with torch.no_grad():
        given: Tensor = own(torch.arange(64).view(4, 16)).logits
    return given


@pytest.mark.parametrize("name", only(["zero3"], ["zero3", "zero3, all offloaded", "fsdp", "fsdp, all as one"]))
def test_where_parameters_lie_changes_nothing(name: str) -> None:
    whole, sharded = (torch.load(at_once(**STRATEGIES[one]) / "state0.pt")["weights"] for one in ("ddp", name))
    for layer, weight in whole.items():
        torch.testing.assert_close(sharded[layer], weight, rtol=1e-3, atol=1e-4)
