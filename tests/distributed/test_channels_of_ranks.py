"""Channels on real ranks: what they own is zero wherever a strategy keeps it, and taken out at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import (
    OFFLOADED,
    agreement,
    check_clipped,
    check_equal_masks,
    check_resuming,
    check_zeros,
    only,
    results,
    trained,
)
from toy import VOCABULARY
from transformers import AutoModelForCausalLM

from thanos_lightning.checkpoints.export import export_checkpoint
from thanos_lightning.checkpoints.verify import verify_checkpoint

CHANNELS: dict[str, Any] = {"pattern": "channels", "sparsity": 0.25, "multiple_of": 4, "max_steps": 12}
GPT2: dict[str, Any] = {**CHANNELS, "model": "gpt2"}  # which has biases
CASES: dict[str, dict[str, Any]] = {
    "zero2, llama": {**CHANNELS, "strategy": "zero2"},
    "ddp": {**GPT2, "strategy": "ddp", "precision": "bf16-mixed", "optimizer": "sgd"},
    "fsdp": {**GPT2, "strategy": "fsdp"},
    "fsdp, all as one": {**CHANNELS, "strategy": "fsdp", "fsdp": {"how": "root"}},
    **{
        f"zero{stage}": {**GPT2, "strategy": f"zero{stage}", "precision": "bf16-mixed" if stage != 2 else "32-true"}
        for stage in range(4)
    },
    "zero3, llama": {**CHANNELS, "strategy": "zero3"},
    "zero3, offloaded": {**GPT2, "strategy": "zero3", "precision": "bf16-mixed", **OFFLOADED},
    "zero3, model built in configure_model": {**GPT2, "strategy": "zero3", "configure_model": True},
    "zero3, a calibration set": {**GPT2, "strategy": "zero3", "calibration_batches": 3},
}
SAVED = {name: {**CASES[name], "save": [5, 12]} for name in ("zero3", "zero2", "zero3, llama")}


@pytest.mark.parametrize("case", only(["zero3", "fsdp"], {**CASES, **SAVED}))
def test_all_that_a_channel_owns_is_zero(case: dict[str, Any]) -> None:
    folder = trained(**case)
    ranks = results(folder)
    check_zeros(ranks, collectives=[], steps=12, events=[3, 6, 7])
    check_clipped(ranks, 1e-2)
    for rank in ranks:
        assert min(rank["checked"].values()) >= 6 * 5
    kept = check_equal_masks(folder)
    assert len(kept) == 6  # two layers, each with two weights and a bias or three weights
    width = 128 if case.get("model") == "gpt2" else 48
    for mask_name, keep in kept.items():
        is_down = mask_name.endswith(("mlp.c_proj.weight", "down_proj.weight"))
        lines = keep.T if is_down else keep
        assert lines.shape[0] == width
        assert int(lines.all(1).sum()) == width * 3 // 4
        assert int((~lines).all(1).sum()) == width // 4
        first = next(other for other in kept if other.split("mlp")[0] == mask_name.split("mlp")[0])
        assert torch.equal(lines.any(1), (kept[first].T if kept[first].shape[1] == width else kept[first]).any(1))


@pytest.mark.rest
def test_strategies_choose_alike() -> None:
    assert agreement(trained(**CASES["fsdp"]), trained(**SAVED["zero2"])) >= 0.999
    assert agreement(trained(**CASES["fsdp, all as one"]), trained(**SAVED["zero3, llama"])) >= 0.999


@pytest.mark.parametrize("case", only(["zero3"], SAVED))
def test_a_resumed_run_is_the_run_that_was_never_stopped(case: dict[str, Any]) -> None:
    check_resuming(5, **case)


@pytest.mark.parametrize("case", only(["zero3"], SAVED))
def test_a_smaller_model_comes_out(tmp_path: Path, case: dict[str, Any]) -> None:
    checkpoint = trained(**case) / "step=12.ckpt"
    assert all(report.ok for report in verify_checkpoint(checkpoint))
    export_checkpoint(checkpoint, tmp_path / "small")
    export_checkpoint(checkpoint, tmp_path / "masked", keep_shape=True)
    small, masked = (AutoModelForCausalLM.from_pretrained(tmp_path / kind).eval() for kind in ("small", "masked"))
    entry, before, after = ("intermediate_size", 48, 36) if "model" not in case else ("n_inner", None, 96)
    assert [getattr(model.config, entry) for model in (small, masked)] == [after, before]
    tokens = torch.randint(VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        one, other = small(tokens).logits, masked(tokens).logits
    assert (one - other).norm() <= 1e-5 * other.norm()
