import json
import shutil
from pathlib import Path

import checkpoint_cases
import pytest
import torch
from checkpoint_cases import (
    CHANGED_MASKS,
    PRUNED,
    change_a_byte,
    change_checkpoint,
    failed,
    fill,
    names,
    state_of,
    train,
    untied_llama,
)
from lightning.fabric.utilities.exceptions import MisconfigurationException
from safetensors.torch import load_file, save_file
from toy import ToyLM, adamw
from transformers import AutoModelForCausalLM

from thanos_lightning.checkpoints.export import export_checkpoint
from thanos_lightning.checkpoints.foreign import require_intact
from thanos_lightning.checkpoints.verify import verify_checkpoint
from thanos_lightning.solver import NM, Unstructured

# fixtures: pytest looks for them among this module's names
trained, exported, changed = checkpoint_cases.trained, checkpoint_cases.exported, checkpoint_cases.changed


@pytest.fixture
def copied(exported, tmp_path):
    """Copies of the exported folders, to be damaged."""
    return {name: Path(shutil.copytree(folder, tmp_path / name)) for name, folder in exported.items()}


def change_folder(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@names
@pytest.mark.parametrize("pattern", [None, NM(2, 4), Unstructured(0.5)])
def test_what_was_trained_and_exported_conforms(trained, exported, name, pattern, recwarn):
    for path in (trained[name][1], exported[name]):
        reports = verify_checkpoint(path, pattern)
        assert len(reports) == {"llama": 14, "gpt2": 8}[name]
        assert not failed(reports)
    assert not recwarn.list


@names
@pytest.mark.parametrize("pattern", [None, NM(2, 4)])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (1e-8, "1 entries more than pattern 2:4 allows are not 0"),
        (-0.0, "1 entries are -0"),
        (float("nan"), "1 entries are NaN"),
    ],
)
def test_filled_zero_in_a_folder(copied, name, value, message, pattern):
    change_folder(copied[name], lambda tensors: fill(tensors[PRUNED[name]], value))
    (report,) = failed(verify_checkpoint(copied[name], pattern))
    assert report.name == PRUNED[name]
    assert report.violations == 1 + ("NaN" in message)
    assert message in " ".join(report.problems)


def test_a_zero_that_has_moved_within_the_tensor_is_found(copied):
    def move(tensors):
        flat = tensors[PRUNED["llama"]].view(-1)
        fill(flat, 1.0)
        flat[4:8][flat[4:8].nonzero()[0]] = 0

    change_folder(copied["llama"], move)
    assert [report.name for report in failed(verify_checkpoint(copied["llama"]))] == [PRUNED["llama"]]


def test_missing_and_reshaped_tensors(copied):
    def change(tensors):
        del tensors[PRUNED["llama"]]
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.ones(8, 32)

    change_folder(copied["llama"], change)
    first, second = failed(verify_checkpoint(copied["llama"]))
    assert (first.problems, second.problems) == (("the shape is (8, 32), not (48, 32)",), ("the tensor is missing",))
    assert (first.violations, second.violations) == (8 * 32, 48 * 32)
    assert any(report.name == PRUNED["llama"] for report in failed(verify_checkpoint(copied["llama"], NM(2, 4))))


def test_dense_model_of_which_the_pattern_does_not_divide_a_layer(tmp_path):
    untied_llama(intermediate_size=18).save_pretrained(tmp_path)
    assert len(failed(verify_checkpoint(tmp_path, NM(2, 4)))) == 14
    assert len(failed(verify_checkpoint(tmp_path, NM(2, 4), ignore=()))) == 15
    reports = failed(verify_checkpoint(tmp_path, NM(2, 4), targets=["*.down_proj"]))
    assert ["needs an input width divisible by 4" in report.problems[0] for report in reports] == [True, True]


