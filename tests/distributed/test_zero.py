"""Two real ranks over gloo with a real DeepSpeed engine, at all ZeRO stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ranks import (
    FP32_SUMS,
    OFFLOADED,
    agreement,
    check_clipped,
    check_equal_masks,
    check_everywhere,
    check_zeros,
    only,
    results,
    start,
    train,
    train_alone,
    trained,
)
from require import without
from toy import tiny_llama

from thanos_lightning.cli import main

ACCUMULATING = {"accumulate": 3, "batch_size": 2, "max_steps": 17, "calibration_steps": 1}
PRECISIONS, OPTIMIZERS = ("32-true", "bf16-mixed", "bf16-true"), ("adamw", "sgd")


def setting(stage: int, precision: int) -> tuple[str, dict[str, Any]]:
    """A stage and a precision, with an optimizer and with accumulation or without it, by turns."""
    optimizer = OPTIMIZERS[(stage + precision + 1) % 2]
    more = ACCUMULATING if (stage // 2 + precision + 1) % 2 else {}
    name = f"{stage}-{PRECISIONS[precision]}-{optimizer}{'-accumulating' if more else ''}"
    case = {"strategy": f"zero{stage}", "precision": PRECISIONS[precision], "optimizer": optimizer, "max_steps": 17}
    return name, {**case, **more}


# any two of stage, precision, optimizer and accumulation in all ways
GRID: dict[str, dict[str, Any]] = dict(setting(stage, precision) for stage in range(4) for precision in range(3))
CALIBRATED: dict[str, Any] = {"strategy": "zero3", "pattern": "unstructured", "sparsity": 0.6, "calibration_batches": 3}
MLP = "transformers.models.llama.modeling_llama.LlamaMLP"
KINDS: dict[str, dict[str, Any]] = {
    "stage 2, offloaded to DeepSpeed's CPU Adam": {
        "strategy": "zero2",
        "precision": "bf16-mixed",
        "optimizer": "cpu_adam",
        "deepspeed": {"offload_optimizer": True},
        **ACCUMULATING,
    },
    "stage 3, all offloaded": {"strategy": "zero3", "precision": "bf16-mixed", **OFFLOADED, **ACCUMULATING},
    "stage 1, bf16 with fp32 accumulation": FP32_SUMS,
    "stage 3, several sub-groups": {"strategy": "zero3", "zero": {"sub_group_size": 3000}},
    "stage 3, small weights stay gathered": {
        "strategy": "zero3",
        "precision": "bf16-mixed",
        "zero": {"stage3_param_persistence_threshold": 1100},
    },
    "stage 3, transposed weights": {"strategy": "zero3", "model": "gpt2", "precision": "bf16-mixed"},
    "stage 2, transposed weights": {"strategy": "zero2", "model": "gpt2"},
    "stage 3, model built in configure_model": {"strategy": "zero3", "configure_model": True},
    "stage 3, a calibration set that the ranks don't divide": {"strategy": "zero3", "calibration_batches": 3},
    "stage 3, unstructured": {"strategy": "zero3", "pattern": "unstructured", "sparsity": 0.6},
    **{
        f"stage {stage}, unstructured, a calibration set": {**CALIBRATED, "strategy": f"zero{stage}"}
        for stage in (2, 3)
    },
    **{
        f"stage 3, unstructured, a calibration set, {name}": {**CALIBRATED, **more}
        for name, more in {
            "a validation between scan and event": {"monitor": "val/loss"},
            "small weights stay gathered": {"zero": {"stage3_param_persistence_threshold": 1100}},
            "modules gathered as a whole": {"zero": {"leaf_module": {"classes": [MLP]}}},
            "a batch without labels": {"unlabelled": [1]},
            "looked at": {"looked": True},
        }.items()
    },
    "stage 2, a layer that lies on one rank": {"strategy": "zero2", "targets": ["*layers.0.self_attn.k_proj"]},
    "stage 0, DeepSpeed's fused Adam": {"strategy": "zero0", "precision": "bf16-mixed", "optimizer": "fused_adam"},
    **{
        f"stage {stage}, fp16 with steps that overflow": {
            "strategy": f"zero{stage}",
            "precision": "16-mixed",
            "deepspeed": {"initial_scale_power": 22, "hysteresis": 1},
            "max_steps": 30,
        }
        for stage in (1, 2, 3)
    },
    **{
        f"{name}, with a target that is not trained": {**case, "frozen": ["*layers.1.mlp.up_proj.weight"]}
        for name, case in {
            "stage 0": {"strategy": "zero0", "precision": "bf16-mixed"},
            "stage 1, bf16 with fp32 accumulation": FP32_SUMS,
            "stage 2": {"strategy": "zero2"},
            "stage 3": {"strategy": "zero3", "precision": "bf16-mixed"},
        }.items()
    },
}
# what keeps zeros that masked gradients don't
DRIFTING: dict[str, dict[str, Any]] = {
    "stage 0": {"strategy": "zero0", "precision": "bf16-mixed"},
    "stage 1": {"strategy": "zero1", "precision": "bf16-mixed"},
    "stage 1, fp32 accumulation": FP32_SUMS,
    "stage 2": {"strategy": "zero2"},
    "stage 3": {"strategy": "zero3", "precision": "bf16-mixed"},
    "stage 3, offloaded": {"strategy": "zero3", "precision": "bf16-mixed", **OFFLOADED},
}
ZEROS = only([setting(stage, 1)[0] for stage in range(4)], {**GRID, **KINDS})


@pytest.mark.parametrize("case", only(["stage 2", "stage 3"], DRIFTING))
def test_the_hook_alone_holds_weights_that_drift(case: dict[str, Any]) -> None:
    ranks = results(trained(**case, optimizer="drifting", max_steps=17))
    check_zeros(ranks, steps=17)
    for rank in ranks:
        assert rank["checked"].keys() == {"weight", "master"}
        assert min(rank["checked"].values()) >= 14 * 10


@pytest.mark.parametrize(
    ("method", "optimizer", "what"), [("enforce", "drifting", "master"), ("mask_gradients", "adamw", "exp_avg")]
)
def test_without_either_no_zero_holds(tmp_path: Path, method: str, optimizer: str, what: str) -> None:
    for rank in train(tmp_path, strategy="zero3", precision="bf16-mixed", optimizer=optimizer, off=[method]):
        assert "ZeroViolationError: zeros came back" in rank["error"]
        assert f"({what})" in rank["error"]
        assert rank["steps"] == 4  # the first after the first event


@pytest.mark.parametrize("stage", [1, 2])
def test_zeros_hold_in_a_second_group(stage: int) -> None:
    case = {"strategy": f"zero{stage}", "precision": "bf16-mixed", "apart": ["*layers.1.mlp.*"]}
    for rank in results(trained(**case, watch=False)):  # DeepSpeed's functions don't tell of a second group
        assert rank["error"] is None
        assert [zeros for name, zeros in rank["sparsity"].items() if "layers.1.mlp." in name] == [0.5] * 3


@pytest.mark.parametrize("case", ZEROS)
def test_zeros_hold_everywhere(case: dict[str, Any]) -> None:
    check_everywhere(trained(**case), case)


@pytest.mark.parametrize("case", ZEROS)
def test_an_event_sends_sums_to_owners_only(case: dict[str, Any]) -> None:
    for rank in results(trained(**case)):
        assert "c10d.reduce_.default" in rank["event_calls"]
        assert 0 < rank["event_total"] < 4 * 16**2  # the tokens of layers, and less than the smallest sum
        # q, k and v have one input, and gate and up
        assert set(rank["sums"]) == {1 if "targets" in case else 8}
        assert rank["gathered_at_once"] <= 1 or "stage3_param_persistence_threshold" in case.get("zero", {})
        if case["strategy"] == "zero3":
            assert rank["gathered_at_once"] >= 1


@pytest.mark.parametrize("case", only(["stage 3, all offloaded"], KINDS))
def test_no_gradient_is_copied_to_the_device_to_be_masked(case: dict[str, Any]) -> None:
    assert {rank["device_copies"] for rank in results(trained(**case))} == {0}


@pytest.mark.rest
def test_a_layer_lies_on_one_rank() -> None:
    held = [rank["held"] for rank in results(trained(**KINDS["stage 2, a layer that lies on one rank"]))]
    assert sorted(sum(entries.values()) for entries in held) == [0, 16 * 32]


@pytest.mark.parametrize("case", [one for one in ZEROS if not str(one.id).startswith("0-32-true")])
def test_the_clipped_norm_is_that_of_the_sparse_model(case: dict[str, Any]) -> None:
    is_rounded = case.get("precision", "32-true") != "32-true"
    check_clipped(results(trained(**case))[:1], 1e-2 if is_rounded else 1e-4, least=5)


@pytest.mark.rest
@pytest.mark.parametrize("with_parameters", [False, True], ids=["optimizer", "optimizer and parameters"])
def test_zeros_hold_where_masters_are_on_disk(tmp_path: Path, with_parameters: bool) -> None:
    if not Path("/usr/include/libaio.h").exists():
        without("DeepSpeed needs libaio to build what swaps to NVMe (Debian: libaio-dev)")
    offload = {"offload_optimizer": True, "offload_optimizer_device": "nvme", "nvme_path": str(tmp_path / "disk")}
    if with_parameters:
        offload |= {"offload_parameters": True, "offload_params_device": "nvme"}
    case = {
        "strategy": "zero3",
        "model": "wide",
        "precision": "bf16-mixed",
        "optimizer": "cpu_adam",
        "deepspeed": offload,
        **ACCUMULATING,
        "schedule": (2, 2, 1),
        "max_steps": 5,
    }
    (tmp_path / "disk").mkdir()
    # in processes of their own, since the threads that swap live as long as they do, and what they say is read
    ranks = train_alone(tmp_path / "out", **case, save=[4] if with_parameters else False)
    checked = dict.fromkeys(("weight", "master", "exp_avg", "exp_avg_sq"), 7 * 4)
    check_zeros(ranks, checked=checked, collectives=[])
    check_clipped(ranks, 1e-4)
    swapped = {file.name for file in (tmp_path / "disk").rglob("*.swp")}
    assert [name for name in swapped if name.startswith("exp_avg-")]
    assert bool([name for name in swapped if "param" in name]) == with_parameters
    if not with_parameters:
        return
    checkpoint = tmp_path / "out" / "step=4.ckpt"
    for command in (["verify", str(checkpoint)], ["reshard", str(checkpoint)]):
        assert main(command) == 2
    check_zeros(train_alone(tmp_path / "resumed", **case, resume=str(checkpoint)), steps=5)
    assert "DeepSpeed does not load moments there" in (tmp_path / "resumed" / "log0.txt").read_text()


@pytest.mark.rest
@pytest.mark.parametrize("padding", [None, 0])
def test_a_pretrained_model_is_loaded_where_transformers_knows(tmp_path: Path, padding: int | None) -> None:
    """What helps is said where it doesn't, which shows itself in two ways."""
    tiny_llama(pad_token_id=padding).save_pretrained(tmp_path / "model")
    case = {"strategy": "zero3", "configure_model": True, "pretrained": str(tmp_path / "model"), "max_steps": 8}
    untold = start(tmp_path / "without", [{"out": str(tmp_path / "without"), **case, "watch": False}], ranks=1)
    assert "in configure_model, keep HfDeepSpeedConfig(self.trainer.strategy.config)" in untold.outputs[0]
    check_zeros(train(tmp_path / "told", tells_transformers=True, **case), events=[3, 6, 7])


