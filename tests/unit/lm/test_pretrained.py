import json
import os
from pathlib import Path

import pytest
import torch
from toy import tiny_llama
from transformers import LlamaForCausalLM

from thanos_lightning.lm.pretrained import load_pretrained, load_tokenizer


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


@pytest.mark.parametrize(("load", "what"), [(load_pretrained, "model"), (load_tokenizer, "tokenizer")])
def test_what_can_not_be_loaded_is_named(tmp_path, load, what):
    with pytest.raises(FileNotFoundError, match=rf"no {what} is at '.*reordered': give a folder that exists"):
        load(str(tmp_path / "reordered"))
    (tmp_path / "reorder").mkdir()
    with pytest.raises(FileNotFoundError, match=r"did you mean .*/reorder\?"):
        load(str(tmp_path / "reordered"))


def test_a_folder_without_weights_is_named(tmp_path):
    tiny_llama().config.save_pretrained(tmp_path / "bare")
    message = r"no model '.*bare' can be loaded \(.+\): give a folder, or a hub name"
    with pytest.raises(FileNotFoundError, match=message):
        load_pretrained(str(tmp_path / "bare"))


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


def test_on_the_meta_device_the_configuration_is_enough(tiny):
    next(Path(tiny).glob("*.safetensors")).unlink()
    with torch.device("meta"):
        model = load_pretrained(tiny, "bfloat16")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("meta-llama/Llama-3.1-8B", 8_030_261_248),
        ("meta-llama/Llama-3.1-70B", 70_553_706_496),
        ("meta-llama/Llama-3.2-1B", 1_235_814_400),
        ("Qwen/Qwen3-0.6B", 596_049_920),
        ("Qwen/Qwen3-1.7B", 1_720_574_976),
        ("HuggingFaceTB/SmolLM2-135M", 134_515_008),
        ("smollm2-135m", 134_515_008),
    ],
)
def test_the_recipes_models_have_their_shapes_without_a_hub(monkeypatch, name, weights):
    monkeypatch.setenv("XDG_CACHE_HOME", "/nowhere")
    with torch.device("meta"):
        assert load_pretrained(name).num_parameters() == weights