def test_sharded_folder(exported, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(exported["llama"])
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    assert len(verify_checkpoint(tmp_path, NM(2, 4))) == 14
    assert not failed(verify_checkpoint(tmp_path, NM(2, 4)))
    shutil.copy(exported["llama"] / "sparsity.json", tmp_path)
    of_layers = [shard for shard in shards if any("proj" in name for name in load_file(shard))]
    assert sum(len(verify_checkpoint(shard)) for shard in of_layers) == 14
    shards[0].unlink()
    with pytest.raises(ValueError, match=r"lacks model-00001-of.*copy the whole folder"):
        verify_checkpoint(tmp_path)


def test_single_file(copied, tmp_path):
    file = copied["llama"] / "model.safetensors"
    assert len(verify_checkpoint(file)) == 14
    assert len(verify_checkpoint(file, NM(2, 4))) == 14
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(file, alone)
    # without a configuration each matrix counts, the embedding too
    reports = failed(verify_checkpoint(alone / "model.safetensors", NM(2, 4)))
    assert [report.name for report in reports] == ["model.embed_tokens.weight"]
    assert len(verify_checkpoint(alone / "model.safetensors", NM(2, 4), targets=["*_proj"])) == 14


@pytest.mark.parametrize(
    "other",
    [
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "adapter_config.json",
        "shard-00000-model-00001-of-00001.safetensors",
    ],
)
def test_a_folder_that_says_two_things(copied, other):
    """Whichever of the two transformers loads, or puts on the other, the zeros of one alone say nothing."""
    folder = copied["llama"]
    weight_map = dict.fromkeys(load_file(folder / "model.safetensors"), "model-00001-of-00001.safetensors")
    shutil.copy(folder / "model.safetensors", folder / "model-00001-of-00001.safetensors")
    (folder / other).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    with pytest.raises(ValueError, match="says two things") as error:
        verify_checkpoint(folder)
    assert other in str(error.value)
    assert "model.safetensors and" in str(error.value) or "and model.safetensors" in str(error.value)
    assert not failed(verify_checkpoint(folder / "model.safetensors"))


def test_a_folder_of_transformers_and_of_deepspeed(copied):
    (copied["llama"] / "checkpoint").mkdir()
    (copied["llama"] / "latest").touch()
    with pytest.raises(ValueError, match="is a Hugging Face folder, not a trainer's"):
        verify_checkpoint(copied["llama"])


@pytest.mark.parametrize("loaded", ["pytorch_model.bin", "adapter_config.json", "no weights"])
def test_safetensors_that_transformers_does_not_load(copied, loaded):
    folder = copied["llama"]
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    if loaded != "no weights":
        (folder / loaded).touch()
    with pytest.raises(ValueError, match=f"holds {loaded}, and no model.safetensors: give a folder that"):
        verify_checkpoint(folder)


def fill_moments(content, shape, moment, value):
    """Of the last matrix of that shape."""
    states = content["optimizer_states"][0]["state"].values()
    fill([state[moment] for state in states if tuple(state[moment].shape) == shape][-1], value)


@names
@pytest.mark.parametrize("moment", [None, "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("value", [1e-8, -0.0, float("nan")])
def test_filled_zero_in_a_checkpoint(trained, changed, name, moment, value):
    key = f"model.{PRUNED[name]}"
    shape = tuple(trained[name][0].state_dict()[key].shape)

    def change(content):
        fill_moments(content, shape, moment, value) if moment else fill(content["state_dict"][key], value)

    (report,) = failed(verify_checkpoint(changed(change, name)))
    assert report.name == key
    what = f"1 pruned entries of its moment {moment} are not 0" if moment else "1 pruned entries are not 0"
    assert what in report.problems


def test_moments_of_groups_and_beside_frozen_parameters(tmp_path):
    def grouped_adamw(parameters):
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        others = [parameter for parameter in trained if parameter.dim() <= 1]
        matrices = [parameter for parameter in trained if parameter.dim() > 1]
        return adamw([{"params": others, "weight_decay": 0.0}, {"params": matrices}])

    module = ToyLM(untied_llama(), grouped_adamw)
    module.model.model.embed_tokens.weight.requires_grad_(False)
    change_checkpoint(path := train(tmp_path, module), path, lambda it: fill_moments(it, (48, 32), "exp_avg", 1.0))
    (report,) = failed(verify_checkpoint(path))
    assert report.name == f"model.{PRUNED['llama']}"


def test_moments_of_unknown_owners_warn(changed):
    checkpoint = changed(lambda content: content["thanos_lightning"].pop("optimizer_parameters"))
    with pytest.warns(UserWarning, match="moments in .* were not checked"):
        assert not failed(verify_checkpoint(checkpoint))


def test_checkpoint_of_another_training(changed, tmp_path):
    def forget(content):
        content["callbacks"] = {}
        del content["thanos_lightning"]

    checkpoint = changed(forget)
    with pytest.raises(ValueError, match=r"holds no state of a ThanosPruningCallback: say .* with --pattern"):
        verify_checkpoint(checkpoint)
    with pytest.raises(ValueError, match=r"holds no state of a ThanosPruningCallback: give a checkpoint of a train"):
        export_checkpoint(checkpoint, tmp_path / "out")
    assert len(verify_checkpoint(checkpoint, NM(2, 4), targets=["*_proj"])) == 14
    with pytest.raises(ValueError, match="no tensor to check"):
        verify_checkpoint(checkpoint, NM(2, 4), targets=["nothing"])


def assert_unreadable(path, message):
    for read in (lambda: export_checkpoint(path, path.parent / "out"), lambda: verify_checkpoint(path)):
        with pytest.raises(ValueError, match=message):
            read()
    assert not (path.parent / "out").exists()


def assert_not_resumed(path, message):
    with pytest.raises((ValueError, MisconfigurationException), match=message):
        train(path.parent, ToyLM(untied_llama()), steps=4, resume=path)


@pytest.mark.parametrize("what", CHANGED_MASKS)
def test_masks_and_moments_that_were_changed(changed, what):
    change, message = CHANGED_MASKS[what]
    checkpoint = changed(change)
    if what != "other weights":  # which a verification counts
        assert_unreadable(checkpoint, message)
    assert_not_resumed(checkpoint, message)


@pytest.mark.parametrize("at", [0.3, 0.6, 0.97])
def test_a_changed_byte_anywhere_is_noticed(tmp_path, at):
    file = tmp_path / "a.pt"
    torch.save({"weight": torch.randn(300, 300), "step": 3}, file)
    require_intact(file)
    change_a_byte(file, at)
    with pytest.raises(ValueError, match=r"a\.pt is damaged: some of its bytes are not those that were written"):
        require_intact(file)
    torch.save(torch.ones(3), file, _use_new_zipfile_serialization=False)
    require_intact(file)  # which has no checksums


def test_no_masks_yet(changed):
    checkpoint = changed(lambda content: state_of(content).update(masks={}, pruned={}))
    assert_unreadable(checkpoint, "no masks yet: it was saved after 3 optimizer steps")


def test_half_a_deepspeed_checkpoint(tmp_path):
    (tmp_path / "deep.ckpt" / "checkpoint").mkdir(parents=True)
    (tmp_path / "deep.ckpt" / "latest").write_text("checkpoint")
    assert_unreadable(tmp_path / "deep.ckpt", "holds no mp_rank_00_model_states.pt: copy the whole folder, from all")