@pytest.mark.rest
@pytest.mark.parametrize(
    "more", ["", ", a validation between scan and event", ", small weights stay gathered", ", looked at"]
)
def test_a_calibration_set_has_the_same_gradients_where_parameters_are_sharded(more: str) -> None:
    whole, sharded = (KINDS[f"stage {stage}, unstructured, a calibration set{more * (stage - 2)}"] for stage in (2, 3))
    assert agreement(trained(**whole), trained(**sharded)) >= 0.999


ASKED: dict[str, Any] = {**CALIBRATED, "output_weights": "diagonal"}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "gradients of modules that are gathered as a whole": (
        {**ASKED, "zero": {"leaf_module": {"classes": [MLP]}}},
        "under ZeRO-3 there are no gradients on calibration.batches",
    ),
    "gradients without labels": ({**ASKED, "unlabelled": [1]}, "for a calibration batch the module returns no loss"),
    "gradients without labels, looked at": (
        {**ASKED, "unlabelled": [0], "looked": True},
        "for a calibration batch the module returns no loss",
    ),
    **{
        f"a layer that no optimizer updates, {strategy}": (
            {"strategy": strategy, "left_out": ["*layers.1.mlp.up_proj.weight"]},
            "layer model.model.layers.1.mlp.up_proj requires gradients, but no optimizer",
        )
        for strategy in ("zero2", "zero3")
    },
    "offloaded in part": (
        {
            "strategy": "zero3",
            "optimizer": "cpu_adam",
            "precision": "bf16-mixed",
            "zero": {"offload_optimizer": {"device": "cpu", "ratio": 0.5}},
        },
        "an optimizer that is offloaded in part (offload_optimizer.ratio 0.5)",
    ),
}


@pytest.mark.rest
@pytest.mark.parametrize(("case", "words"), REFUSED.values(), ids=REFUSED)
def test_what_can_not_be_is_refused_by_name(tmp_path: Path, case: dict[str, Any], words: str) -> None:
    for rank in train(tmp_path, **case):
        assert words in rank["error"]
        assert rank["events"] == []
        assert rank["losses"] == [] or ("unlabelled" in case and "looked" not in case)


@pytest.mark.rest
@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3", "fsdp"])
def test_a_rank_without_tokens_changes_nothing_but_the_sums(tmp_path: Path, strategy: str) -> None:
    ranks = train(tmp_path, strategy=strategy, uncounted=[1])
    check_zeros(ranks, events=[3, 6, 7])
    counted, uncounted = (rank["tokens"] for rank in ranks)
    assert min(counted) > 0
    assert set(uncounted) == {0}
    assert len(check_equal_masks(tmp_path)) == 14
