"""Builds Hugging Face models without weights, reads the files in their folders, and keeps buffers as in loaded ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from thanos_lightning.checkpoints.deepspeed_files import require_end
from thanos_lightning.checkpoints.foreign import inside, require_regular
from thanos_lightning.checkpoints.format import sharded_error
from thanos_lightning.checkpoints.lazy import LazyTensors
from thanos_lightning.layers.targets import examples
from thanos_lightning.layers.wrappers import class_of
from thanos_lightning.report.plain import read_as

SHARD_BYTES = 5 * 10**9
_MOST = 4096  # layers of a model, or experts of a layer


def build_model(architecture: str, config: Any, path: Path) -> transformers.PreTrainedModel:
    """Build a model from its configuration, or from the dict of one, without allocating its weights.

    Raises ValueError, which names `path`, if transformers has no class `architecture`, or can't make the model.
    """
    model_class: Any = getattr(transformers, str(architecture), None)
    is_model = isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)
    if not is_model:
        raise ValueError(
            f"{path} holds a model of the class {architecture}, which transformers {transformers.__version__} does not "
            "have: install the version it was trained with. Models with code of their own are not supported"
        )
    if isinstance(config, Mapping):
        _require_sizes(config, path)
    with _naming(path):
        if isinstance(config, Mapping):
            config = model_class.config_class.from_dict(dict(config))
        config._attn_implementation = "eager"  # it may name a kernel on a hub, whose code would be downloaded and run
        with torch.device("meta"):
            model: transformers.PreTrainedModel = model_class(config)
            return model


def read_config(folder: Path) -> transformers.PreTrainedConfig:
    """Read the configuration in a Hugging Face folder. Raises ValueError, which names it, if it can't be right."""
    path = folder / "config.json"
    content = read_as(dict[str, Any], read_json(path), f"{path}: the configuration")
    read_as(list[str] | None, content.get("architectures"), f"{path}: architectures")
    _require_sizes(content, path)
    with _naming(path):
        config: transformers.PreTrainedConfig = transformers.AutoConfig.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
        return config


def first_line(error: BaseException) -> str:
    """The first line of what another package raises, or the error's type if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name the file in what transformers raises, of many kinds, for a configuration that it can't use."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"{path}: transformers {transformers.__version__} can't make a model of its configuration "
            f"({first_line(error)}): use the version that it was trained with, or an undamaged copy"
        ) from error


def _require_sizes(config: Mapping[str, Any], path: Path) -> None:
    for name, value in config.items():
        if isinstance(value, Mapping):
            _require_sizes(value, path)
        elif isinstance(value, int) and str(name).endswith(("layer", "layers", "experts")) and value > _MOST:
            raise ValueError(
                f"{path}: {name} is {value:,}, and no model has more than {_MOST:,}: take an undamaged copy"
            )


def write_model(
    folder: Path, model: transformers.PreTrainedModel, tensors: Mapping[str, Tensor], shard_bytes: int = SHARD_BYTES
) -> None:
    """Write a model as `save_pretrained` does, with each tensor read when its shard is written.

    In memory are at most a shard and the parameters beside each other in one module, of which transformers may make
    others. `model` has no weights of its own, and `tensors` are those of its state dict.
    """
    first = next(name for name, value in model.named_parameters() if value.is_floating_point())
    model.config.dtype = str(tensors[first].dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    names = sorted((name for name in tensors if name not in model.all_tied_weights_keys), key=near)
    shard: dict[str, Tensor] = {}
    files: list[list[str]] = []
    total = 0

    def write() -> None:
        save_file(shard, folder / f"{len(files)}.safetensors", metadata={"format": "pt"})
        files.append([*shard])
        shard.clear()

    for _, group in groupby(names, key=near):
        for name, tensor in revert_weight_conversion(model, {name: tensors[name] for name in group}).items():
            if shard and tensor.nbytes + sum(stored.nbytes for stored in shard.values()) > shard_bytes:
                write()
            shard[name] = tensor.contiguous()
            total += tensor.nbytes
    write()
    if len(files) == 1:
        (folder / "0.safetensors").rename(folder / _WEIGHTS[0])
        return
    index: dict[str, str] = {}
    for number, names_in_file in enumerate(files):
        file = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        (folder / f"{number}.safetensors").rename(folder / file)
        index |= dict.fromkeys(names_in_file, file)
    content = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / _INDEX).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def near(name: str) -> str:
    """What the names of all parameters that transformers may write into one tensor have in common."""
    return ".".join(name.split(".")[:-2])


def parameter_aliases(model: nn.Module) -> dict[str, list[str]]:
    """Map each parameter name to all names of that parameter, the given name first."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: [name, *(other for other in group if other != name)] for group in names.values() for name in group}


@torch.inference_mode(False)  # a validation's mode would stay with the tensors
@torch.no_grad()
def uncast_buffers(module: nn.Module) -> None:
    """Give the buffers that no checkpoint holds the dtype and the values that they have in a loaded model.

    A precision such as "bf16-true" casts a model's buffers with its parameters, and so does `to(dtype)`. But
    transformers makes some buffers in float32 whatever the parameters are, such as rotary frequencies. So a loaded
    model would compute something else than the model that was trained.

    Only buffers of Hugging Face models change, and only where their dtype is not that of a loaded model.
    """
    inside: set[nn.Module] = set()
    for model in module.modules():
        if isinstance(model, transformers.PreTrainedModel) and model not in inside:
            inside.update(model.modules())
            _uncast(model)


