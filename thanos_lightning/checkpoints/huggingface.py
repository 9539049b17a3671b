"""Builds Hugging Face models without weights, and reads the files in their folders."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from thanos_lightning.checkpoints.deepspeed_files import require_end
from thanos_lightning.checkpoints.foreign import inside, require_regular
from thanos_lightning.checkpoints.format import sharded_error
from thanos_lightning.checkpoints.lazy import LazyTensors
from thanos_lightning.models.targets import examples
from thanos_lightning.report.plain import read_as

_MOST = 4096  # layers of a model, or experts of a layer


def build_model(architecture: str, config: Any, path: Path) -> transformers.PreTrainedModel:
    """Build a model from its configuration, or from the dict of one, without allocating its weights.

    Raises ValueError, which names `path`, if transformers has no class `architecture`, or can't make the model.
    """
    found = getattr(transformers, str(architecture), None)
    model_class: Any = found if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) else None
    if model_class is None:
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


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name the file in what transformers raises, of many kinds, for a configuration that it can't use."""
    try:
        yield
    except Exception as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{path}: transformers {transformers.__version__} can't make a model of its configuration ({why}): use the "
            "version that it was trained with, or an undamaged copy"
        ) from error


def _require_sizes(config: Mapping[str, Any], path: Path) -> None:
    for name, value in config.items():
        if isinstance(value, Mapping):
            _require_sizes(value, path)
        elif isinstance(value, int) and str(name).endswith(("layer", "layers", "experts")) and value > _MOST:
            raise ValueError(
                f"{path}: {name} is {value:,}, and no model has more than {_MOST:,}: take an undamaged copy"
            )


def parameter_aliases(model: nn.Module) -> dict[str, list[str]]:
    """Map each parameter name to all names of that parameter, the given name first."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: [name, *(other for other in group if other != name)] for group in names.values() for name in group}


class SafetensorsFiles(LazyTensors):
    """The tensors of a Hugging Face folder or of one .safetensors file. Each is read on access.

    Raises ValueError if a file is damaged or missing, or the folder holds none.
    """

    def __init__(self, path: Path) -> None:
        read: dict[str, Callable[[], Tensor]] = {}
        for file in _weight_files(path) if path.is_dir() else [path]:
            require_regular(file)
            try:
                with safe_open(file, framework="pt") as opened:
                    read |= {name: partial(_read, file, name) for name in opened.keys()}  # noqa: SIM118
            except SafetensorError as error:
                raise ValueError(f"{file} is damaged or no safetensors file ({error}): write it again") from error
        super().__init__(read)

    def stored_name(self, names: Sequence[str]) -> str:
        """Return which of a parameter's names is in the files, because tied weights are stored once."""
        return next((name for name in names if name in self), names[0])


def _read(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt") as opened:
        tensor: Tensor = opened.get_tensor(name)
    return tensor


# In the order in which transformers takes one of them, after those whose names it makes for itself
_INDEX = "model.safetensors.index.json"
_WEIGHTS = ("model.safetensors", _INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")
_ADAPTER = "adapter_config.json"  # transformers puts the adapter on whatever it has loaded


def _weight_files(folder: Path) -> list[Path]:
    """List the files that transformers would load.

    Raises ValueError if these are not .safetensors files, or if the folder holds other weights beside them.
    """
    found = sorted(file.name for file in folder.glob("shard-*-model-*-of-*.safetensors"))[:1]
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if isinstance(config, Mapping) and (name := config.get("transformers_weights")) is not None:
        found.append(f"config.json's transformers_weights {name!r}")
    found += [name for name in (*_WEIGHTS, _ADAPTER) if (folder / name).exists()]
    if len(found) > 1:
        raise ValueError(
            f"{folder} says two things: {found[0]} and {found[1]} both say what transformers loads. Move what is not "
            "the model out of the folder, or give a .safetensors file"
        )
    if not found:
        require_end(folder)
        if (folder / ".metadata").is_file():
            raise sharded_error(folder)
    if found == [_INDEX]:
        return _shards(folder)
    if found != ["model.safetensors"]:
        raise ValueError(
            f"{folder} holds {found[0] if found else 'no weights'}, and no model.safetensors: give a folder that "
            "save_pretrained wrote, a .safetensors file, or a .ckpt file"
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
