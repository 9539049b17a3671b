"""Two real ranks over gloo prune as one process does, blocks and compiled modules too; under DDP zeros hold on both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import (
    OFFLOADED,
    agreement,
    check_equal_masks,
    check_everywhere,
    check_resuming,
    check_sparsity,
    check_zeros,
    only,
    results,
    start,
    train,
    trained,
)
from torch import Tensor
from toy import tiny_gpt2, tiny_llama

UNSTRUCTURED: dict[str, Any] = {"pattern": "unstructured", "sparsity": 0.6}
CASES: dict[str, dict[str, Any]] = {
    "bf16-mixed": {"precision": "bf16-mixed"},
    "bf16-true-sgd": {"optimizer": "sgd", "precision": "bf16-true"},
    "accumulating": {**UNSTRUCTURED, "accumulate": 3, "batch_size": 2, "max_steps": 13, "calibration_steps": 1},
}
AS_ONE: dict[str, dict[str, Any]] = {
    "ddp": {},
    "unstructured": UNSTRUCTURED,
    "zero3": {"strategy": "zero3"},
    "zero3, unstructured": {"strategy": "zero3", **UNSTRUCTURED},
    "fsdp": {"strategy": "fsdp"},
    "a calibration set": {**UNSTRUCTURED, "calibration_batches": 4},
    "one rank solves nothing": {"targets": ["*layers.0.mlp.up_proj"]},
}
RESUMED = {name: {**AS_ONE[name], "save": [2, 5]} for name in ("ddp", "unstructured", "zero3, unstructured")}
BLOCKS: dict[str, dict[str, Any]] = {
    "ddp": {"strategy": "ddp"},
    "zero1, bf16": {"strategy": "zero1", "precision": "bf16-true"},
    "zero3": {"strategy": "zero3"},
    "zero3, all offloaded": {"strategy": "zero3", **OFFLOADED},
    "fsdp": {"strategy": "fsdp"},
    "fsdp, all as one": {"strategy": "fsdp", "fsdp": {"how": "root"}},
    **{f"{name}, with biases, transposed": {"strategy": name, "model": "gpt2"} for name in ("ddp", "zero3", "fsdp")},
}
# the wrapper of torch.compile can't be made while DeepSpeed's stage 3 watches how modules are made
FORMS = {"ddp": "wrapped", "zero2": "wrapped", "zero3": "in place", "fsdp": "wrapped"}


@pytest.mark.parametrize("case", only(["bf16-mixed"], CASES))
def test_zeros_hold_on_both_ranks(case: dict[str, Any]) -> None:
    check_everywhere(trained(**case), case)


@pytest.mark.parametrize("case", only(["ddp", "unstructured", "zero3"], AS_ONE))
def test_two_ranks_prune_as_one_does(case: dict[str, Any]) -> None:
    """Two ranks with four sequences a batch see at each step what one rank with eight sees."""
    one, two = trained(1, batch_size=8, **{**case, "strategy": "auto"}), trained(**case)
    (alone,), both = results(one, 1), results(two)
    check_zeros([alone, *both])
    assert agreement(one, two) >= 0.999
    check_sparsity(check_equal_masks(two), case)
    halves = [sum(pair) / 2 for pair in zip(*(rank["losses"] for rank in both), strict=True)]
    assert halves == pytest.approx(alone["losses"], rel=2e-3)


@pytest.mark.parametrize("case", only(["ddp"], RESUMED))
def test_resume_inside_a_window_is_bit_identical(case: dict[str, Any]) -> None:
    # windows are 1-3, 4-6, 6-7; with an allocation the first one is that of its scan, too
    check_resuming(2, 5, **case)


@pytest.mark.rest
def test_a_layer_that_one_rank_never_calls_is_pruned_alike(tmp_path: Path) -> None:
    """As an expert that gets no token on some rank."""
    first, second = train(tmp_path, strategy="ddp_find_unused_parameters_true", routed=True)
    check_zeros((first, second), events=[3, 6, 7], digest=first["digest"])
    assert min(rank["checked"]["weight"] for rank in (first, second)) >= 15 * 2
    assert set(first["sums"]) == {9}
    assert set(second["sums"]) == {8}
    assert float(check_equal_masks(tmp_path)["expert.weight"].float().mean()) == 0.5


def at_once(ranks: int = 2, **case: Any) -> Path:
    return trained(ranks, schedule=(0, 0, 1), calibration_batches=6, max_steps=1, optimizer="still", **case)


@pytest.mark.parametrize("name", only(["ddp", "zero3", "fsdp"], [*BLOCKS]))
def test_blocks_become_what_one_process_makes_of_them(name: str) -> None:
    case = {key: value for key, value in BLOCKS[name].items() if key in ("model", "precision")}
    alone, together = at_once(1, strategy="auto", **case), at_once(**BLOCKS[name])
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
    whole, sharded = (torch.load(at_once(**BLOCKS[one]) / "state0.pt")["weights"] for one in ("ddp", name))
    for layer, weight in whole.items():
        torch.testing.assert_close(sharded[layer], weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("strategy", only(["zero2"], [*FORMS]))
def test_what_is_compiled_is_pruned_as_if_it_were_not(strategy: str) -> None:
    plain, compiled = trained(strategy=strategy), trained(strategy=strategy, compiled=FORMS[strategy], save=[8])
    check_zeros(results(compiled))
    for seen, without in zip(results(compiled), results(plain), strict=True):
        assert seen["losses"] == pytest.approx(without["losses"], rel=1e-5)
    assert agreement(plain, compiled) == 1.0


@pytest.mark.rest
def test_what_fails_under_zero3_is_explained(tmp_path: Path) -> None:
    case = {"out": str(tmp_path), "strategy": "zero3", "compiled": "wrapped", "watch": False}
    ended = start(tmp_path, [case], ranks=1)
    assert "torch.compile(module) in configure_model fails under ZeRO-3: compile it in place" in ended.outputs[0]
