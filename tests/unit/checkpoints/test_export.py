import json

import checkpoint_cases
import pytest
import torch
from checkpoint_cases import PRUNED, change_checkpoint, failed, fill, names, train, untied_llama
from safetensors.torch import load_file
from toy import VOCABULARY, ToyLM
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from thanos_lightning import TargetOverride
from thanos_lightning.checkpoints.export import NonconformingError, export_checkpoint
from thanos_lightning.checkpoints.verify import TensorReport, verify_checkpoint
from thanos_lightning.solver import NM, Structured

pytestmark = pytest.mark.filterwarnings("ignore:.*names no tokenizer.*")

PROMPT = torch.tensor([[3, 5, 7, 11]])
# fixtures: pytest looks for them among this module's names
trained, exported = checkpoint_cases.trained, checkpoint_cases.exported


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
def test_tied_weights_are_stored_once(trained, exported, name):
    stored = load_file(exported[name] / "model.safetensors")
    assert ("lm_head.weight" in stored) == (name == "llama")


@names
def test_record_counts_what_is_on_disk(exported, name):
    record = json.loads((exported[name] / "sparsity.json").read_text())
    stored = load_file(exported[name] / "model.safetensors")
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


def test_training_dtype_is_kept(tmp_path):
    module = ToyLM(untied_llama())
    export_checkpoint(train(tmp_path, module, precision="bf16-true"), tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}


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


