import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from thanos_lightning import SparsitySchedule, TargetOverride, ThanosPruningCallback
from thanos_lightning.export import NonconformingError, TensorReport, export_checkpoint, verify_checkpoint
from thanos_lightning.solver import NM, Structured, Unstructured

pytestmark = pytest.mark.filterwarnings("ignore:.*names no tokenizer.*")

VOCABULARY = 40
PROMPT = torch.tensor([[3, 5, 7, 11]])


def llama(**changes):
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes | changes))


def gpt2():
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2
        )
    )


class Module(LightningModule):
    def __init__(self, model, frozen=(), **optimizer):
        super().__init__()
        self.model = model
        self.optimizer = optimizer
        for name in frozen:
            model.get_parameter(name).requires_grad_(False)

    def forward(self, **batch):
        return self.model(**batch)

    def training_step(self, batch, batch_idx):
        return self.model(**batch, labels=batch["input_ids"]).loss

    def configure_optimizers(self):
        parameters = self.model.parameters()
        parameters = [entry for entry in parameters if (entry[1] if isinstance(entry, tuple) else entry).requires_grad]
        if self.optimizer.get("groups"):
            matrices = [parameter for parameter in parameters if parameter.dim() > 1]
            others = [parameter for parameter in parameters if parameter.dim() <= 1]
            parameters = [{"params": others, "weight_decay": 0.0}, {"params": matrices}]
        return torch.optim.AdamW(parameters, lr=1e-2)


