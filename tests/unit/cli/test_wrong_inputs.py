"""What a user may get wrong on the command line: the input, the exit status and the line."""

import copy
import json
import os
import re
import resource
import zipfile
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch  # noqa: F401  # its log goes to the stderr of this moment: not one of a test's
import pytest
import torch
from checkpoint_cases import change_a_byte
from toy import Stranger

from thanos_lightning.cli import main
from thanos_lightning.cli.mistakes import users_mistake
from thanos_lightning.cli.parsing import recipes

QUICKSTART = recipes()["quickstart"].read_text(encoding="utf-8")
PATTERN = 'pattern: "2:4".*'
FIT, TINY = ("fit", "--config", "quickstart"), ("fit", "--config", "tiny.yaml")
CHECKPOINT = "run/checkpoints/tiny.ckpt"  # of tiny.yaml, trained for two steps
OF = "of ThanosPruningCallback is"
HELP = "`thanos-lightning fit --trainer.callbacks.help=ThanosPruningCallback` lists all"
Capture = pytest.CaptureFixture[str]
Damage = Callable[[Path], object]


def line_of(capsys: Capture, *arguments: str) -> str:
    """The one line that is said, by exit status 2."""
    try:
        status = main(list(arguments))
    except SystemExit as exit_:
        status = exit_.code  # type: ignore[assignment]  # an int here
    shown = capsys.readouterr().err
    said = [line for line in shown.splitlines() if line.startswith("thanos-lightning: ")]
    assert status == 2, shown
    assert len(said) == 1, shown
    assert "Traceback" not in shown
    assert shown.splitlines()[-1] == said[0]
    return said[0].removeprefix("thanos-lightning: error: ")


# What the recipe says, as a regular expression -> what a user wrote -> the line, or how it begins
WRONG_VALUES = [
    (PATTERN, "pattern: 124", f'pattern {OF} 124: give text in quotes, such as "2:4" (YAML 1.1 '),
    (PATTERN, "sparsity: half", f"sparsity {OF} 'half': give a number or null"),
    (PATTERN, "solver: {method: obc}", f"solver.method {OF} 'obc': choose one of thanos, sparsegpt, wanda, magnitude"),
    (PATTERN, "sparsty: 0.5", f"ThanosPruningCallback has no option sparsty: did you mean sparsity? {HELP}"),
    (PATTERN, "allocation: uniform", f"allocation {OF} 'uniform': give {{by: loss}} or {{by: uni"),
    (PATTERN, "solver: wanda", f"solver {OF} 'wanda': give its options, such as {{method: "),
    (r"calibration:\n +batches: datamodule.*\n.*", "calibration: 5", f"calibration {OF} 5: give its"),
    (PATTERN, "schedule: 0.5", f"schedule {OF} 0.5: give times, such as {{at: [0.1, "),
    (PATTERN, "overrides: [up_proj]", f"overrides {OF} 'up_proj': give a list, such as [{{tar"),
    (PATTERN, "solver: {block_size: 1.5}", f"solver.block_size {OF} 1.5: give a whole number"),
    ("batches: datamodule", "batches: 3", f"calibration.batches {OF} 3: give data"),
    (PATTERN, "schedule: {start_stp: 0}", "SparsitySchedule has no option start_stp: did you mean start_step?"),
    (PATTERN, "schedule: {at: soon}", "at of SparsitySchedule is 'soon': give a list of times, such as [0.1, 0.2]"),
    (PATTERN, "schedule: {at: [soon]}", "a time of at is 'soon': give optimizer steps (int) or a fraction of training"),
    ("learning_rate: .*", "learning_rate: fast", "learning_rate of CausalLM is 'fast': give a number"),
    ("e: cosine", "e: step", "lr_schedule of CausalLM is 'step': choose one of linear, cosine, constant"),
    ("precision: auto", "precision: bf32", "trainer.precision is 'bf32': choose one of transformer-engine, "),
    ("max_steps: .*", "max_steps: many", "trainer.max_steps is 'many': give a whole number"),
    ("max_steps: .*", "max_stps: 40", "fit has no option trainer.max_stps: did you mean trainer.max_steps? "),
    ("seed_everything: 1", "seed_evrything: 1", "fit has no option seed_evrything: did you mean seed_everything? "),
    ("batch_size: .*", "batchsize: 8", "TextData has no option batchsize: did you mean batch_size? "),
    ("ThanosPruningCallback", "ThanosPruningCalback", "class_path is 'thanos_lightning.ThanosPruningCalback': did "),
    ("thanos_lightning.ThanosPruningCallback", "ThanosPruner", "class_path is 'ThanosPruner': did you mean ThanosPru"),
    ("lm.CausalLM", "lm.CausalML", "class_path is 'thanos_lightning.lm.CausalML': did you mean thanos_lightning.lm.C"),
    ("lm.CausalLM", "ml.CausalLM", "class_path is 'thanos_lightning.ml.CausalLM': thanos_lightning has no ml"),
    ("thanos_lightning.lm.CausalLM", "nowhere.LM", "class_path is 'nowhere.LM': no module named 'nowhere': install it"),
    ("lm.TextData", "lm.CausalLM", "data: thanos_lightning.lm.CausalLM is no LightningDataModule: give a class"),
    ("  callbacks:\n", "  callbacks:\n    - 3\n", "trainer.callbacks: 3 is no Callback: give class_path and init_args"),
    ("batch_size: .*", "batch_size: 0", "batch_size is 0: give a whole number of blocks ≥ 1"),
]