def test_tokenizer(trained, tmp_path):
    from tokenizers import Tokenizer, models

    words = {"[UNK]": 0, **{f"w{index}": index for index in range(1, VOCABULARY)}}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="[UNK]")), unk_token="[UNK]"
    )
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    _, checkpoint = trained["llama"]
    export_checkpoint(checkpoint, tmp_path / "given", tokenizer=tmp_path / "tokenizer")
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path / "given").convert_tokens_to_ids("w7") == 7

    def record(content, name):
        content["thanos_lightning"]["tokenizer"] = str(tmp_path / name)

    recorded = change_checkpoint(checkpoint, tmp_path / "a.ckpt", lambda content: record(content, "tokenizer"))
    export_checkpoint(recorded, tmp_path / "recorded")
    assert (tmp_path / "recorded" / "tokenizer.json").is_file()
    gone = change_checkpoint(checkpoint, tmp_path / "b.ckpt", lambda content: record(content, "gone"))
    with pytest.raises(ValueError, match=r"tokenizer .*gone' that was used in training .*--tokenizer"):
        export_checkpoint(gone, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    none = change_checkpoint(checkpoint, tmp_path / "c.ckpt", lambda content: record(content, "empty"))
    with pytest.warns(UserWarning, match="empty holds no tokenizer.*--tokenizer"):
        export_checkpoint(none, tmp_path / "out")


def test_no_tokenizer_warns(trained, tmp_path):
    with pytest.warns(UserWarning, match="names no tokenizer.*--tokenizer"):
        export_checkpoint(trained["llama"][1], tmp_path / "out")


def test_layers_outside_the_hugging_face_model(tmp_path):
    module = ToyLM(untied_llama())
    module.probe = torch.nn.Linear(8, 4)
    checkpoint = train(tmp_path, module)
    with pytest.warns(UserWarning, match=r"1 pruned tensor.*probe\.weight"):
        reports = export_checkpoint(checkpoint, tmp_path / "out")
    assert len(reports) == 14
    assert len(verify_checkpoint(checkpoint)) == 15


def test_nothing_sparse_inside_the_model_writes_nothing(trained, tmp_path):
    def elsewhere(content):
        for state in content["callbacks"].values():
            for part in ("masks", "pruned"):
                state[part] = {f"other.{name}": value for name, value in state[part].items()}

    checkpoint = change_checkpoint(trained["llama"][1], tmp_path / "a.ckpt", elsewhere)
    with pytest.raises(ValueError, match="none of the 14 pruned tensors"):
        export_checkpoint(checkpoint, tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.ckpt"]


def test_module_that_is_the_model_itself(trained, tmp_path):
    def without_prefix(content):
        content["thanos_lightning"]["model_prefix"] = ""
        content["state_dict"] = {name.removeprefix("model."): value for name, value in content["state_dict"].items()}
        for state in content["callbacks"].values():
            for part in ("masks", "pruned"):
                state[part] = {name.removeprefix("model."): value for name, value in state[part].items()}

    checkpoint = change_checkpoint(trained["gpt2"][1], tmp_path / "a.ckpt", without_prefix)
    assert len(export_checkpoint(checkpoint, tmp_path / "out")) == 8


# Nothing half done


@pytest.mark.parametrize("kind", ["file", "full folder"])
def test_output_must_be_free(trained, tmp_path, kind):
    output = tmp_path / "out"
    if kind == "file":
        output.write_text("")
    else:
        output.mkdir()
        (output / "a").write_text("")
    with pytest.raises(ValueError, match=r"out exists already: give another folder, or remove"):
        export_checkpoint(trained["llama"][1], output)


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
def test_weights_that_broke_their_mask_are_not_exported(trained, tmp_path, value):
    checkpoint = change_checkpoint(
        trained["llama"][1],
        tmp_path / "a.ckpt",
        lambda content: fill(content["state_dict"][f"model.{PRUNED['llama']}"], value),
    )
    with pytest.raises(NonconformingError, match="1 of 14 pruned tensors") as raised:
        export_checkpoint(checkpoint, tmp_path / "out")
    assert [report.name for report in failed(raised.value.reports)] == [PRUNED["llama"]]
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]


# Wrong inputs; what can't be read at all is in test_verify.py


class NotPlain:
    """Not to be read from a file by running its code."""


def test_objects_are_not_unpickled(trained, tmp_path):
    checkpoint = change_checkpoint(
        trained["llama"][1], tmp_path / "a.ckpt", lambda content: content.update(hyper_parameters={"f": NotPlain()})
    )
    with pytest.raises(ValueError, match=r"not plain values.*NotPlain.*add_safe_globals"):
        export_checkpoint(checkpoint, tmp_path / "out")


def remove_weight(content):
    del content["state_dict"]["model.model.norm.weight"]


def add_weight(content):
    content["state_dict"]["model.model.adapter"] = torch.zeros(1)


def adapt_weight(content):
    content["state_dict"]["model.model.layers.0.mlp.up_proj.lora_A.default.weight"] = torch.zeros(1)


def reshape_weight(content):
    content["state_dict"]["model.model.norm.weight"] = torch.zeros(3)
    content["optimizer_states"] = []  # else its moments are of another shape
    content["thanos_lightning"]["optimizer_parameters"] = []


def rename_class(content):
    content["thanos_lightning"]["architecture"] = "OfTheirOwn"


def remove_note(content):
    del content["thanos_lightning"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove_weight, r"do not fit LlamaForCausalLM: missing model\.norm\.weight, unexpected none"),
        (add_weight, r"do not fit LlamaForCausalLM: missing none, unexpected model\.adapter"),
        (adapt_weight, r"has adapters that an export can't merge, such as model\..*lora_A.*: merge them in Python"),
        (reshape_weight, r"do not fit LlamaForCausalLM .*size mismatch for model\.norm\.weight"),
        (rename_class, "class OfTheirOwn, which transformers .* does not have"),
        (remove_note, "does not say which Hugging Face model it holds"),
    ],
)
def test_checkpoint_that_does_not_fit(trained, tmp_path, change, message):
    checkpoint = change_checkpoint(trained["llama"][1], tmp_path / "a.ckpt", change)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        export_checkpoint(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weight_lost_by_tying(trained, tmp_path):
    def untie(content):
        content["state_dict"]["model.lm_head.weight"] = content["state_dict"]["model.lm_head.weight"] + 1

    checkpoint = change_checkpoint(trained["gpt2"][1], tmp_path / "a.ckpt", untie)
    with pytest.raises(ValueError, match=r"lm_head\.weight in .* is tied .* would be lost"):
        export_checkpoint(checkpoint, tmp_path / "out")


def test_unknown_dtype(trained, tmp_path):
    with pytest.raises(ValueError, match="dtype is 'int8': give a floating point type"):
        export_checkpoint(trained["llama"][1], tmp_path / "out", dtype="int8")
