import json

import checkpoint_cases
import pytest
import torch
from checkpoint_cases import PRUNED, failed, fill, names, state_of, train, untied_llama
from safetensors.torch import load_file
from toy import LETTERS, Stranger, ToyLM, save_tiny
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from thanos_lightning import TargetOverride
from thanos_lightning.checkpoints.export import NonconformingError, export_checkpoint
from thanos_lightning.checkpoints.verify import TensorReport, verify_checkpoint
from thanos_lightning.solver import NM, Structured

pytestmark = pytest.mark.filterwarnings("ignore:.*names no tokenizer.*")

PROMPT = torch.tensor([[3, 5, 7, 11]])
# fixtures: pytest looks for them among this module's names
trained, exported, changed = checkpoint_cases.trained, checkpoint_cases.exported, checkpoint_cases.changed


@names
def test_exported_model_is_the_trained_one(trained, exported, name):
    module, _ = trained[name]
    loaded = AutoModelForCausalLM.from_pretrained(exported[name])
    assert type(loaded) is type(module.model)
    assert loaded.dtype == torch.float32
    torch.testing.assert_close(loaded(PROMPT).logits, module.model.eval()(PROMPT).logits, rtol=0, atol=0)
    assert loaded.generate(PROMPT, max_new_tokens=4, do_sample=False).shape[1] > PROMPT.shape[1]
    assert (exported[name] / "generation_config.json").is_file()


@names
def test_record_counts_what_is_on_disk(exported, name):
    record = json.loads((exported[name] / "sparsity.json").read_text())
    stored = load_file(exported[name] / "model.safetensors")
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


def test_reports_follow_the_model(trained, tmp_path):
    reports = export_checkpoint(trained["llama"][1], tmp_path / "out")
    assert reports[0] == TensorReport(
        "model.layers.0.self_attn.q_proj.weight", (32, 32), "2:4", sparsity=0.5, zeros=512, violations=0
    )
    assert [report.name.split(".")[2] for report in reports] == ["0"] * 7 + ["1"] * 7


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
    assert reports["model.layers.0.mlp.up_proj.weight"].pattern == "1:4"
    assert reports["model.layers.0.self_attn.o_proj.weight"].pattern == "structured"
    assert reports["model.layers.0.self_attn.q_proj.weight"].pattern == "unstructured"
    assert reports["model.layers.0.self_attn.q_proj.weight"].zeros == int(0.6 * 1024)
    assert not failed(verify_checkpoint(tmp_path / "out"))
    assert not failed(verify_checkpoint(checkpoint))
    one = ("*.up_proj",)
    assert not failed(verify_checkpoint(tmp_path / "out", NM(1, 4, 0.25), targets=one))
    assert not failed(verify_checkpoint(tmp_path / "out", Structured(0.25), targets=["*.o_proj"]))
    assert {report.name.split(".")[4] for report in failed(verify_checkpoint(tmp_path / "out", NM(1, 4)))} >= {
        "up_proj"
    }


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
    """All parameters, of which the names begin with the old prefix."""
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


# Nothing half done


def test_output_must_be_free(trained, tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(ValueError, match=r"out exists already: give another folder, or remove"):
        export_checkpoint(trained["llama"][1], tmp_path / "out")


def test_empty_output_is_free(trained, tmp_path):
    (tmp_path / "out").mkdir()
    export_checkpoint(trained["llama"][1], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_nothing_is_left_after_an_error(trained, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("thanos_lightning.checkpoints.export.write_record", fail)
    with pytest.raises(OSError, match="disk full"):
        export_checkpoint(trained["llama"][1], tmp_path / "new" / "deep" / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [0.5, -0.0, float("nan")])
def test_weights_that_broke_their_mask_are_not_exported(changed, tmp_path, value):
    checkpoint = changed(lambda content: fill(content["state_dict"][f"model.{PRUNED['llama']}"], value))
    with pytest.raises(NonconformingError, match="1 of 14 pruned tensors") as raised:
        export_checkpoint(checkpoint, tmp_path / "out")
    assert [report.name for report in failed(raised.value.reports)] == [PRUNED["llama"]]
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]


# Wrong inputs; what can't be read at all is in test_verify.py


def test_missing_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.ckpt does not exist"):
        export_checkpoint(tmp_path / "nowhere.ckpt", tmp_path / "out")


def test_objects_are_not_unpickled(changed, tmp_path):
    checkpoint = changed(lambda content: content.update(hyper_parameters={"f": Stranger(tmp_path / "made")}))
    with pytest.raises(ValueError, match=r"not plain values .*add_safe_globals"):
        export_checkpoint(checkpoint, tmp_path / "out")
    assert not (tmp_path / "made").exists()


NORM, ADAPTER = "model.norm.weight", "model.layers.0.mlp.up_proj.lora_A.default.weight"


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (NORM, None, r"do not fit LlamaForCausalLM: missing model\.norm\.weight, unexpected none"),
        ("model.adapter", torch.zeros(1), r"do not fit LlamaForCausalLM: missing none, unexpected model\.adapter"),
        (ADAPTER, torch.zeros(1), r"has adapters that an export can't merge, such as model\..*lora_A.*: merge them"),
        (NORM, torch.zeros(3), r"do not fit LlamaForCausalLM .*size mismatch for model\.norm\.weight"),
    ],
)
def test_checkpoint_that_does_not_fit(changed, tmp_path, name, tensor, message):
    def change(content):
        content["state_dict"][f"model.{name}"] = tensor
        if tensor is None:
            del content["state_dict"][f"model.{name}"]
        content["thanos_lightning"]["optimizer_parameters"] = None  # whose moments may be of another shape

    with pytest.raises(ValueError, match=f"(?s){message}"):
        export_checkpoint(changed(change), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weight_lost_by_tying(changed, tmp_path):
    def untie(content):
        content["state_dict"]["model.lm_head.weight"] = content["state_dict"]["model.lm_head.weight"] + 1

    with pytest.raises(ValueError, match=r"lm_head\.weight in .* is tied .* would be lost"):
        export_checkpoint(changed(untie, "gpt2"), tmp_path / "out")


def test_unknown_dtype(trained, tmp_path):
    with pytest.raises(ValueError, match="dtype is 'int8': give a floating point type"):
        export_checkpoint(trained["llama"][1], tmp_path / "out", dtype="int8")
