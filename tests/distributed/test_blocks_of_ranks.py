"""Blocks are trained, and their channels ordered, by one rank each; every strategy gives what one process gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import OFFLOADED, Trainings, agreement, only, results, train
from torch import Tensor
from toy import tiny_gpt2, tiny_llama

AT_ONCE: dict[str, Any] = {"schedule": (0, 0, 1), "calibration_batches": 6, "max_steps": 1, "optimizer": "still"}
STRATEGIES: dict[str, dict[str, Any]] = {
    "ddp": {"strategy": "ddp"},
    "zero1, bf16": {"strategy": "zero1", "precision": "bf16-true"},
    "zero3": {"strategy": "zero3"},
    "zero3, all offloaded": {"strategy": "zero3", **OFFLOADED},
    "fsdp": {"strategy": "fsdp"},
    "fsdp, all as one": {"strategy": "fsdp", "fsdp": {"how": "root"}},
    **{f"{name}, with biases, transposed": {"strategy": name, "model": "gpt2"} for name in ("ddp", "zero3", "fsdp")},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trainings:
    cases = {name: {**AT_ONCE, **case} for name, case in STRATEGIES.items()}
    return Trainings(tmp_path_factory.mktemp("reconstruct"), cases)


@pytest.mark.parametrize("name", only(["ddp", "zero3", "fsdp"], STRATEGIES))
def test_blocks_become_what_one_process_makes_of_them(tmp_path: Path, trained: Trainings, name: str) -> None:
    case = {key: value for key, value in STRATEGIES[name].items() if key in ("model", "precision")}
    (one,) = train(tmp_path, ranks=1, strategy="auto", **AT_ONCE, **case)
    several = results(trained(name))
    assert one["error"] is None
    assert [rank["error"] for rank in several] == [None, None]
    assert len(one["blocks"]) == len(one["ordered"]) == 2
    for rank in several:
        assert rank["violations"] == []
        assert rank["ordered"] == one["ordered"]
        assert rank["blocks"] == pytest.approx(one["blocks"], rel=5e-2 if "bf16" in name else 1e-3)
    assert agreement(tmp_path, trained(name)) >= (0.99 if "bf16" in name else 0.999)
    one_gives, several_give = (logits(folder, case.get("model")) for folder in (tmp_path, trained(name)))
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
def test_where_parameters_lie_changes_nothing(trained: Trainings, name: str) -> None:
    whole, sharded = (torch.load(trained(case) / "state0.pt")["weights"] for case in ("ddp", name))
    for layer, weight in whole.items():
        torch.testing.assert_close(sharded[layer], weight, rtol=1e-3, atol=1e-4)
