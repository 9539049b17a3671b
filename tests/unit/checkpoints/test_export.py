import json

import checkpoint_cases
import pytest
import torch
from checkpoint_cases import PRUNED, failed, fill, names, state_of, train, untied_llama
from safetensors.torch import load_file
from toy import LETTERS, ToyLM, save_tiny
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from thanos_lightning import TargetOverride
from thanos_lightning.checkpoints.export import NonconformingError, export_checkpoint
from thanos_lightning.checkpoints.verify import verify_checkpoint
from thanos_lightning.solver import NM, Structured

pytestmark = pytest.mark.filterwarnings("ignore:.*names no tokenizer.*")

# fixtures: pytest looks for them among this module's names
trained, exported, changed = checkpoint_cases.trained, checkpoint_cases.exported, checkpoint_cases.changed


@names
def test_record_counts_what_is_on_disk(exported, name):
    record = json.loads((exported[name] / "sparsity.json").read_text())
    stored = load_file(exported[name] / "model.safetensors")
    assert (exported[name] / "generation_config.json").is_file()
    assert ("lm_head.weight" in stored) == (name == "llama")  # what is tied is stored once
    assert record["format"] == 1
    assert record["sparsity"] == 0.5
    assert len(record["tensors"]) == {"llama": 14, "gpt2": 8}[name]
    for tensor_name, entry in record["tensors"].items():
        assert entry == {
            "shape": list(stored[tensor_name].shape),
            "pattern": "2:4",
            "sparsity": 0.5,
            "outlier_fraction": 0.0,
            "zeros": int(stored[tensor_name].eq(0).sum()),
            "transposed": name == "gpt2",
        }


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
@names
def test_zeros_survive_a_cast(trained, tmp_path, name, dtype):
    reports = export_checkpoint(trained[name][1], tmp_path / "out", dtype=dtype)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    expected = torch.bfloat16 if dtype == "bfloat16" else dtype
    assert {tensor.dtype for tensor in stored.values()} == {expected}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == expected
    for report in reports:
        assert report.zeros == int(stored[report.name].eq(0).sum())
    assert not failed(verify_checkpoint(tmp_path / "out"))


def test_patterns_of_their_own(tmp_path):
    checkpoint = train(
        tmp_path,
        ToyLM(untied_llama()),
        pattern="unstructured",
        sparsity=0.6,
        overrides=[
            TargetOverride(["*.up_proj"], "1:4", outlier_fraction=0.25),
            TargetOverride(["*.o_proj"], "structured", sparsity=0.25),
        ],
    )
    reports = {report.name: report for report in export_checkpoint(checkpoint, tmp_path / "out")}
    kinds = [report.pattern for name, report in reports.items() if name.startswith("model.layers.0.")]
    assert kinds == [*["unstructured"] * 3, "structured", "unstructured", "1:4", "unstructured"]
    assert reports["model.layers.0.self_attn.q_proj.weight"].zeros == int(0.6 * 1024)
    assert not failed(verify_checkpoint(tmp_path / "out"))
    assert not failed(verify_checkpoint(checkpoint))
    assert not failed(verify_checkpoint(tmp_path / "out", NM(1, 4, 0.25), targets=["*.up_proj"]))
    assert not failed(verify_checkpoint(tmp_path / "out", Structured(0.25), targets=["*.o_proj"]))
    assert len(failed(verify_checkpoint(tmp_path / "out", NM(1, 4), targets=["*.up_proj"]))) == 2


def test_tokenizer(trained, changed, tmp_path):
    save_tiny(tmp_path / "tokenizer", LETTERS)
    export_checkpoint(trained["llama"][1], tmp_path / "given", tokenizer=tmp_path / "tokenizer")
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path / "given").convert_tokens_to_ids("f") == 7

    def recorded(name):
        return changed(lambda content: content["thanos_lightning"].update(tokenizer=str(tmp_path / name)))

    export_checkpoint(recorded("tokenizer"), tmp_path / "recorded")
    assert (tmp_path / "recorded" / "tokenizer.json").is_file()
    with pytest.raises(ValueError, match=r"tokenizer .*gone' that was used in training .*--tokenizer"):
        export_checkpoint(recorded("gone"), tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.warns(UserWarning, match="empty holds no tokenizer.*--tokenizer"):
        export_checkpoint(recorded("empty"), tmp_path / "out")


def test_layers_outside_the_hugging_face_model(tmp_path):
    module = ToyLM(untied_llama())
    module.probe = torch.nn.Linear(8, 4)
    checkpoint = train(tmp_path, module)
    with pytest.warns(UserWarning, match=r"1 pruned tensor.*probe\.weight"):
        reports = export_checkpoint(checkpoint, tmp_path / "out")
    assert len(reports) == 14
    assert len(verify_checkpoint(checkpoint)) == 15


def rename(content, old, new):
    for part, place in (("masks", state_of(content)), ("pruned", state_of(content)), ("state_dict", content)):
        place[part] = {name.replace(old, new, 1): value for name, value in place[part].items()}


def test_nothing_sparse_inside_the_model_writes_nothing(changed, tmp_path):
    checkpoint = changed(lambda content: rename(content, "model.", "other."))
    with pytest.raises(ValueError, match="none of the 14 pruned tensors"):
        export_checkpoint(checkpoint, tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.ckpt"]


def test_module_that_is_the_model_itself(changed, tmp_path):
    def without_prefix(content):
        content["thanos_lightning"]["model_prefix"] = ""
        rename(content, "model.", "")

    assert len(export_checkpoint(changed(without_prefix, "gpt2"), tmp_path / "out")) == 8


@pytest.mark.parametrize("value", [0.5, -0.0, float("nan")])
def test_weights_that_broke_their_mask_are_not_exported(changed, tmp_path, value):
    checkpoint = changed(lambda content: fill(content["state_dict"][f"model.{PRUNED['llama']}"], value))
    with pytest.raises(NonconformingError, match="1 of 14 pruned tensors") as raised:
        export_checkpoint(checkpoint, tmp_path / "out")
    assert [report.name for report in failed(raised.value.reports)] == [PRUNED["llama"]]
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]


def test_a_weight_of_another_shape(changed, tmp_path):
    def change(content):
        content["state_dict"]["model.model.norm.weight"] = torch.zeros(3)
        content["thanos_lightning"]["optimizer_parameters"] = None  # whose moments are of another shape

    with pytest.raises(ValueError, match=r"(?s)do not fit LlamaForCausalLM .*size mismatch for model\.norm\.weight"):
        export_checkpoint(changed(change), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weight_lost_by_tying(changed, tmp_path):
    other = {"model.lm_head.weight": torch.ones(64, 32)}
    with pytest.raises(ValueError, match=r"lm_head\.weight in .* is tied .* would be lost"):
        export_checkpoint(changed(lambda content: content["state_dict"].update(other), "gpt2"), tmp_path / "out")
