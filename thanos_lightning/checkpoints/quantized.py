"""Reads weights that torchao, llm-compressor or llama.cpp has quantised, as the numbers that they stand for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from torch import tensor as tensor_of

from thanos_lightning.checkpoints.foreign import require_regular
from thanos_lightning.checkpoints.huggingface import SafetensorsFiles, first_line, read_json
from thanos_lightning.checkpoints.lazy import LazyTensors
from thanos_lightning.report.plain import read_as

_CODES = ("weight_packed", "weight")  # where compressed-tensors has a weight's integers


def is_quantized(path: Path) -> bool:
    """Whether the weights of a Hugging Face folder, or of a file, are stored as integers with scales."""
    return path.suffix == ".gguf" or _settings(path) is not None


def read_quantized(path: Path) -> LazyTensors:
    """The tensors of a quantised Hugging Face folder or file, under the names that they had before.

    Each is dequantised on access, by the library that wrote it.

    Raises:
        ImportError: If the library is not installed.
        ValueError: If the library is none of those that can be read, or can't read what is there.
    """
    if path.suffix == ".gguf":
        return _of_gguf(path)
    settings = read_as(dict[str, Any], _settings(path), f"{path}: quantization_config")
    method = settings.get("quant_method")
    if method not in ("torchao", "compressed-tensors"):
        raise ValueError(
            f"the zeros of {path} can't be counted, because {method} quantised it: verify reads what torchao, "
            "llm-compressor and llama.cpp (.gguf) write. Verify the folder that it was made of"
        )
    files = SafetensorsFiles(path)
    weights = _of_torchao(files, path) if method == "torchao" else _of_compressed_tensors(files, settings, path)
    return LazyTensors({**{name: partial(files.__getitem__, name) for name in files}, **weights})


def _settings(path: Path) -> Any:
    config = (path if path.is_dir() else path.parent) / "config.json"
    content = read_json(config) if config.is_file() else None
    return content.get("quantization_config") if isinstance(content, dict) else None


def _of_torchao(files: SafetensorsFiles, path: Path) -> dict[str, Callable[[], Tensor]]:
    with _reading(path, "torchao"):
        from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

    def read(name: str, parts: Sequence[str], metadata: Mapping[str, str]) -> Tensor:
        with _reading(path, "torchao"):
            kept = {name: metadata[name], "tensor_names": json.dumps([name])}
            found, _ = unflatten_tensor_state_dict({part: files[part] for part in parts}, kept)
            return _positive_zeros(found[name].dequantize())

    read_by: dict[str, Callable[[], Tensor]] = {}
    for metadata in files.metadata:
        with _reading(path, "torchao"):
            names: list[str] = json.loads(metadata.get("tensor_names", "[]"))
        for name in names:
            module, _, parameter = name.rpartition(".")
            parts = [part for part in files if part.startswith(f"{module}._{parameter}_")]
            if parts:
                read_by[name] = partial(read, name, parts, metadata)
    return read_by


def _of_compressed_tensors(
    files: SafetensorsFiles, settings: Mapping[str, Any], path: Path
) -> dict[str, Callable[[], Tensor]]:
    with _reading(path, "compressed-tensors"):
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationConfig
        from compressed_tensors.utils import match_name

        schemes = QuantizationConfig.model_validate(settings).config_groups

    def read(module: str) -> Tensor:
        with _reading(path, "compressed-tensors"):
            by_name = [
                scheme for scheme in schemes.values() if any(match_name(module, name) for name in scheme.targets)
            ]
            # A target is a module's name or its class, which only a model knows: of what is stored all are linear
            scheme = (by_name or [scheme for scheme in schemes.values() if "Linear" in scheme.targets])[0]
            compressor = BaseCompressor.get_value_from_registry(scheme.format or settings["format"])
            stored = {
                part: files[f"{module}.{part}"]
                for part in compressor.compression_param_names(scheme)
                if f"{module}.{part}" in files
            }
            return _positive_zeros(compressor.decompress(stored, scheme)["weight"])

    modules = {name.removesuffix(".weight_scale") for name in files if name.endswith(".weight_scale")}
    quantised = [module for module in modules if any(f"{module}.{codes}" in files for codes in _CODES)]
    return {f"{module}.weight": partial(read, module) for module in quantised}


def _of_gguf(file: Path) -> LazyTensors:
    """Read a GGUF file's tensors, each under every name that a Hugging Face folder may have it under.

    The rows of some matrices are in another order there, and all matrices are (out_features, in_features).
    """
    require_regular(file)
    with _reading(file, "gguf"):
        import gguf

        reader = gguf.GGUFReader(file)
        kind = reader.fields["general.architecture"].contents()
        architecture = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[kind]
        blocks = reader.fields[f"{kind}.block_count"].contents()
        aliases = gguf.get_tensor_name_map(architecture, blocks).mapping

    def read(tensor: gguf.ReaderTensor) -> Tensor:
        with _reading(file, "gguf"):
            return _positive_zeros(tensor_of(gguf.quants.dequantize(tensor.data, tensor.tensor_type)))

    tensors = {tensor.name: tensor for tensor in reader.tensors}
    return LazyTensors(
        {
            f"{alias}{ending}": partial(read, tensors[f"{name}{ending}"])
            for alias, (_, name) in aliases.items()
            for ending in (".weight", ".bias")
            if f"{name}{ending}" in tensors
        }
    )


def _positive_zeros(tensor: Tensor) -> Tensor:
    """A scale below 0 makes -0 of the integer that stands for 0, which no store can tell from +0."""
    return tensor + 0


@contextmanager
def _reading(path: Path, library: str) -> Iterator[None]:
    """Name the file in what the library raises, of many kinds, and the library that is missing."""
    try:
        yield
    except ImportError as error:
        raise ImportError(f"{path} is read by {library} ({first_line(error)}): pip install {library}") from error
    except Exception as error:
        raise ValueError(
            f"{library} can't read {path} ({type(error).__name__}: {first_line(error)}): use the version that wrote "
            "it, or an undamaged copy"
        ) from error
