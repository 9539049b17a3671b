"""Builds Hugging Face models without weights, and reads the files in their folders."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from thanos_lightning.checkpoints.deepspeed_files import require_end
from thanos_lightning.checkpoints.format import sharded_error
from thanos_lightning.checkpoints.lazy import LazyTensors


def build_model(architecture: str, config: Any, path: Path) -> transformers.PreTrainedModel:
    """Build a model from its configuration, or from the dict of one, without allocating its weights.

    Raises ValueError, which names `path`, if transformers has no class `architecture`.
    """
    model_class = getattr(transformers, architecture, None)
    if model_class is None:
        raise ValueError(
            f"{path} holds a model of the class {architecture}, which transformers {transformers.__version__} does not "
            "have: install the version it was trained with. Models with code of their own are not supported"
        )
    if isinstance(config, Mapping):
        config = model_class.config_class.from_dict(dict(config))
    with torch.device("meta"):
        return model_class(config)


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


def _weight_files(folder: Path) -> list[Path]:
    """List the model's .safetensors files, without files of another format that some folders also hold."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(read_json(index)["weight_map"].values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ValueError(f"{folder} lacks {some_of(missing)}, which {index.name} names: copy the whole folder")
        return [folder / name for name in names]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        require_end(folder)
        if (folder / ".metadata").is_file():
            raise sharded_error(folder)
        raise ValueError(f"{folder} holds no .safetensors file: give a Hugging Face folder, or a .ckpt file")
    return files


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises ValueError if it is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): restore or remove it") from error


def some_of(names: Sequence[str]) -> str:
    """Join the first three names for a message."""
    return f"{', '.join(names[:3])}{f', … ({len(names)} in all)' if len(names) > 3 else ''}" or "nothing"