@pytest.mark.parametrize(("right", "wrong", "line"), WRONG_VALUES, ids=[wrong.strip() for _, wrong, _ in WRONG_VALUES])
def test_values_in_a_recipe(right: str, wrong: str, line: str, capsys: Capture) -> None:
    mine, replaced = re.subn(right, wrong, QUICKSTART, count=1)
    assert replaced
    Path("mine.yaml").write_text(mine, encoding="utf-8")
    assert line_of(capsys, "fit", "--config", "mine.yaml").startswith(line)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("fit", "-c", "quickstat"), "--config quickstat: there is no such file (in "),
        (("fit", "--config"), "--config has no value: give a recipe's name, such as quickstart, or a YAML file"),
        (("fit",), "no model is given: thanos-lightning fit --config RECIPE.yaml"),
        ((*FIT, "extra"), "unrecognized arguments: extra"),
        ((*FIT, "--trainer.max_stpes=3"), "fit has no option trainer.max_stpes: did you mean trainer.max_steps? "),
        ((*FIT, "--modle.learning_rate", "1"), "fit has no option modle.learning_rate: did you mean model.lear"),
        (
            (*FIT, "--trainer.callbacks.0.ignore", "[*.0.mlp.down_proj, lm_head]"),
            "[*.0.mlp.down_proj, lm_head] is no YAML: expected alphabetic or numeric character, but found '.'; close "
            "each bracket and quote, and quote names that begin with *",
        ),
        ((*FIT, "--trainer.callbacks.0.ignore", "[a, b"), "[a, b is no YAML: expected ',' or ']', but got '<stream e"),
        ((*FIT, "--model.lerning_rate", "1"), "CausalLM has no option lerning_rate: did you mean learning_rate? "),
        (
            (*FIT, "--trainer.callbacks.pattern", "1:4"),
            "--trainer.callbacks.pattern is an option of the last callback, which has none of this name: give the "
            "number of one, from 0, such as --trainer.callbacks.0.pattern",
        ),
        ((*FIT, "--trainer.callbacks.0.patern=3"), "ThanosPruningCallback has no option patern: did you mean pattern?"),
        ((*FIT, "--trainer.callbacks.2.pattern=1:4"), "--trainer.callbacks.2.pattern: there are 2 callbacks, and the "),
        ((*FIT, "--trainer.callbacks.0.pattern"), "--trainer.callbacks.0.pattern has no value: give one, such as "),
        ((), "the following arguments are required: COMMAND"),
        (("prune",), "argument COMMAND: invalid choice: 'prune' (choose from "),
        (
            ("ft", "--config", "quickstart"),
            "argument COMMAND: invalid choice: 'ft' (choose from 'fit', 'validate', 'test', 'recipes', 'plan', "
            "'verify', 'export', 'reshard', 'plot'): did you mean fit? (`thanos-lightning --help` tells more)",
        ),
        (("verify",), "the following arguments are required: checkpoint (`thanos-lightning verify --help` tells more)"),
        (("recipes", "quickstrat"), "'quickstrat' is no recipe or launch file: did you mean quickstart? "),
    ],
)
def test_arguments(arguments: tuple[str, ...], line: str, capsys: Capture) -> None:
    assert line_of(capsys, *arguments).startswith(line)


