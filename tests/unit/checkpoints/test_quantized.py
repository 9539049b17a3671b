"""GGUF files, whose reader comes with the quickstart, and what can't be read. tests/serving has the other stores."""

import json
import shutil

import checkpoint_cases
import gguf
import pytest
from checkpoint_cases import PRUNED, failed, names
from safetensors.torch import load_file, save_file

from thanos_lightning.checkpoints.quantized import read_quantized
from thanos_lightning.checkpoints.verify import verify_checkpoint
from thanos_lightning.solver import NM

# fixtures: pytest looks for them among this module's names
trained, exported = checkpoint_cases.trained, checkpoint_cases.exported


def write_gguf(folder, kind, file, change=None):
    """Write a folder's tensors as llama.cpp's converter does: Q8_0 where 32 divides the columns, else float16."""
    tensors = load_file(folder / "model.safetensors")
    if change is not None:
        change(tensors)
    writer = gguf.GGUFWriter(file, kind)
    writer.add_block_count(2)
    by_name = gguf.get_tensor_name_map(gguf.MODEL_ARCH[kind.upper()], 2)
    for name, tensor in tensors.items():
        array = tensor.float().numpy()
        if any(conv1d in name for conv1d in ("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            array = array.T.copy()
        stored = by_name.get_name(name, try_suffixes=(".weight", ".bias"))
        if array.ndim > 1 and array.shape[-1] % 32 == 0:
            q8 = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(stored, gguf.quants.quantize(array, q8), raw_dtype=q8)
        else:
            writer.add_tensor(stored, array.astype("float16" if array.ndim > 1 else "float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@names
@pytest.mark.parametrize("beside", ["sparsity.json", "config.json"])
def test_gguf_file_with_what_was_beside_the_folder_it_was_made_of(exported, tmp_path, name, beside):
    file = write_gguf(exported[name], name, tmp_path / "model.gguf")
    with pytest.raises(ValueError, match=r"does not say what was pruned: lay the sparsity.json"):
        verify_checkpoint(file, NM(2, 4))
    shutil.copy(exported[name] / beside, tmp_path)
    reports = verify_checkpoint(file, NM(2, 4) if beside == "config.json" else None)
    assert len(reports) == {"llama": 14, "gpt2": 8}[name]
    assert not failed(reports)
    tensors = load_file(exported[name] / "model.safetensors")
    read = read_quantized(file)
    for stored in (report.name for report in reports):
        tensor = tensors[stored].float()
        difference = read[stored] - (tensor.t() if name == "gpt2" else tensor)
        assert difference.norm() < 0.02 * tensor.norm()


@names
def test_zeros_that_regrew_in_a_gguf_file(exported, tmp_path, name):
    def regrow(tensors):
        weight = tensors[PRUNED[name]]
        weight[weight == 0] = weight.abs().max() / 2

    file = write_gguf(exported[name], name, tmp_path / "model.gguf", regrow)
    shutil.copy(exported[name] / "sparsity.json", tmp_path)
    (report,) = failed(verify_checkpoint(file))
    assert report.name == PRUNED[name]
    assert report.violations == report.numel // 2 - report.zeros  # a small weight may have become 0


def test_damaged_gguf_file(exported, tmp_path):
    file = tmp_path / "model.gguf"
    shutil.copy(exported["llama"] / "sparsity.json", tmp_path)
    file.write_bytes(write_gguf(exported["llama"], "llama", tmp_path / "whole.gguf").read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"gguf can't read .*model.gguf .*or an undamaged copy"):
        verify_checkpoint(file)


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", None])
def test_stores_of_other_libraries_are_refused(exported, tmp_path, method):
    folder = shutil.copytree(exported["llama"], tmp_path / "quantised")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}))
    with pytest.raises(ValueError, match=f"can't be counted, because {method} quantised it: verify reads"):
        verify_checkpoint(folder)


def test_openvino_folder_is_refused(exported, tmp_path):
    for file in ("config.json", "sparsity.json"):
        shutil.copy(exported["llama"] / file, tmp_path)
    (tmp_path / "openvino_model.xml").touch()
    with pytest.raises(ValueError, match=r"holds openvino_model.xml, and no model.safetensors: give a folder that"):
        verify_checkpoint(tmp_path)


@pytest.mark.parametrize("method", ["torchao", "compressed-tensors"])
def test_what_can_not_be_read_names_the_library(exported, tmp_path, method):
    """Either the library is missing, or it does not know the settings."""
    folder = shutil.copytree(exported["llama"], tmp_path / "quantised")
    config = json.loads((folder / "config.json").read_text())
    settings = {"quant_method": method, "config_groups": 7}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt", "tensor_names": "7"})
    with pytest.raises((ImportError, ValueError), match=rf"pip install {method}|{method} can't read"):
        verify_checkpoint(folder)
