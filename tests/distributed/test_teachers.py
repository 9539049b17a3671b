"""CausalLM with a teacher on two real ranks over gloo: where the teacher lies, and that it is the same everywhere."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import OFFLOADED, check_equal_masks, only, results, trained
from torch import Tensor
from toy import tiny_llama

TAUGHT: dict[str, dict[str, Any]] = {
    "zero2": {"strategy": "zero2"},
    "zero3": {"strategy": "zero3", "save": [4, 6]},
    "zero3 offloaded": {"strategy": "zero3", **OFFLOADED},
    "zero3, given as an object": {
        "strategy": "zero3",
        "as_object": True,
        "zero": {"stage3_param_persistence_threshold": 600},
    },
    "fsdp": {"strategy": "fsdp", "save": [4, 6]},
}
OTHERS: dict[str, dict[str, Any]] = {
    "ddp": {"strategy": "ddp"},
    "ddp in bf16": {"strategy": "ddp", "teacher_dtype": "bfloat16"},
    "zero3 in fp32 beside bf16-mixed": {"strategy": "zero3", "precision": "bf16-mixed"},
    "zero3 by name": {"strategy": "zero3", "teacher": "other", "teacher_dtype": "bfloat16"},
}
ALL = {**TAUGHT, **OTHERS}
UNEVEN = {f"{name}, uneven": {"strategy": name, "uneven": True} for name in ("zero3", "fsdp")}
CALIBRATED: dict[str, Any] = {
    "calibration_batches": 5,
    "unlabelled": [0, 1, 2, 3, 4],  # so that there are no labels but those that the model draws
    "pattern": "unstructured",
    "sparsity": 0.5,
}
DEFAULT = ["ddp", "zero3"]
STEPS, STOP = 6, 4
ROUNDING = 1e-6  # of a divergence, which is what is left of entropies near 4


Taught = Callable[..., Path]


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Taught:
    """Trains a case with a teacher."""
    root = tmp_path_factory.mktemp("distillation")
    for name, seed in (("start", 0), ("other", 1)):
        tiny_llama(seed).save_pretrained(root / name)
    given = {"model": str(root / "start"), "schedule": (3, 3, 1), "max_steps": STEPS, "watch": False}

    def train(teacher: str = "start", **case: Any) -> Path:
        return trained(**given, teacher=teacher if teacher == "start" else str(root / teacher), **case)

    return train


def states(out: Path) -> list[dict[str, dict[str, Tensor]]]:
    return [torch.load(out / f"state{rank}.pt", weights_only=True) for rank in range(2)]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def rounded(weights: dict[str, Tensor], dtype: str) -> dict[str, Tensor]:
    return {name: weight.to(getattr(torch, dtype)) for name, weight in weights.items()}


def parameters(seed: int) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in tiny_llama(seed).named_parameters()}


@pytest.mark.parametrize("case", only(DEFAULT, ALL))
def test_the_teacher_stays_what_it_was(taught: Taught, case: dict[str, Any]) -> None:
    dtype = case.get("teacher_dtype", "float32")
    expected = rounded(parameters(1 if "teacher" in case else 0), dtype)
    for state in states(taught(**case)):
        assert same(state["teacher"], expected)
        assert not same(state["teacher"], rounded(state["weights"], dtype))


@pytest.mark.parametrize("case", only(DEFAULT, ALL))
def test_the_model_is_taught(taught: Taught, case: dict[str, Any]) -> None:
    for rank in results(taught(**case)):
        assert rank["error"] is None
        assert len(rank["logged"]) == STEPS
        for number, logged in enumerate(rank["logged"]):
            assert logged.keys() == {"train/loss", "train/cross_entropy", "train/logits"}
            assert all(math.isfinite(value) for value in logged.values())
            if number > 0 or "teacher" in case:
                assert logged["train/logits"] > 1e-5
            assert logged["train/loss"] == pytest.approx(
                logged["train/cross_entropy"] + logged["train/logits"], rel=1e-5
            )


@pytest.mark.parametrize("case", only(DEFAULT, {**TAUGHT, **UNEVEN}))
def test_all_strategies_agree(taught: Taught, case: dict[str, Any]) -> None:
    """Also where ranks have unequal numbers of tokens: none waits for another."""
    alike = {key: value for key, value in case.items() if key == "uneven"}
    ddp, own = taught(strategy="ddp", **alike), taught(**case)
    for expected, found in zip(results(ddp), results(own), strict=True):
        for one, other in zip(expected["logged"], found["logged"], strict=True):
            assert other == pytest.approx(one, rel=1e-4, abs=ROUNDING)
    for expected, found in zip(states(ddp), states(own), strict=True):
        for kind in ("teacher", "weights"):
            assert expected[kind].keys() == found[kind].keys()
            for parameter, values in expected[kind].items():
                torch.testing.assert_close(found[kind][parameter], values, rtol=1e-4, atol=1e-4)


@pytest.mark.rest
@pytest.mark.parametrize("strategy", ["zero3", "fsdp"])
def test_labels_that_the_model_draws_weight_outputs_alike_everywhere(taught: Taught, strategy: str) -> None:
    expected, found = (check_equal_masks(taught(strategy=one, **CALIBRATED)) for one in ("ddp", strategy))
    for name, keep in found.items():
        assert (keep == expected[name]).double().mean() > 0.99
    assert len({float(keep.double().mean()) for keep in found.values()}) > 2  # which are alike without output weights


@pytest.mark.parametrize("case", only(DEFAULT, ALL))
def test_only_zero3_shards_the_teacher(taught: Taught, case: dict[str, Any]) -> None:
    teacher = states(taught(**case))[0]["teacher"]
    for rank in results(taught(**case)):
        if case["strategy"] != "zero3":
            assert rank["shards"] == {}
            continue
        assert rank["shards"].keys() == teacher.keys()
        persisting = case.get("zero", {}).get("stage3_param_persistence_threshold", 0)
        for parameter, (there, held, total) in rank["shards"].items():
            assert there == (total if total <= persisting else 0)  # else given back after the forward
            assert total == teacher[parameter].numel()
            assert held == math.ceil(total / 2)
        # else nothing is fetched ahead, and DeepSpeed's record of the calls grows with each step
        assert rank["traces"] == [True]


@pytest.mark.parametrize("case", only(DEFAULT, ALL))
def test_nothing_of_the_teacher_is_trained_or_saved(taught: Taught, case: dict[str, Any]) -> None:
    total = sum(parameter.numel() for parameter in parameters(0).values())
    for rank in results(taught(**case)):
        assert rank["shared"] == 0
        assert rank["trained"] == []
        if case["strategy"] == "zero3":
            assert rank["moments"] == rank["own_shards"] == pytest.approx(total / 2, abs=20)
        else:
            assert rank["moments"] == pytest.approx(total / 2 if case["strategy"] == "zero2" else total, abs=20)


def test_a_checkpoint_of_zero3_holds_nothing_of_the_teacher(taught: Taught) -> None:
    folder = taught(**TAUGHT["zero3"]) / "step=6.ckpt" / "checkpoint"
    expected = {f"model.{name}" for name in tiny_llama().state_dict()}
    for rank in range(2):
        saved = torch.load(folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt", weights_only=False)
        assert saved["module"].keys() == expected


@pytest.mark.parametrize("strategy", only(["zero3"], ["zero3", "fsdp"]))
def test_a_resumed_training_has_the_same_teacher_and_ends_alike(taught: Taught, strategy: str) -> None:
    one = taught(**TAUGHT[strategy])
    other = taught(strategy=strategy, resume=str(one / f"step={STOP}.ckpt"))
    for whole, resumed in zip(results(one), results(other), strict=True):
        assert resumed["error"] is None
        assert len(resumed["logged"]) == STEPS - STOP
        for expected, found in zip(whole["logged"][STOP:], resumed["logged"], strict=True):
            assert found == pytest.approx(expected, rel=1e-5)
    for whole, resumed in zip(states(one), states(other), strict=True):
        assert same(resumed["teacher"], whole["teacher"])
        for parameter, values in whole["weights"].items():
            torch.testing.assert_close(resumed["weights"][parameter], values, rtol=1e-5, atol=1e-5)


@pytest.mark.rest
def test_fsdp_that_gathers_the_model_only_as_a_whole_is_refused(taught: Taught) -> None:
    for rank in results(taught(strategy="fsdp", parts=False)):
        assert "is gathered only where the whole model is called" in rank["error"]
        assert "list of the embeddings, the last norm and the head" in rank["error"]
        assert rank["steps"] == 0