def test_a_rank_says_which_it_is(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "RANK", "3")
    assert main(["recipes", "nothing"]) == 2
    assert capsys.readouterr().err.startswith("thanos-lightning: rank 3: error: 'nothing' is no recipe")


@pytest.fixture
def there(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of that training, which is the current one."""
    monkeypatch.chdir(trained)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", trained / "datasets")
    return trained


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ((*TINY, "--trainer.max_steps", "0"), "trainer.max_steps is 0, and nothing would be trained: give at least 1"),
        ((*TINY, "--data", "null"), "no data is given to train on: add a data section"),
        ((*TINY, "--trainer.strategy", "fsdp"), "trainer.strategy is 'fsdp', which needs GPUs: on CPUs give ddp, or"),
        ((*TINY, "--trainer.strategy", "dpp"), "trainer.strategy is 'dpp': did you mean ddp? Give auto, ddp, "),
        ((*TINY, "--trainer.strategy=deepspeed_stage_3"), "trainer.strategy is 'deepspeed_stage_3', which needs GPUs"),
        ((*TINY, "--trainer.default_root_dir", "text.txt"), "{folder}/text.txt: file exists: give another path"),
        ((*TINY, "--trainer.default_root_dir", "text.txt/a"), "{folder}/text.txt/a: not a directory: give a path"),
        ((*TINY, "--trainer.callbacks.0.pattern", "3-4"), "pattern='3-4' is no pattern"),
        ((*TINY, "--trainer.callbacks.0.schedule", "{at: [9]}"), "the schedule's first event is at optimizer step 9, "),
        ((*TINY, "--model.model", "empty"), "the model 'empty' can't be loaded (Unrecognized model in empty."),
        ((*TINY, "--model.model", "cut"), "the model 'cut' can't be loaded (Error while deserializing header: "),
        (
            (*TINY, "--model.model", "few"),
            "the tokenizer 'tiny' has 8 tokens and the model 4, and the text holds token 7: give the model's own",
        ),
        ((*TINY, "--data.dataset", "binary.txt"), "dataset 'binary.txt' is no text ('utf-8' codec can't decode byte"),
        ((*TINY, "--ckpt_path", "none.ckpt"), "none.ckpt does not exist: give a file that does"),
        ((*TINY, "--ckpt_path", "run"), "--ckpt_path run is a folder, and no checkpoint: give what is in it, such as "),
        (
            (*TINY, "--ckpt_path", CHECKPOINT, "--model.model", "wide"),
            f"model of CausalLM is 'wide', 'tiny' in {CHECKPOINT}, whose weights would replace it: give --model.model ",
        ),
        ((*TINY, "--trainer.devices", "0"), "`Trainer(devices='0')` value is not a valid input using cpu"),
        (("verify", "nowhere"), "nowhere does not exist"),
        (("verify", "exported", "--sparsity", "0.5"), "--sparsity, --outlier-fraction, --targets and --ignore go with"),
        (("verify", "exported", "--pattern", "2-4"), "pattern='2-4' is no pattern"),
        (("export", CHECKPOINT, "out", "--tokenizer", "/nowhere"), "the tokenizer '/nowhere'"),
        (("export", "nowhere", "out"), "nowhere does not exist"),
        (("export", CHECKPOINT, "text.txt"), "{folder}/text.txt exists already: give another folder, such as "),
        (("export", CHECKPOINT, "out", "--dtype", "int8"), "dtype is 'int8': give a floating point type"),
        (("export", "tiny", "out"), "tiny is a Hugging Face folder, not a trainer's: give a .ckpt, which the "),
        (("export", "run", "out"), "run is damaged or no trainer checkpoint: give a .ckpt file"),
        (("export", CHECKPOINT, "text.txt/out"), "{folder}/text.txt/out: not a directory: give a path whose"),
        (("plot", "run/pruning_report.json", "a.xyz"), "a.xyz has an ending that is no format of pictures: give .png"),
        (("plot", "run/pruning_report.json", "text.txt/a.png"), "text.txt/a.png: not a directory: give a path whose"),
    ],
)
def test_files_and_parts(arguments: tuple[str, ...], line: str, there: Path, capsys: Capture) -> None:
    assert line_of(capsys, *arguments).startswith(line.replace("{folder}", str(there)))


@pytest.mark.usefixtures("there")
def test_a_data_set_of_a_hub_that_cannot_be_reached(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    said = line_of(capsys, *TINY, "--data.dataset", "some/where")
    assert said.startswith("dataset 'some/where' can't be loaded (")
    assert said.endswith("give a hub name that can be reached from here, a local folder or text files")


def test_a_full_disk(there: Path, capsys: Capture) -> None:
    """By the largest size that a file of this process may have, which needs no root."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, limits[1]))
    try:
        assert line_of(capsys, "export", CHECKPOINT, "new/full").startswith(f"{there}/new/full can't be written (")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (there / "new").exists()


def test_going_on_with_other_values(there: Path, caplog: pytest.LogCaptureFixture) -> None:
    changed = ["--model.learning_rate=1e-6", "--model.weight_decay=0.5", "--trainer.max_steps=3", "--data.batch_size=4"]
    saving = ["--trainer.callbacks.1.filename=further", "--trainer.callbacks.1.every_n_train_steps=3"]
    with caplog.at_level("INFO"):
        assert main([*TINY, "--ckpt_path", CHECKPOINT, *changed, *saving]) == 0
    assert [line.partition(": ")[2] for line in caplog.messages if line.startswith("going on")] == [
        f"learning_rate of CausalLM is 1e-06, 5e-05 in {CHECKPOINT}; 1e-06 is taken",
        f"weight_decay of CausalLM is 0.5, 0.0 in {CHECKPOINT}; 0.5 is taken",
        f"batch_size of TextData is 4, 2 in {CHECKPOINT}; 4 is taken",
    ]
    content = torch.load(there / "run" / "checkpoints" / "further.ckpt", weights_only=True)
    (optimizer,) = content["optimizer_states"]
    assert [(group["lr"], group["weight_decay"]) for group in optimizer["param_groups"]] == [(1e-6, 0.5), (1e-6, 0.0)]
    assert content["lr_schedulers"][0]["base_lrs"] == [1e-6, 1e-6]
    assert content["global_step"] == 3


def test_an_empty_folder_becomes_one_that_can_be_read_by_whom_the_umask_lets(there: Path) -> None:
    before = os.umask(0o027)
    try:
        (there / "readable" / "out").mkdir(parents=True)
        assert main(["export", CHECKPOINT, "readable/out"]) == 0
    finally:
        os.umask(before)
    assert [file.name for file in (there / "readable").iterdir()] == ["out"]
    assert (there / "readable" / "out").stat().st_mode & 0o777 == 0o750
    assert {file.stat().st_mode & 0o777 for file in (there / "readable" / "out").iterdir()} == {0o640}


# Files that another program, or somebody else, may have written: what is wrong -> the command -> the line


def pipe(file: Path) -> None:
    file.unlink(missing_ok=True)
    os.mkfifo(file)


def endless(file: Path) -> None:
    file.unlink(missing_ok=True)
    file.symlink_to("/dev/zero")


def compressed(file: Path) -> None:
    with zipfile.ZipFile(file, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/more", bytes(10**7))


def only_weights(file: Path) -> None:
    torch.save({"state_dict": torch.load(file, weights_only=True)["state_dict"]}, file)


def overlapping(file: Path) -> None:
    with zipfile.ZipFile(file, "a") as archive:
        largest = max(archive.filelist, key=lambda part: part.file_size)
        for number in range(9):
            again = copy.copy(largest)
            again.filename = f"archive/more/{number}"
            archive.filelist.append(again)
        archive.comment = b"so that the directory is written"


def aliases(first: str, form: str) -> Damage:
    """Lines of which each names the one before it nine times."""
    lines = [f"{b}: &{b} {form.format(','.join([f'*{a}'] * 9))}\n" for a, b in pairwise("abcdefghi")]
    return as_text("".join([f"a: &a {first}\n", *lines]))


def as_text(text: str, encoding: str = "utf-8") -> Damage:
    return lambda file: file.write_text(text, encoding)


def entry(*keys: Any, value: Any) -> Damage:
    """The JSON in a file, or the content of a checkpoint, with another value at these keys."""

    def change(file: Path) -> None:
        is_json = file.suffix == ".json"
        content = json.loads(file.read_text()) if is_json else torch.load(file, weights_only=True)
        inner = content
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
        file.write_text(json.dumps(content)) if is_json else torch.save(content, file)

    return change


UP = "model.model.layers.0.mlp.up_proj.weight"
STATE, NOTE = ("callbacks", "ThanosPruningCallback"), "thanos_lightning"
RECORD, INDEX, CONFIG = "sparsity.json", "model.safetensors.index.json", "config.json"
OF_UP = ("tensors", UP.removeprefix("model."))
LAYER = ("events", 0, "layers", 0)  # of a report
DEEP, TWO = "[" * 100_000, "says two things: config.json's transformers_weights"
VERIFY, AGAINST, EXPORT = ("verify", "hf"), ("verify", "hf", "--pattern", "2:4"), ("export", "a.ckpt", "out")
GO = [(command, "--config", "a.yaml") for command in ("fit", "plan")]
READ = (("verify", "a.ckpt"), EXPORT)
GO_ON = [(command, "--config", "tiny.yaml", "--ckpt_path", "a.ckpt") for command in ("fit", "validate")]
NO_CHECKPOINT = "is damaged or no trainer checkpoint: give a .ckpt file that "
OUT = ("../a.safetensors", "/a.safetensors", "sub/a.safetensors")
FOLDERS = [
    (RECORD, as_text("[]"), VERIFY, "hf/sparsity.json is not of format 1: use the version"),
    (RECORD, as_text('{"format": 7}'), VERIFY, "hf/sparsity.json is not of format 1: use the version"),
    (RECORD, as_text(DEEP), VERIFY, "hf/sparsity.json is damaged (maximum recursion"),
    (RECORD, entry("tensors", value=[]), VERIFY, "hf/sparsity.json is damaged (tensors is [], not keys"),
    (RECORD, entry("tensors", value={}), VERIFY, "hf has no tensor to check"),
    (RECORD, entry(*OF_UP, value=3), VERIFY, "hf/sparsity.json is damaged (tensors: model.layers.0.mlp.up_pr"),
    (RECORD, entry(*OF_UP, "shape", value="wide"), VERIFY, "hf/sparsity.json is damaged (shape of model.layers"),
    (RECORD, entry(*OF_UP, "zeros", value=None), VERIFY, "hf/sparsity.json is damaged (zeros of model.layers.0"),
    (RECORD, entry(*OF_UP, "transposed", value=0), VERIFY, "hf/sparsity.json is damaged (transposed of model.la"),
    (RECORD, entry(*OF_UP, "pattern", value=24), VERIFY, "hf/sparsity.json is damaged (a pattern's name is 24, "),
    (RECORD, entry(*OF_UP, "sparsity", value="x"), VERIFY, "hf/sparsity.json is damaged (sparsity of 2:4 is 'x'"),
    (RECORD, Path.unlink, VERIFY, "hf has no sparsity.json beside it: say what to check with --pattern, such as"),
    (RECORD, endless, VERIFY, "hf has no sparsity.json beside it: say what to check with --pattern, "),
    (INDEX, as_text("[]"), VERIFY, "hf/model.safetensors.index.json: the index is [], not keys and values"),
    (INDEX, as_text(DEEP), VERIFY, "hf/model.safetensors.index.json is damaged (maximum recursion"),
    (INDEX, as_text('{"weight_map": {"a": 3}}'), VERIFY, "hf/model.safetensors.index.json: weight_map.a is 3, not te"),
    *((INDEX, as_text(json.dumps({"weight_map": {"a": to}})), VERIFY, f"hf/{INDEX} has the name {to!r}") for to in OUT),
    (CONFIG, entry("transformers_weights", value="other"), VERIFY, f"hf {TWO} 'other' and model.safetensors both say"),
    (CONFIG, as_text("null"), AGAINST, "hf/config.json: the configuration is None, not keys and values"),
    (CONFIG, entry("architectures", value=5), AGAINST, "hf/config.json: architectures is 5, not a list"),
    (CONFIG, entry("architectures", value=["logging"]), AGAINST, "hf holds a model of the class logging, which"),
    (CONFIG, entry("model_type", value="none"), AGAINST, "hf/config.json: transformers "),
    (CONFIG, entry("hidden_size", value="wide"), AGAINST, "hf/config.json: transformers "),
    (CONFIG, entry("hidden_size", value=2**62), AGAINST, "hf: transformers "),
    (CONFIG, entry("num_hidden_layers", value=10**6), AGAINST, "hf/config.json: num_hidden_layers is 1,000,000"),
    ("model.safetensors", pipe, VERIFY, "hf/model.safetensors is no regular file but a device or a pipe: give a file"),
    ("model.safetensors", as_text("x"), VERIFY, "hf/model.safetensors is damaged or no safetensors file ("),
]
OF_ALL = [  # all that reads a checkpoint
    (pipe, "is no regular file but a device or a pipe: give a file"),
    (compressed, "has a compressed part (archive/more), which torch.save never writes and which may become larger"),
    (as_text("hello"), NO_CHECKPOINT),
    (as_text("PK\5\6" + 18 * "\0"), NO_CHECKPOINT),  # a zip file
    (lambda file: os.truncate(file, file.stat().st_size - 100), NO_CHECKPOINT),
    (lambda file: torch.save(torch.zeros(3), file), NO_CHECKPOINT),
    (lambda file: torch.save({"weights": 1}, file), NO_CHECKPOINT),
    (entry(*STATE, "masks", value=None), "is damaged (masks in the callback's state is None, not keys and v"),
]
CHECKPOINTS = [
    (entry(*STATE, "format", value=6), "has format 6, this version reads 7: use the version"),
    (overlapping, "has parts of "),
    (entry("more", value=Stranger(Path("out"))), "holds objects that are not plain values ("),
    (entry("callbacks", value=[1]), "is damaged (callbacks is [1], not keys and values)"),
    (entry(*STATE, value="text"), "is damaged (the callback's state is 'text', not keys and values)"),
    (entry(*STATE, "masks", UP, value=3), "is damaged (masks in the callback's state: model.model.layers.0."),
    (entry(*STATE, "masks", UP, "bits", value=torch.ones(32)), "is damaged (a mask has torch.float32 (32,) for"),
    (entry(*STATE, "masks", UP, "bits", value="text"), "is damaged (a mask's bits is 'text', not Tensor)"),
    (entry(*STATE, "masks", UP, "shape", value=[16]), "is damaged (a mask's shape is (16,), not a list of 2)"),
    (entry(*STATE, "masks", UP, "pattern", value="1:0"), "is damaged (n:m = 1:0 keeps n of every m weights and"),
    (entry(*STATE, "arguments", value={"a": 1}), "is damaged (arguments in the callback's state: a is 1, not t"),
    (entry(NOTE, value=7), "is damaged (the callback's note is 7, not keys and values)"),
    (entry(NOTE, "config", value=[]), "is damaged (config in the callback's note is [], not keys and values)"),
    (entry(NOTE, "adapters", value={}), "is damaged (adapters in the callback's note lacks "),
    (entry(NOTE, "optimizer_parameters", value=[]), "is damaged (it has 1 optimizers, and its note names the p"),
    (entry(NOTE, "optimizer_parameters", value=[[]]), "is damaged (optimizer 0 has a state of parameter 11, an"),
    (entry("optimizer_states", value=5), "is damaged (optimizer_states is 5, not a list)"),
    (entry("optimizer_states", 0, "state", value=[1]), "is damaged (the state of optimizer 0 is [1], not keys "),
]
UNFIT = "the weights in a.ckpt do not fit LlamaForCausalLM:"
EXPORTS = [
    (entry(NOTE, "format", value=6), "a.ckpt has format 6, this version reads 7: use the version"),
    (entry(NOTE, "architecture", value="AutoConfig"), "a.ckpt holds a model of the class AutoConfig, which tra"),
    (
        entry(NOTE, "architecture", value=None),
        "a.ckpt does not say which Hugging Face model it holds: train a LightningModule that keeps a transformers "
        "model as a submodule, or load the sparse weights by torch.load('a.ckpt', weights_only=True)['state_dict']",
    ),
    (entry(NOTE, "config", value=None), "a.ckpt is damaged (its note has no config): take another checkpoint"),
    (entry(NOTE, "config", "num_hidden_layers", value=10**5), "a.ckpt: num_hidden_layers is 100,000, and no "),
    (entry(NOTE, "config", "hidden_size", value="wide"), "a.ckpt: transformers "),
    (entry("state_dict", "model.more", value=torch.ones(1)), f"{UNFIT} missing none, unexpected more; "),
    (entry("state_dict", f"{UP}.lora_A.b.weight", value=torch.ones(1)), "a.ckpt has adapters that an export can't"),
    (entry("state_dict", UP, value="text"), f"{UNFIT} missing {UP.removeprefix('model.')}"),
    (entry(*STATE, "report", "events", value=7), "the report: events is 7, not a list"),
]
CONFIGURATIONS = [
    (as_text(""), "--config a.yaml is empty: give a YAML file as `thanos-lightning recipes quickstart` prints one"),
    (as_text("- 1\n"), "--config a.yaml holds no keys: give a YAML file as "),
    (as_text("a: [1\nb: }\n"), "--config a.yaml is no YAML: expected ',' or ']', but got ':' in line 2"),
    (as_text("a", "utf-16"), "--config a.yaml is no YAML: 'utf-8' codec can't decode byte 0xff in position 0"),
    (Path.mkdir, "--config a.yaml is a folder: give a YAML file, or a recipe's name"),
    (pipe, "a.yaml is no regular file but a device or a pipe: give a file"),
    (aliases("[1]", "[{}]"), "--config a.yaml is no YAML: with its aliases (*) written out it has more t"),
    (aliases("{k: 1}", "{{<<: [{}]}}"), "--config a.yaml is no YAML: with its aliases (*) written out it h"),
    (as_text("[" * 500), "--config a.yaml is no YAML: its brackets are nested too deeply"),
    (as_text("a: &a [*a]\n"), "--config a.yaml is no YAML: with its aliases (*) written out it has more than"),
]
REPORTS = [
    (as_text("[]"), "report.json is no pruning report (the report is [], not keys and values): give the prun"),
    (as_text(DEEP), "report.json is no pruning report (maximum recursion depth"),
    (as_text("{}"), "report.json is no pruning report (the report: events is None, not a list): give the prun"),
    (entry(*LAYER, "name", value=3), "report.json is no pruning report (the report: events.layers.name is 3"),
    (entry(*LAYER, "shape", value=[0, 8]), "report.json is no pruning report (the report has a layer without"),
    (entry("events", value=[]), "the report has no event: nothing to plot"),
    (pipe, "report.json does not exist: give the pruning_report.json of a training"),
]
FILES = [
    ("a.ckpt", entry(*STATE, "format", value=6), (("verify", "a.ckpt", "--pattern=2:4"),), "a.ckpt has format 6"),
    *((f"hf/{file}", damage, (command,), line) for file, damage, command, line in FOLDERS),
    *(("a.ckpt", damage, READ, f"a.ckpt {line}") for damage, line in CHECKPOINTS),
    *(("a.ckpt", damage, (EXPORT,), line) for damage, line in EXPORTS),
    *(("a.ckpt", damage, (*READ, *GO_ON), f"a.ckpt {line}") for damage, line in OF_ALL),
    ("a.ckpt", entry("hyper_parameters", value={}), [(*GO_ON[0], "--model.model=wide")], "a.ckpt is of another "),
    ("a.ckpt", change_a_byte, (*READ, *GO_ON), "a.ckpt is damaged: some of its bytes are not those that were writ"),
    ("a.ckpt", only_weights, (EXPORT,), "a.ckpt holds no state of a ThanosPruningCallback: give"),
    ("a.ckpt", only_weights, GO_ON, "--ckpt_path a.ckpt holds weights and nothing of a training: give a .ckpt that "),
    *(("a.yaml", damage, GO, line) for damage, line in CONFIGURATIONS),
    *(("report.json", damage, (("plot", "report.json", "a.png"),), line) for damage, line in REPORTS),
]


@pytest.mark.parametrize(("file", "damage", "commands", "line"), FILES)
def test_what_is_wrong_with_a_file_is_said(
    copied: Path, file: str, damage: Damage, commands: Sequence[Sequence[str]], line: str, capsys: Capture
) -> None:
    if file == f"hf/{INDEX}":
        (copied / "hf" / "model.safetensors").unlink()
    damage(copied / file)
    for command in commands:
        assert line_of(capsys, *command).startswith(line)
    assert not (copied / "out").exists()


def test_deepspeed_that_is_not_installed(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning.pytorch.strategies.deepspeed._DEEPSPEED_AVAILABLE", False)
    said = line_of(capsys, "fit", "--config", "quickstart-zero3-cpu")
    assert said.startswith("thanos_lightning.CPUDeepSpeed: To use the `DeepSpeedStrategy`, you must have DeepSpeed ins")


def test_a_value_that_deepspeed_refuses() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    with pytest.raises(ValueError, match="stage") as refused:
        DeepSpeedZeroConfig(stage=9)
    assert users_mistake(refused.value) == "DeepSpeedZeroConfig: stage is 9: Input should be 0, 1, 2, 3 or 3"
