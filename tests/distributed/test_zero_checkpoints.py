"""DeepSpeed's checkpoint folders: resumed, resharded, verified, exported."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoint_cases import change_a_byte
from ranks import (
    FP32_SUMS,
    OFFLOADED,
    PRUNABLE,
    agreement,
    check_resumed,
    check_zeros,
    only,
    results,
    start,
    train,
    trained,
)
from toy import Stranger

from thanos_lightning.checkpoints.deepspeed_files import load_contents
from thanos_lightning.checkpoints.export import NonconformingError, export_checkpoint
from thanos_lightning.checkpoints.format import TrainerCheckpoint, pruning_state
from thanos_lightning.checkpoints.reshard import reshard_checkpoint
from thanos_lightning.checkpoints.verify import verify_checkpoint
from thanos_lightning.cli import main

INSIDE, BETWEEN, AFTER, END = 2, 5, 8, 10  # windows are 1-3, 4-6, 6-7
KINDS: dict[str, dict[str, Any]] = {
    "zero3": {"strategy": "zero3", "precision": "bf16-mixed"},
    "zero3 in sub-groups": {"strategy": "zero3", "zero": {"sub_group_size": 3000}},
    "zero2": {"strategy": "zero2"},
    "zero2 in bf16": {"strategy": "zero2", "precision": "bf16-true"},
    "zero1 with fp32 accumulation": FP32_SUMS,
    "zero1": {"strategy": "zero1"},
    "zero3 offloaded": {"strategy": "zero3", "precision": "bf16-mixed", **OFFLOADED},
    "zero3 in fp16": {"strategy": "zero3", "precision": "16-mixed"},
    "zero3 with a frozen embedding": {
        "strategy": "zero3",
        "precision": "bf16-mixed",
        "frozen": ["*embed_tokens.weight", "*layers.1.mlp.up_proj.weight"],
    },
    "zero0 with fused Adam": {"strategy": "zero0", "precision": "bf16-mixed", "optimizer": "fused_adam"},
    "zero0": {"strategy": "zero0"},
    "zero0 in bf16": {"strategy": "zero0", "precision": "bf16-mixed"},
    "zero3 with SGD": {"strategy": "zero3", "optimizer": "sgd"},
}
SHARDED_ADAM = ["zero3", "zero3 in sub-groups", "zero3 offloaded", "zero3 in fp16", "zero2", "zero2 in bf16", "zero1"]


def saved(kind: str, step: int) -> Path:
    """The checkpoint of two ranks after this step."""
    return trained(**KINDS[kind], save=[INSIDE, BETWEEN, AFTER, END]) / f"step={step}.ckpt"


def resharded(kind: str, step: int) -> Path:
    checkpoint = saved(kind, step)
    folder = checkpoint.with_name(f"{checkpoint.name}-resharded")
    if not folder.exists():
        assert reshard_checkpoint(checkpoint) == folder
    return folder


RESUMED = {
    **dict.fromkeys(KINDS, (INSIDE, BETWEEN, AFTER)),
    **{f"{kind}, resharded": (INSIDE, AFTER) for kind in SHARDED_ADAM},
}


@pytest.mark.parametrize("kind", only(["zero0", "zero1", "zero2", "zero3", "zero3, resharded"], [*RESUMED]))
def test_resuming_is_bit_identical(kind: str) -> None:
    """On as many ranks."""
    name, _, again = kind.partition(",")
    for step in RESUMED[kind]:
        checkpoint = resharded(name, step) if again else saved(name, step)
        resumed = trained(**KINDS[name], resume=str(checkpoint))
        check_zeros(results(resumed), batches_seen=END)
        check_resumed(checkpoint.parent, resumed, step)


@pytest.mark.parametrize("ranks", [1, pytest.param(3, marks=pytest.mark.rest)])
@pytest.mark.parametrize("kind", only(["zero3"], [*SHARDED_ADAM]))
def test_a_resharded_checkpoint_resumes_on_other_numbers_of_ranks(kind: str, ranks: int) -> None:
    for step in (INSIDE, AFTER):
        out = trained(ranks, resume=str(resharded(kind, step)), **KINDS[kind])
        found = results(out, ranks)
        check_zeros(found, collectives=[], events=[3, 6, 7], steps=END)
        for rank in found:
            assert min(rank["checked"].values()) == 14 * {INSIDE: 8, AFTER: 2}[step]
            assert {rank["sparsity"][name] for name in PRUNABLE} == {0.5}
    assert agreement(saved(kind, AFTER).parent, out) == 1


@pytest.mark.rest
@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("kind", ["zero0", "zero0 in bf16"])
def test_what_is_whole_resumes_on_other_numbers_of_ranks(tmp_path: Path, kind: str, ranks: int) -> None:
    checkpoint = saved(kind, AFTER)
    check_zeros(train(tmp_path, ranks, resume=str(checkpoint), **KINDS[kind]), steps=END)
    assert agreement(checkpoint.parent, tmp_path) == 1


def test_each_rank_of_stage_3_stores_a_share_of_the_masks() -> None:
    checkpoint = saved("zero3", AFTER)
    first, second = (pruning_state(content)["masks"] for content in load_contents(checkpoint))
    assert (len(first), len(second)) == (7, 7)
    assert {name.removeprefix("model.") for name in first | second} == set(PRUNABLE)


@pytest.mark.rest
def test_each_rank_opens_its_share_of_the_files() -> None:
    """However many ranks there are."""
    opened = {}
    for ranks in (2, 4):
        case = {**KINDS["zero3"], "schedule": (0, 0, 1), "max_steps": 2}
        checkpoint = trained(ranks, **case, save=[2]) / "step=2.ckpt"
        resumed = trained(ranks, **{**case, "max_steps": 3}, resume=str(checkpoint))
        opened[ranks] = {rank["opened"] for rank in results(resumed, ranks)}
    assert opened[2] == opened[4]
    assert len(opened[2]) == 1


@pytest.mark.rest
def test_what_can_not_be_resumed_is_refused_with_the_mend(tmp_path: Path) -> None:
    checkpoint = str(saved("zero3", AFTER))
    (fewer,) = train(tmp_path / "fewer", ranks=1, strategy="zero3", precision="bf16-mixed", resume=checkpoint)
    assert f"was written by 2 ranks, and 1 resume it: run `thanos-lightning reshard {checkpoint}`" in fewer["error"]
    for rank in train(tmp_path / "model", strategy="zero3", precision="bf16-mixed", resume=checkpoint, model="gpt2"):
        assert "is a checkpoint of another model: it has model.model.embed_tokens.weight" in rank["error"]
    for rank in train(tmp_path / "stage", strategy="zero2", precision="bf16-mixed", resume=checkpoint):
        assert "was written at ZeRO stage 3, and this training is at stage 2" in rank["error"]
    train(tmp_path / "ddp", save=[8], max_steps=8)
    for rank in train(tmp_path / "one file", strategy="zero3", resume=str(tmp_path / "ddp" / "step=8.ckpt")):
        assert "is one file, which another strategy wrote, and DeepSpeed resumes from a folder" in rank["error"]


@pytest.mark.rest
def test_full_weights_reach_the_master(tmp_path: Path) -> None:
    """Lightning's load_full_weights fills the model's copy; without the master the first step would undo it."""
    train(tmp_path / "ddp", save=[AFTER])
    file = tmp_path / "ddp" / f"step={AFTER}.ckpt"
    resumed = train(
        tmp_path / "zero3",
        strategy="zero3",
        deepspeed={"load_full_weights": True},
        resume=str(file),
        max_steps=AFTER + 2,
    )
    loaded = torch.load(file, weights_only=True)["state_dict"]
    after = torch.load(tmp_path / "zero3" / "state0.pt", weights_only=True)["weights"]
    check_zeros(resumed)
    for rank in resumed:
        assert {rank["sparsity"][name] for name in PRUNABLE} == {0.5}
    for name in PRUNABLE:  # two steps of Adam move a weight by no more than its learning rate each
        assert (after[name] - loaded[f"model.{name}"]).abs().max() < 3 * 3e-3


# On disk


@pytest.mark.parametrize("kind", only(["zero1", "zero2", "zero3"], [*KINDS]))
def test_the_folder_is_read_as_it_was_trained(kind: str) -> None:
    folder = saved(kind, END)
    weights = torch.load(folder.with_name("state0.pt"), weights_only=True)["weights"]
    checkpoint = TrainerCheckpoint.read(folder)
    precision = KINDS[kind].get("precision", "32-true").split("-")[0]
    dtype = {"bf16": torch.bfloat16, "16": torch.float16, "32": torch.float32}[precision]
    for name, weight in weights.items():
        read = checkpoint.state_dict[f"model.{name}"]
        assert read.dtype == torch.float32
        assert torch.equal(read.to(dtype).float(), weight)
    moments = {"momentum_buffer"} if "SGD" in kind else {"exp_avg", "exp_avg_sq"}
    assert checkpoint.beside is not None
    assert moments <= checkpoint.beside["model.model.norm.weight"].keys()


@pytest.mark.parametrize(
    "kind", only(["zero3", "zero3, resharded"], [*KINDS, *(f"{kind}, resharded" for kind in SHARDED_ADAM)])
)
def test_verify_and_export(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    name, _, again = kind.partition(",")
    checkpoint = resharded(name, AFTER) if again else saved(name, AFTER)
    reports = verify_checkpoint(checkpoint)
    assert len(reports) == 14
    assert all(report.ok for report in reports)
    out = tmp_path / "exported"
    with pytest.warns(UserWarning, match="no tokenizer"):
        exported = export_checkpoint(checkpoint, out)
    assert [report.sparsity for report in exported] == [0.5] * 14
    assert main(["verify", str(out), "--pattern", "2:4"]) == 0
    assert "14 tensors" in capsys.readouterr().out
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    weights = TrainerCheckpoint.read(checkpoint).state_dict
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[f"model.{name}"])


@pytest.mark.parametrize("strategy", only(["zero3"], ["zero3", "zero3 in bf16-mixed", "zero2", "ddp", "fsdp"]))
def test_the_exported_model_is_the_trained_one(tmp_path: Path, strategy: str) -> None:
    """To the bit, as every rank has it at the end: what no checkpoint holds is cast on none of them."""
    name, _, precision = strategy.partition(" in ")
    case = {"strategy": name, "precision": precision or "bf16-true", "configure_model": True, "distributed": False}
    check_zeros(train(tmp_path / "trained", probed=True, save=[8], max_steps=8, **case))
    with pytest.warns(UserWarning, match="no tokenizer"):
        export_checkpoint(tmp_path / "trained" / "step=8.ckpt", tmp_path / "exported", dtype="bfloat16")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported").eval()
    with torch.no_grad():
        logits = model(input_ids=torch.arange(16).unsqueeze(0)).logits
    for rank in range(2):
        assert torch.equal(torch.load(tmp_path / "trained" / f"logits{rank}.pt"), logits)


def copied(folder: Path, kind: str = "zero3") -> Path:
    """A checkpoint that a test may change."""
    return Path(shutil.copytree(saved(kind, AFTER), folder / "copy.ckpt"))


@pytest.mark.parametrize("kind", only(["zero3"], ["zero3", "zero2", "zero0 in bf16"]))
@pytest.mark.parametrize("what", ["master", "moment"])
def test_what_came_back_on_disk_is_found(tmp_path: Path, kind: str, what: str) -> None:
    checkpoint = copied(tmp_path, kind)
    for file in (checkpoint / "checkpoint").glob("*rank_0*optim_states.pt" if kind != "zero0 in bf16" else "*.pt"):
        content = torch.load(file, weights_only=False)
        inside = content["optimizer"] if "optimizer" in content else content["optimizer_state_dict"]
        states = inside.get("optimizer_state_dict") or inside["base_optimizer_state"]
        masters = {"zero3": "fp32_flat_groups", "zero2": "single_partition_of_fp32_groups"}.get(kind, "fp32_groups")
        tensors = inside[masters] if kind != "zero0 in bf16" else inside[masters][0]
        moments = [state["exp_avg"] for state in states["state"].values()]
        for tensor in tensors if what == "master" else moments:
            tensor.data[tensor == 0] = 1e-30
        torch.save(content, file)
    bad = [report for report in verify_checkpoint(checkpoint) if not report.ok]
    assert bad
    assert main(["verify", str(checkpoint)]) == 1
    if what == "master":
        with pytest.raises(NonconformingError, match="do not conform"), pytest.warns(UserWarning, match="tokenizer"):
            export_checkpoint(checkpoint, tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.rest
def test_what_can_not_be_resharded_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="is resharded already"):
        reshard_checkpoint(resharded("zero3", AFTER))
    with pytest.raises(ValueError, match="ZeRO stage 0, where nothing is sharded"):
        reshard_checkpoint(saved("zero0", AFTER))
    with pytest.raises(ValueError, match="exists already"):
        reshard_checkpoint(saved("zero3", AFTER))
    with pytest.raises(ValueError, match=r"knows the moments of Adam .* with another optimizer, resume on the number"):
        reshard_checkpoint(saved("zero3 with SGD", AFTER), tmp_path / "sgd")
    assert not list(tmp_path.iterdir())
    assert main(["reshard", str(tmp_path / "nothing")]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert main(["reshard", str(saved("zero3", BETWEEN)), str(tmp_path / "out"), "--processes", "2"]) == 0
    assert "resume from it on any number of ranks" in capsys.readouterr().out
    assert all(report.ok for report in verify_checkpoint(tmp_path / "out"))


# Folders that lie


def take_that_of_step_5(kind: str, file: Path) -> None:
    """As where a rank was killed amid an overwriting."""
    shutil.copy(saved(kind, BETWEEN) / "checkpoint" / file.name, file)


def add_a_stranger(file: Path) -> None:
    torch.save({**torch.load(file, weights_only=False), "more": Stranger(file.with_name("made"))}, file)


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def make_another_version(file: Path) -> None:
    content = torch.load(file, weights_only=False)
    (state,) = (state for key, state in content["callbacks"].items() if key.startswith("Thanos"))
    state["format"] = content["thanos_lightning"]["format"] = 6
    torch.save(content, file)


STRANGE, SHORT = "{file} holds objects that are not plain values", "{file} is damaged, or was cut short: take another"
CHANGED = "{file} is damaged: some of its bytes are not those that were written"
TORN = "copy.ckpt was not written as a whole: "
LACKS = "lacks the {} states of rank {}: copy the whole folder"
DAMAGES: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    **{
        f"{kind}: of two saves, {what}": (partial(take_that_of_step_5, kind), files, TORN)
        for kind, what, files in [
            ("zero3", "all of one rank", "*rank_0_*"),
            ("zero3", "what Lightning keeps", "*rank_1_*model_states.pt"),
            ("zero3", "masters and moments", "*optim_states.pt"),
            ("zero2", "all of one rank", "*rank_1_*"),
            ("zero2", "the model", "*model_states.pt"),
            ("zero1", "masters and moments", "*optim_states.pt"),
        ]
    },
    "a stranger, masters of rank 0": (add_a_stranger, "*rank_0_*optim_states.pt", STRANGE),
    "a stranger, masters of rank 1": (add_a_stranger, "*rank_1_*optim_states.pt", STRANGE),
    "a stranger, the model": (add_a_stranger, "*rank_1_*model_states.pt", STRANGE),
    "cut short, masters": (cut_short, "*rank_1_*optim_states.pt", SHORT),
    "cut short, the model": (cut_short, "*rank_0_*model_states.pt", SHORT),
    # of a tensor's bytes, which each reads without noticing it; each rank checks other files
    "a changed byte, masters": (change_a_byte, "*rank_1_*optim_states.pt", CHANGED),
    "a changed byte, the model": (change_a_byte, "*rank_0_*model_states.pt", CHANGED),
    "another version": (make_another_version, "*model_states.pt", "has format 6"),
    "masters missing": (Path.unlink, "*rank_0_*optim_states.pt", LACKS.format("optimizer", 0)),
    "a model missing": (Path.unlink, "*rank_1_*model_states.pt", LACKS.format("model", 1)),
    "no model": (Path.unlink, "*model_states.pt", "holds no mp_rank_00_model_states.pt: copy the whole folder"),
    "not written to its end": (Path.unlink, "../latest", "folder of DeepSpeed's that was not written to its end"),
}


@pytest.mark.parametrize(
    "name",
    only(["zero3: of two saves, all of one rank", "a stranger, masters of rank 1", "a model missing"], [*DAMAGES]),
)
def test_a_damaged_folder_is_refused_by_all(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """By the commands, and by all ranks of a training."""
    damage, files, words = DAMAGES[name]
    kind = name.split(":")[0] if ":" in name else "zero3"
    checkpoint = copied(tmp_path, kind)
    changed = list((checkpoint / "checkpoint").glob(files))
    assert changed
    for file in changed:
        damage(file)
    words = words.format(file=changed[0].name)
    capsys.readouterr()
    for command in (["verify"], ["export", str(tmp_path / "out")], ["reshard"]):
        assert main([command[0], str(checkpoint), *command[1:]]) == 2
        assert words in capsys.readouterr().err
    for rank in train(tmp_path / "resumed", resume=str(checkpoint), **KINDS[kind]):
        assert words in rank["error"]
        assert rank["losses"] == []
    assert not checkpoint.with_name(f"{checkpoint.name}-resharded").exists()
    assert not (checkpoint / "checkpoint" / "made").exists()


@pytest.mark.rest
def test_a_resharded_folder_runs_no_code_either(tmp_path: Path) -> None:
    checkpoint = reshard_checkpoint(saved("zero3", BETWEEN), tmp_path / "universal")
    path = checkpoint / "checkpoint" / "zero" / "optimizer_state.pt"
    add_a_stranger(path)
    for rank in train(tmp_path / "resumed", resume=str(checkpoint), **KINDS["zero3"]):
        assert "optimizer_state.pt holds objects that are not plain values" in rank["error"]
    assert not path.with_name("made").exists()


@pytest.mark.rest
@pytest.mark.parametrize("file", ["*rank_1_*optim_states.pt", "*rank_0_*model_states.pt"])
def test_a_trusted_source_may_hold_more(tmp_path: Path, file: str) -> None:
    checkpoint = copied(tmp_path)
    path = next((checkpoint / "checkpoint").glob(file))
    add_a_stranger(path)
    assert main(["reshard", str(checkpoint), str(tmp_path / "out"), "--trusted"]) == 0
    assert path.with_name("made").exists()


@pytest.mark.rest
def test_a_file_that_one_node_lacks_ends_all_ranks(tmp_path: Path) -> None:
    """Nodes with disks of their own have the folder at one place, and not all of it is on each."""
    for rank in range(2):
        shutil.copytree(saved("zero3", AFTER), tmp_path / str(rank) / "copy.ckpt")
    file = "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    (tmp_path / "1" / "copy.ckpt" / "checkpoint" / file).unlink()
    for rank in train(tmp_path / "resumed", resume=f"{tmp_path}/{{rank}}/copy.ckpt", **KINDS["zero3"]):
        assert "1/copy.ckpt/checkpoint lacks the optimizer states of rank 1: copy the whole" in rank["error"]
        assert rank["losses"] == []


@pytest.mark.rest
@pytest.mark.parametrize("kind", ["zero3", "zero1"])
def test_a_folder_that_is_overwritten_appears_whole_or_not_at_all(tmp_path: Path, kind: str) -> None:
    """A rank is killed in its second save under one name: what is there is the first."""
    case = {**KINDS[kind], "save": True, "overwrites": True, "max_steps": 6}
    ended = start(tmp_path / "out", [{"out": str(tmp_path / "out"), **case, "fault": "killed in a save"}])
    assert ended.codes[1] == -9
    assert ended.codes[0] not in (0, -9)
    checkpoint = tmp_path / "out" / "last-one.ckpt"
    assert {report.ok for report in verify_checkpoint(checkpoint)} <= {True}
    assert int(TrainerCheckpoint.read(checkpoint).content["global_step"]) == 4
    check_zeros(train(tmp_path / "out", resume=str(checkpoint), **{**case, "max_steps": 8}), steps=8)
    assert [path.name for path in (tmp_path / "out").glob(".*")] == []
    assert int(TrainerCheckpoint.read(checkpoint).content["global_step"]) == 8