def _uncast(model: transformers.PreTrainedModel) -> None:
    dtype = next((weight.dtype for weight in model.parameters() if weight.is_floating_point()), torch.float32)
    buffers = {name: (holder, buffer) for name, holder, buffer in _unsaved(model)}
    if all(buffer.dtype == dtype == torch.float32 for _, buffer in buffers.values()):
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # as transformers does to build a model that it loads
    try:
        with torch.device("meta"):
            loaded = class_of(model)(type(model.config).from_dict(model.config.to_dict()))
    finally:
        torch.set_default_dtype(before)
    for name, part, made in list(_unsaved(loaded)):
        holder, buffer = buffers.get(name, (part, made))
        if buffer.shape != made.shape or buffer.dtype == made.dtype:
            continue
        path, _, last = name.rpartition(".")
        part._buffers[last] = value = torch.zeros_like(made, device="cpu")
        _innermost(loaded, path)._init_weights(part)
        holder._buffers[last] = value.to(buffer.device)


def _unsaved(model: nn.Module) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Name, module and value of each floating point buffer that is not in the state dict."""
    for path, part in model.named_modules():
        for last in part._non_persistent_buffers_set:
            value = part._buffers.get(last)
            if value is not None and value.is_floating_point():
                yield f"{path}.{last}" if path else last, part, value


def _innermost(model: transformers.PreTrainedModel, path: str) -> transformers.PreTrainedModel:
    """The innermost model with a module, which is the model that initialises it."""
    while path:
        part = model.get_submodule(path)
        if isinstance(part, transformers.PreTrainedModel):
            return part
        path = path.rpartition(".")[0]
    return model


# Files


class SafetensorsFiles(LazyTensors):
    """The tensors of a Hugging Face folder or of one .safetensors file. Each is read on access.

    Attributes:
        metadata: What each file says of itself beside its tensors.

    Raises:
        ValueError: If a file is damaged or missing, or the folder holds none.
    """

    def __init__(self, path: Path) -> None:
        read: dict[str, Callable[[], Tensor]] = {}
        self.metadata: list[dict[str, str]] = []
        for file in _weight_files(path) if path.is_dir() else [path]:
            require_regular(file)
            try:
                with safe_open(file, framework="pt") as opened:
                    read |= {name: partial(_read, file, name) for name in opened.keys()}  # noqa: SIM118
                    self.metadata.append(opened.metadata() or {})
            except SafetensorError as error:
                raise ValueError(f"{file} is damaged or no safetensors file ({error}): write it again") from error
        super().__init__(read)


def _read(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt") as opened:
        tensor: Tensor = opened.get_tensor(name)
    return tensor


# In the order in which transformers takes one of them, after those whose names it makes for itself
_INDEX = "model.safetensors.index.json"
_WEIGHTS = ("model.safetensors", _INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")
_OPENVINO = "openvino_model.xml"
_ADAPTER = "adapter_config.json"  # transformers puts the adapter on whatever it has loaded


def _weight_files(folder: Path) -> list[Path]:
    """List the files that transformers would load.

    Raises ValueError if these are not .safetensors files, or if the folder holds other weights beside them.
    """
    loaded = sorted(file.name for file in folder.glob("shard-*-model-*-of-*.safetensors"))[:1]
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if isinstance(config, Mapping) and (name := config.get("transformers_weights")) is not None:
        loaded.append(f"config.json's transformers_weights {name!r}")
    loaded += [name for name in (*_WEIGHTS, _ADAPTER) if (folder / name).exists()]
    if len(loaded) > 1:
        raise ValueError(
            f"{folder} says two things: {loaded[0]} and {loaded[1]} both say what transformers loads. Move what is not "
            "the model out of the folder, or give a .safetensors file"
        )
    if not loaded:
        require_end(folder)
        if (folder / ".metadata").is_file():
            raise sharded_error(folder)
    if not loaded and (folder / _OPENVINO).is_file():
        loaded.append(_OPENVINO)
    if loaded == [_INDEX]:
        return _shards(folder)
    if loaded != ["model.safetensors"]:
        raise ValueError(
            f"{folder} holds {loaded[0] if loaded else 'no weights'}, and no model.safetensors: give a folder that "
            "save_pretrained wrote, a .safetensors file, a .gguf file, or a .ckpt file"
        )
    return [folder / "model.safetensors"]


def _shards(folder: Path) -> list[Path]:
    index = folder / _INDEX
    content = read_as(dict[str, Any], read_json(index), f"{index}: the index")
    names = sorted(set(read_as(dict[str, str], content.get("weight_map"), f"{index}: weight_map").values()))
    missing = [name for name in names if not inside(folder, name, index).exists()]
    if missing:
        raise ValueError(f"{folder} lacks {examples(missing)}, which {_INDEX} names: copy the whole folder")
    return [folder / name for name in names]


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises ValueError if it is no JSON."""
    require_regular(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): restore or remove it") from error
