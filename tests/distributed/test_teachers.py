"""CausalLM with a teacher on two real ranks over gloo: where the teacher lies, and that it is the same everywhere."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import OFFLOADED, Trainings, only, results
from torch import Tensor
from toy import tiny_llama

from thanos_lightning.models.targets import find_targets

TAUGHT: dict[str, dict[str, Any]] = {
    "ddp": {"strategy": "ddp"},
    "zero2": {"strategy": "zero2"},
    "zero3": {"strategy": "zero3", "save": True},
    "zero3 offloaded": {"strategy": "zero3", **OFFLOADED},
    "zero3, given as an object": {
        "strategy": "zero3",
        "as_object": True,
        "zero": {"stage3_param_persistence_threshold": 600},
    },
    "fsdp": {"strategy": "fsdp", "save": True},
}
OTHERS: dict[str, dict[str, Any]] = {
    "ddp in bf16": {"strategy": "ddp", "dtype": "bfloat16"},
    "zero3 in fp32 beside bf16-mixed": {"strategy": "zero3", "precision": "bf16-mixed"},
    "zero3 by name": {"strategy": "zero3", "teacher": "other", "dtype": "bfloat16"},
}
ALL = {**TAUGHT, **OTHERS}
UNEVEN: dict[str, dict[str, Any]] = {
    f"{strategy}, uneven": {"strategy": strategy, "uneven": True} for strategy in ("ddp", "zero3", "fsdp")
}
CALIBRATED: dict[str, dict[str, Any]] = {
    f"{strategy}, calibrated": {"strategy": strategy, "calibrated": True} for strategy in ("ddp", "zero3", "fsdp")
}
RESUMED = {f"{kind}, resumed": kind for kind in ("zero3", "fsdp")}
DEFAULT = ["ddp", "zero3"]
STEPS, STOP = 6, 4
ROUNDING = 1e-6  # of a divergence, which is what is left of entropies near 4


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trainings:
    root = tmp_path_factory.mktemp("distillation")
    for name, seed in (("model", 0), ("other", 1)):
        tiny_llama(seed).save_pretrained(root / name)
    cases = {
        **ALL,
        **UNEVEN,
        **CALIBRATED,
        **{name: {**TAUGHT[kind], "resume": (kind, STOP)} for name, kind in RESUMED.items()},
        "fsdp as a whole": {"strategy": "fsdp", "parts": False},
    }
    cases = {name: {"model": str(root / "model"), **case} for name, case in cases.items()}
    for case in cases.values():
        if case.get("teacher") == "other":
            case["teacher"] = str(root / "other")
    return Trainings(root, cases, module="teaching")


def states(out: Path) -> list[dict[str, dict[str, Tensor]]]:
    return [torch.load(out / f"state{rank}.pt", weights_only=True) for rank in range(2)]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def rounded(weights: dict[str, Tensor], dtype: str) -> dict[str, Tensor]:
    return {name: weight.to(getattr(torch, dtype)) for name, weight in weights.items()}


def parameters(seed: int) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in tiny_llama(seed).named_parameters()}


@pytest.mark.parametrize("name", only(DEFAULT, ALL))
def test_the_teacher_stays_what_it_was(trained: Trainings, name: str) -> None:
    dtype = ALL[name].get("dtype", "float32")
    expected = rounded(parameters(1 if "teacher" in ALL[name] else 0), dtype)
    for state in states(trained(name)):
        assert same(state["teacher"], expected)
        assert not same(state["teacher"], rounded(state["weights"], dtype))


@pytest.mark.parametrize("name", only(DEFAULT, ALL))
def test_the_model_is_taught(trained: Trainings, name: str) -> None:
    for rank in results(trained(name)):
        assert rank["error"] is None
        assert len(rank["steps"]) == STEPS
        for number, logged in enumerate(rank["steps"]):
            assert logged.keys() == {"train/loss", "train/cross_entropy", "train/logits"}
            assert all(math.isfinite(value) for value in logged.values())
            if number > 0 or "teacher" in ALL[name]:
                assert logged["train/logits"] > 1e-5
            assert logged["train/loss"] == pytest.approx(
                logged["train/cross_entropy"] + logged["train/logits"], rel=1e-5
            )


@pytest.mark.parametrize("name", only(DEFAULT, [kind for kind in TAUGHT if kind != "ddp"]))
def test_all_strategies_agree(trained: Trainings, name: str) -> None:
    for expected, found in zip(results(trained("ddp")), results(trained(name)), strict=True):
        for one, other in zip(expected["steps"], found["steps"], strict=True):
            assert other == pytest.approx(one, rel=1e-4, abs=ROUNDING)
    for expected, found in zip(states(trained("ddp")), states(trained(name)), strict=True):
        for kind in ("teacher", "weights"):
            assert expected[kind].keys() == found[kind].keys()
            for parameter, values in expected[kind].items():
                torch.testing.assert_close(found[kind][parameter], values, rtol=1e-4, atol=1e-4)


@pytest.mark.rest
@pytest.mark.parametrize("name", list(CALIBRATED))
def test_labels_that_the_model_draws_weight_outputs_alike_everywhere(trained: Trainings, name: str) -> None:
    layers = find_targets(tiny_llama())
    (expected, _), found = states(trained("ddp, calibrated")), states(trained(name))
    sparsities = set()
    for own in found:
        for layer in layers:
            zeros = own["weights"][f"{layer}.weight"] == 0
            sparsities.add(round(zeros.double().mean().item(), 4))
            assert (zeros == (expected["weights"][f"{layer}.weight"] == 0)).double().mean() > 0.99
    assert len(sparsities) > 2  # which layers are alike without output weights


@pytest.mark.rest
@pytest.mark.parametrize("strategy", ["zero3", "fsdp"])
def test_ranks_with_unequal_numbers_of_tokens_do_not_wait_for_each_other(trained: Trainings, strategy: str) -> None:
    for expected, found in zip(results(trained("ddp, uneven")), results(trained(f"{strategy}, uneven")), strict=True):
        for one, other in zip(expected["steps"], found["steps"], strict=True):
            assert other == pytest.approx(one, rel=1e-4, abs=ROUNDING)


@pytest.mark.parametrize("name", only(DEFAULT, ALL))
def test_only_zero3_shards_the_teacher(trained: Trainings, name: str) -> None:
    teacher = states(trained(name))[0]["teacher"]
    for rank in results(trained(name)):
        if not name.startswith("zero3"):
            assert rank["shards"] == {}
            continue
        assert rank["shards"].keys() == teacher.keys()
        persisting = ALL[name].get("zero", {}).get("stage3_param_persistence_threshold", 0)
        for parameter, (there, held, total) in rank["shards"].items():
            assert there == (total if total <= persisting else 0)  # else given back after the forward
            assert total == teacher[parameter].numel()
            assert held == math.ceil(total / 2)
        # else nothing is fetched ahead, and DeepSpeed's record of the calls grows with each step
        assert rank["traces"] == [True]


@pytest.mark.parametrize("name", only(DEFAULT, ALL))
def test_nothing_of_the_teacher_is_trained_or_saved(trained: Trainings, name: str) -> None:
    total = sum(parameter.numel() for parameter in parameters(0).values())
    strategy = ALL[name]["strategy"]
    for rank in results(trained(name)):
        assert rank["shared"] == 0
        assert rank["trained"] == []
        if strategy == "zero3":
            assert rank["moments"] == rank["own_shards"] == pytest.approx(total / 2, abs=20)
        else:
            assert rank["moments"] == pytest.approx(total / 2 if strategy == "zero2" else total, abs=20)


def test_a_checkpoint_of_zero3_holds_nothing_of_the_teacher(trained: Trainings) -> None:
    folder = trained("zero3") / "step=6.ckpt" / "checkpoint"
    expected = {f"model.{name}" for name in tiny_llama().state_dict()}
    for rank in range(2):
        saved = torch.load(folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt", weights_only=False)
        assert saved["module"].keys() == expected


@pytest.mark.parametrize("name", only(["zero3, resumed"], RESUMED))
def test_a_resumed_training_has_the_same_teacher_and_ends_alike(trained: Trainings, name: str) -> None:
    kind = RESUMED[name]
    for whole, resumed in zip(results(trained(kind)), results(trained(name)), strict=True):
        assert resumed["error"] is None
        assert len(resumed["steps"]) == STEPS - STOP
        for expected, found in zip(whole["steps"][STOP:], resumed["steps"], strict=True):
            assert found == pytest.approx(expected, rel=1e-5)
    for whole, resumed in zip(states(trained(kind)), states(trained(name)), strict=True):
        assert same(resumed["teacher"], whole["teacher"])
        for parameter, values in whole["weights"].items():
            torch.testing.assert_close(resumed["weights"][parameter], values, rtol=1e-5, atol=1e-5)


@pytest.mark.rest
def test_fsdp_that_gathers_the_model_only_as_a_whole_is_refused(trained: Trainings) -> None:
    for rank in results(trained("fsdp as a whole")):
        assert "is gathered only where the whole model is called" in rank["error"]
        assert "list of the embeddings, the last norm and the head" in rank["error"]
        assert rank["steps"] == []