def train(folder, module, *, steps=3, first=1, precision="32-true", **arguments):
    """A checkpoint of a real training, pruned after `first` steps."""
    torch.manual_seed(0)
    batches = [{"input_ids": torch.randint(3, VOCABULARY, (8,))} for _ in range(8)]
    pruning = ThanosPruningCallback(
        **{"pattern": "2:4", "method": "magnitude", "refine_steps": 0} | arguments,
        schedule=SparsitySchedule(first, first, 1),
    )
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        precision=precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[pruning],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, DataLoader(batches, batch_size=4))
        trainer.save_checkpoint(folder / "trained.ckpt")
    return folder / "trained.ckpt"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Llama (untied head) and GPT-2 (tied head, Conv1D): module and checkpoint, not to be written to."""
    torch.manual_seed(1)
    modules = {"llama": Module(llama()), "gpt2": Module(gpt2())}
    return {name: (module, train(tmp_path_factory.mktemp(name), module)) for name, module in modules.items()}


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    folders = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, (_, checkpoint) in trained.items():
            folders[name] = tmp_path_factory.mktemp("exported") / name
            export_checkpoint(checkpoint, folders[name])
    return folders


@pytest.fixture
def copied(exported, tmp_path):
    """Copies of the exported folders, to be damaged."""
    return {name: Path(shutil.copytree(folder, tmp_path / name)) for name, folder in exported.items()}


def change_folder(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def change_checkpoint(source, target, change):
    content = torch.load(source, weights_only=True)
    change(content)
    torch.save(content, target)
    return target


class NotPlain:
    """Not to be read from a file by running its code."""


def fill(tensor, value):
    """Write to the first entry that is 0."""
    flat = tensor.view(-1)
    flat[flat.eq(0).nonzero()[0]] = value


def failed(reports):
    assert reports
    return [report for report in reports if not report.ok]


PRUNED = {"llama": "model.layers.1.mlp.up_proj.weight", "gpt2": "transformer.h.1.mlp.c_fc.weight"}
names = pytest.mark.parametrize("name", ["llama", "gpt2"])


# Export


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
        "model.layers.0.self_attn.q_proj.weight", (16, 16), "2:4", sparsity=0.5, zeros=128, violations=0
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
    module = Module(llama())
    export_checkpoint(train(tmp_path, module, precision="bf16-true"), tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}


def test_patterns_of_their_own(tmp_path):
    checkpoint = train(
        tmp_path,
        Module(llama()),
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
    assert reports["model.layers.0.self_attn.q_proj.weight"].zeros == int(0.6 * 256)
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
    module = Module(llama())
    module.probe = torch.nn.Linear(8, 4)
    checkpoint = train(tmp_path, module)
    with pytest.warns(UserWarning, match=r"1 pruned tensor.*probe\.weight"):
        reports = export_checkpoint(checkpoint, tmp_path / "out")
    assert len(reports) == 14
    assert len(verify_checkpoint(checkpoint)) == 15


def test_module_that_is_the_model_itself(trained, tmp_path):
    def without_prefix(content):
        content["thanos_lightning"]["model_prefix"] = ""
        content["state_dict"] = {name.removeprefix("model."): value for name, value in content["state_dict"].items()}
        for state in content["callbacks"].values():
            state["masks"] = {name.removeprefix("model."): mask for name, mask in state["masks"].items()}

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

    monkeypatch.setattr("thanos_lightning.export._write_record", fail)
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


# Wrong inputs


def test_missing_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.ckpt does not exist"):
        export_checkpoint(tmp_path / "nowhere.ckpt", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.ckpt does not exist"):
        verify_checkpoint(tmp_path / "nowhere.ckpt")


@pytest.mark.parametrize("kind", ["text", "tensor", "zip", "truncated"])
def test_not_a_checkpoint(trained, tmp_path, kind):
    path = tmp_path / "a.ckpt"
    if kind == "text":
        path.write_text("hello")
    elif kind == "tensor":
        torch.save(torch.zeros(3), path)
    elif kind == "zip":
        import zipfile

        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a", "b")
    else:
        path.write_bytes(trained["llama"][1].read_bytes()[:-100])
    for read in (lambda: export_checkpoint(path, tmp_path / "out"), lambda: verify_checkpoint(path)):
        with pytest.raises(ValueError, match=r"a\.ckpt is damaged or no trainer checkpoint"):
            read()


def test_objects_are_not_unpickled(trained, tmp_path):
    checkpoint = change_checkpoint(
        trained["llama"][1], tmp_path / "a.ckpt", lambda content: content.update(hyper_parameters={"f": NotPlain()})
    )
    with pytest.raises(ValueError, match=r"not plain values.*NotPlain.*add_safe_globals"):
        export_checkpoint(checkpoint, tmp_path / "out")


def test_no_callback(trained, tmp_path):
    checkpoint = change_checkpoint(
        trained["llama"][1], tmp_path / "a.ckpt", lambda content: content.update(callbacks={})
    )
    for read in (lambda: export_checkpoint(checkpoint, tmp_path / "out"), lambda: verify_checkpoint(checkpoint)):
        with pytest.raises(ValueError, match=r"holds no state of a ThanosPruningCallback.*--pattern"):
            read()
    assert len(verify_checkpoint(checkpoint, NM(2, 4))) == 14


def test_no_masks_yet(tmp_path):
    checkpoint = train(tmp_path, Module(llama()), steps=1, first=1)
    content = torch.load(checkpoint, weights_only=True)
    next(iter(content["callbacks"].values()))["masks"] = {}
    torch.save(content, checkpoint)
    for read in (lambda: export_checkpoint(checkpoint, tmp_path / "out"), lambda: verify_checkpoint(checkpoint)):
        with pytest.raises(ValueError, match="no masks yet: it was saved after 1 optimizer steps"):
            read()


def test_sharded_checkpoint(tmp_path):
    (tmp_path / "deep.ckpt" / "checkpoint").mkdir(parents=True)
    (tmp_path / "deep.ckpt" / "latest").write_text("checkpoint")
    for read in (
        lambda: export_checkpoint(tmp_path / "deep.ckpt", tmp_path / "out"),
        lambda: verify_checkpoint(tmp_path / "deep.ckpt"),
    ):
        with pytest.raises(ValueError, match=r"DeepSpeed.*not supported yet"):
            read()


def remove_weight(content):
    del content["state_dict"]["model.model.norm.weight"]


def add_weight(content):
    content["state_dict"]["model.model.adapter"] = torch.zeros(1)


def reshape_weight(content):
    content["state_dict"]["model.model.norm.weight"] = torch.zeros(3)


def rename_class(content):
    content["thanos_lightning"]["architecture"] = "OfTheirOwn"


def remove_note(content):
    del content["thanos_lightning"]


def raise_format(content):
    content["thanos_lightning"]["format"] = 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove_weight, r"do not fit LlamaForCausalLM: missing model\.norm\.weight, unexpected nothing"),
        (add_weight, r"do not fit LlamaForCausalLM: missing nothing, unexpected model\.adapter"),
        (reshape_weight, r"do not fit LlamaForCausalLM .*size mismatch for model\.norm\.weight"),
        (rename_class, "class OfTheirOwn, which transformers .* does not have"),
        (remove_note, "does not say which Hugging Face model it holds"),
        (raise_format, "has format 2, this version reads 1"),
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


# Verify: folders and files


@names
@pytest.mark.parametrize("pattern", [None, NM(2, 4), Unstructured(0.5)])
def test_exported_folder_conforms(exported, name, pattern):
    reports = verify_checkpoint(exported[name], pattern)
    assert len(reports) == {"llama": 14, "gpt2": 8}[name]
    assert not failed(reports)


@names
@pytest.mark.parametrize("pattern", [None, NM(2, 4)])
@pytest.mark.parametrize(
    ("value", "message"),
    [(1e-8, "are not 0"), (-0.0, "1 entries are -0"), (float("nan"), "1 entries are NaN")],
)
def test_filled_zero_in_a_folder(copied, name, value, message, pattern):
    change_folder(copied[name], lambda tensors: fill(tensors[PRUNED[name]], value))
    (report,) = failed(verify_checkpoint(copied[name], pattern))
    assert report.name == PRUNED[name]
    assert report.violations >= 1
    assert message in " ".join(report.problems)


@names
def test_filled_zero_without_a_record(copied, name):
    (copied[name] / "sparsity.json").unlink()
    with pytest.raises(ValueError, match=r"has no sparsity\.json beside it.*--pattern 2:4"):
        verify_checkpoint(copied[name])
    assert not failed(verify_checkpoint(copied[name], NM(2, 4)))
    change_folder(copied[name], lambda tensors: fill(tensors[PRUNED[name]], 1.0))
    (report,) = failed(verify_checkpoint(copied[name], NM(2, 4)))
    assert report == TensorReport(
        PRUNED[name],
        report.shape,
        "2:4",
        sparsity=0.5,
        zeros=torch.Size(report.shape).numel() // 2 - 1,
        violations=1,
        problems=("1 entries more than pattern 2:4 allows are not 0",),
    )


def test_value_where_the_count_is_the_same(copied):
    """A zero that has moved within the tensor shows in the pattern."""

    def move(tensors):
        flat = tensors[PRUNED["llama"]].view(-1)
        fill(flat, 1.0)
        flat[4:8][flat[4:8].nonzero()[0]] = 0

    change_folder(copied["llama"], move)
    assert [report.name for report in failed(verify_checkpoint(copied["llama"]))] == [PRUNED["llama"]]


def test_missing_and_reshaped_tensors(copied):
    def change(tensors):
        del tensors[PRUNED["llama"]]
        key = "model.layers.0.mlp.up_proj.weight"
        tensors[key] = tensors[key][:8].clone()

    change_folder(copied["llama"], change)
    reports = failed(verify_checkpoint(copied["llama"]))
    assert [report.problems for report in reports] == [
        ("the shape is (8, 16), not (24, 16)",),
        ("the tensor is missing",),
    ]
    assert [report.violations for report in reports] == [8 * 16, 24 * 16]
    assert any(report.name == PRUNED["llama"] for report in failed(verify_checkpoint(copied["llama"], NM(2, 4))))


def test_dense_model(tmp_path):
    llama().save_pretrained(tmp_path)
    assert len(failed(verify_checkpoint(tmp_path, NM(2, 4)))) == 14
    assert len(failed(verify_checkpoint(tmp_path, NM(2, 4), targets=["*.up_proj"]))) == 2
    assert len(failed(verify_checkpoint(tmp_path, NM(2, 4), ignore=()))) == 15


def test_pattern_that_does_not_divide_a_layer(tmp_path):
    llama(intermediate_size=18).save_pretrained(tmp_path)
    reports = failed(verify_checkpoint(tmp_path, NM(2, 4), targets=["*.down_proj"]))
    assert "needs an input width divisible by 4" in reports[0].problems[0]


def test_orientation_of_conv1d(tmp_path):
    """2:4 along the rows of the file is not 2:4 along the inputs of a Conv1D."""
    model = gpt2()
    for name, parameter in model.named_parameters():
        if name.split(".")[-2] in ("c_attn", "c_fc", "c_proj") and parameter.dim() == 2:
            parameter.data[:, ::2] = 0
    model.save_pretrained(tmp_path)
    assert len(failed(verify_checkpoint(tmp_path, NM(2, 4)))) == 8
    for name, parameter in model.named_parameters():
        if name.split(".")[-2] in ("c_attn", "c_fc", "c_proj") and parameter.dim() == 2:
            parameter.data.normal_()[::2] = 0
    model.save_pretrained(tmp_path)
    assert not failed(verify_checkpoint(tmp_path, NM(2, 4)))


def test_sharded_folder(exported, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(exported["llama"])
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    assert len(verify_checkpoint(tmp_path, NM(2, 4))) == 14
    assert not failed(verify_checkpoint(tmp_path, NM(2, 4)))
    shutil.copy(exported["llama"] / "sparsity.json", tmp_path)
    assert sum(len(verify_checkpoint(shard)) for shard in shards if holds_layers(shard)) == 14
    shards[0].unlink()
    with pytest.raises(ValueError, match=r"lacks model-00001-of.*copy the whole folder"):
        verify_checkpoint(tmp_path)


def holds_layers(shard):
    return any("proj" in name for name in load_file(shard))


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
    with pytest.raises(ValueError, match="no tensor to check"):
        verify_checkpoint(alone / "model.safetensors", NM(2, 4), targets=["nothing"])
    (alone / "model.safetensors").write_text("no tensors")
    with pytest.raises(ValueError, match="is damaged or no safetensors file"):
        verify_checkpoint(alone / "model.safetensors", NM(2, 4))


def test_nothing_to_verify(tmp_path, exported):
    with pytest.raises(ValueError, match=r"holds no \.safetensors file"):
        verify_checkpoint(tmp_path, NM(2, 4))
    with pytest.raises(ValueError, match="matches no prunable layer"):
        verify_checkpoint(exported["llama"], NM(2, 4), targets=["nothing"])


def test_damaged_record(copied):
    record = copied["llama"] / "sparsity.json"
    record.write_text("{")
    with pytest.raises(ValueError, match=r"sparsity\.json is damaged"):
        verify_checkpoint(copied["llama"])
    record.write_text('{"format": 7}')
    with pytest.raises(ValueError, match=r"sparsity\.json is not of format 1"):
        verify_checkpoint(copied["llama"])


# Verify: trainer checkpoints


@names
def test_checkpoint_conforms(trained, name, recwarn):
    reports = verify_checkpoint(trained[name][1])
    assert not failed(reports)
    assert {report.name.split(".")[0] for report in reports} == {"model"}
    assert not failed(verify_checkpoint(trained[name][1], NM(2, 4)))
    assert not recwarn.list


@names
@pytest.mark.parametrize("value", [1e-8, -0.0, float("nan")])
def test_filled_zero_in_a_checkpoint(trained, tmp_path, name, value):
    key = f"model.{PRUNED[name]}"
    checkpoint = change_checkpoint(
        trained[name][1], tmp_path / "a.ckpt", lambda content: fill(content["state_dict"][key], value)
    )
    (report,) = failed(verify_checkpoint(checkpoint))
    assert report.name == key
    assert "1 pruned entries are not 0" in report.problems


def fill_moments(content, shape, moment, value):
    """Of the last matrix of that shape."""
    states = content["optimizer_states"][0]["state"].values()
    fill([state[moment] for state in states if tuple(state[moment].shape) == shape][-1], value)


@names
@pytest.mark.parametrize("moment", ["exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("value", [1e-8, -0.0])
def test_filled_moment_in_a_checkpoint(trained, tmp_path, name, moment, value):
    key = f"model.{PRUNED[name]}"
    shape = tuple(trained[name][0].state_dict()[key].shape)
    checkpoint = change_checkpoint(
        trained[name][1], tmp_path / "a.ckpt", lambda content: fill_moments(content, shape, moment, value)
    )
    (report,) = failed(verify_checkpoint(checkpoint))
    assert report.name == key
    assert report.problems == (f"1 pruned entries of its moment {moment} are not 0",)


@pytest.mark.parametrize("optimizer", [{"groups": True}, {"frozen": ["model.embed_tokens.weight"]}])
def test_moments_of_groups_and_beside_frozen_parameters(tmp_path, optimizer):
    module = Module(llama(), **optimizer)
    source = train(tmp_path, module)
    checkpoint = change_checkpoint(
        source, tmp_path / "a.ckpt", lambda content: fill_moments(content, (24, 16), "exp_avg", 1.0)
    )
    (report,) = failed(verify_checkpoint(checkpoint))
    assert report.name == f"model.{PRUNED['llama']}"


def test_moments_of_unknown_owners_warn(tmp_path):
    def forget(content):
        del content["thanos_lightning"]["optimizer_parameters"]

    checkpoint = change_checkpoint(train(tmp_path, Module(llama())), tmp_path / "a.ckpt", forget)
    with pytest.warns(UserWarning, match="moments in .* were not checked"):
        assert not failed(verify_checkpoint(checkpoint))


def test_checkpoint_of_another_training(trained, tmp_path):
    def forget(content):
        content["callbacks"] = {}
        del content["thanos_lightning"]

    checkpoint = change_checkpoint(trained["llama"][1], tmp_path / "a.ckpt", forget)
    assert len(verify_checkpoint(checkpoint, NM(2, 4), targets=["*_proj"])) == 14
    with pytest.raises(ValueError, match="no tensor to check"):
        verify_checkpoint(checkpoint, NM(2, 4), targets=["nothing"])
