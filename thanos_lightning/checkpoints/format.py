"""What a trainer checkpoint holds, and how it is read."""

from __future__ import annotations

import math
import pickle
import zipfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

from thanos_lightning.checkpoints.adapters import AdaptersNote, adapters_note
from thanos_lightning.checkpoints.deepspeed_files import (
    MOMENTS,
    NOTE_KEY,
    files_of,
    is_zero_folder,
    load_file,
    model_files,
    read_zero_folder,
    require_end,
)
from thanos_lightning.checkpoints.foreign import not_plain, require_bounded, require_intact
from thanos_lightning.layers.wrappers import class_of
from thanos_lightning.ranks.masks import LayerMask, checked
from thanos_lightning.ranks.view import whole_shape
from thanos_lightning.report.plain import read_as

# What the callback writes into a trainer checkpoint
CHECKPOINT_FORMAT = 7  # version of the state and of the note
CALLBACK_KEY = "ThanosPruningCallback"  # the key of the callback's state begins with this
# Types of the entries that are read. Entries from "architecture" on are in the note only if there is a model
_OF_STATE = {
    "arguments": dict[str, Any],
    "masks": dict[str, dict[str, Any]],
    "pruned": dict[str, int],
    "optimizer_steps": int,
    "report": dict[str, Any],
}
_OF_NOTE = {
    "optimizer_parameters": list[list[str | None]] | None,
    "architecture": str | None,
    "model_prefix": str | None,
    "adapters": AdaptersNote | None,
    "config": dict[str, Any] | None,
    "generation_config": dict[str, Any] | None,
    "tokenizer": str | None,
}


def training_note(
    module: nn.Module, stepped: Iterable[Iterable[Tensor | None]], targets: Collection[str]
) -> dict[str, Any]:
    """Describe a training for its checkpoint: the owners of the moments, and how to rebuild the Hugging Face model.

    Returns plain values to store under `NOTE_KEY`. `stepped` has the module's parameters of each optimizer, in the
    order in which the optimizer's state numbers them. None fills a number without a parameter. Optimizers are ordered
    as in the checkpoint's `optimizer_states`. `targets` are the names of the layers to prune.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    note: dict[str, Any] = {
        "format": CHECKPOINT_FORMAT,
        "optimizer_parameters": [[names.get(id(parameter)) for parameter in parameters] for parameters in stepped],
    }
    if (exported := exported_model(module, targets)) is not None:
        prefix, model = exported
        generation = getattr(model, "generation_config", None)
        note |= {
            "model_prefix": prefix,
            "adapters": adapters_note(model),
            "architecture": class_of(model).__name__,
            "config": model.config.to_dict(),
            "generation_config": None if generation is None else generation.to_dict(),
            "tokenizer": getattr(module, "tokenizer_name", None) or model.config.name_or_path or None,
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        }
    return note


def exported_model(module: nn.Module, targets: Collection[str]) -> tuple[str, transformers.PreTrainedModel] | None:
    """The Hugging Face model that an export writes, with the prefix of its names; None if there is none.

    If there are several (a teacher beside the trained one), the one with the most targets wins. If models are nested,
    the outermost one wins.
    """
    models = [
        (f"{name}." if name else "", part)
        for name, part in module.named_modules()
        if isinstance(part, transformers.PreTrainedModel)
    ]
    # max takes the first of equals, and named_modules() goes from the outside in
    return max(models, key=lambda model: sum(name.startswith(model[0]) for name in targets), default=None)


class Size(NamedTuple):
    """Of a model in the file of an export."""

    weights: int  # a shared weight counts once
    bytes_each: float  # their mean

    @property
    def gib(self) -> float:
        """The weights in GiB."""
        return self.weights * self.bytes_each / 2**30


def exported_size(module: nn.Module, targets: Collection[str], *, of_deepspeed: bool) -> Size:
    """The size that an export would have without pruning; of the whole module if there is no Hugging Face model."""
    found = exported_model(module, targets)
    model = module if found is None else found[1]
    parameters = [parameter for name, parameter in model.named_parameters() if ".lora_" not in name]
    numbers = [math.prod(whole_shape(parameter)) for parameter in parameters]
    # DeepSpeed keeps masters in float32 of all weights, and an export writes these
    bytes_each = [4 if of_deepspeed else parameter.element_size() for parameter in parameters]
    size = sum(number * each for number, each in zip(numbers, bytes_each, strict=True))
    return Size(sum(numbers), size / max(1, sum(numbers)))


# Trainer checkpoints


def pruning_state(content: Mapping[str, Any]) -> dict[str, Any] | None:
    """Find the callback's state in a checkpoint's content. Returns None if there is none."""
    states = [state for key, state in content.get("callbacks", {}).items() if key.startswith(CALLBACK_KEY)]
    return states[0] if states else None  # the Trainer refuses two callbacks with the same key


def require_format(written: Mapping[str, Any], path: Path) -> None:
    """Raise ValueError if the callback's state, or its note, is of another format."""
    if written.get("format") != CHECKPOINT_FORMAT:
        raise ValueError(
            f"{path} has format {written.get('format')!r}, this version reads {CHECKPOINT_FORMAT}: use the version of "
            "thanos_lightning that wrote it"
        )


def read_content(path: Path) -> Mapping[str, Any]:
    """Read what rank 0 saved beside weights: as `TrainerCheckpoint.read`, but from one of DeepSpeed's files alone."""
    require_end(path)
    if not is_zero_folder(path):
        return TrainerCheckpoint.read(path).content
    content = load_file(model_files(path)[0])
    _require_types(content, path)
    return content


@dataclass(frozen=True, eq=False)
class TrainerCheckpoint:
    """The content of a .ckpt that Lightning's Trainer wrote: a file or a DeepSpeed folder."""

    path: Path  # the file or folder
    content: Mapping[str, Any]  # the plain values and tensors that Lightning and its callbacks saved
    others: Sequence[Mapping[str, Any]]  # the content from the other ranks, if each rank wrote its own
    # name in the LightningModule -> parameter or buffer: the fp32 master if there is one
    state_dict: Mapping[str, Tensor]
    # parameter name -> other tensors of its shape, such as the moments; None if their owners are unknown
    beside: Mapping[str, Mapping[str, Tensor]] | None

    @classmethod
    def read(cls, path: Path) -> TrainerCheckpoint:
        """Open a checkpoint. Tensors stay on disk until they are used, and no code from the file runs.

        Raises FileNotFoundError if there is no such file, and ValueError if it is no trainer checkpoint, or holds
        objects that are not plain values.
        """
        if (path / "config.json").is_file():
            raise ValueError(f"{path} is a Hugging Face folder, not a trainer's: give a .ckpt, which the Trainer wrote")
        require_end(path)
        if is_zero_folder(path):
            checkpoint = cls(path, *read_zero_folder(path))
            for content in (checkpoint.content, *checkpoint.others):
                _require_types(content, path)
            return checkpoint
        if path.is_dir():
            raise sharded_error(path) if any(path.glob("**/.metadata")) else _not_a_checkpoint(path)
        require_bounded(path)
        if not zipfile.is_zipfile(path):
            raise _not_a_checkpoint(path)
        try:
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except pickle.UnpicklingError as error:
            mend = (
                "allow the class (torch.serialization.add_safe_globals) and call export_checkpoint or "
                "verify_checkpoint from Python, or save plain values as hyperparameters"
            )
            raise not_plain(path, error, mend) from error
        except RuntimeError as error:  # a zip archive, but not torch's
            raise _not_a_checkpoint(path) from error
        if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
            raise _not_a_checkpoint(path)
        _require_types(content, path)
        tensors = {name: value for name, value in content["state_dict"].items() if isinstance(value, Tensor)}
        moments = _moments(content, path)
        require_shapes(content)
        return cls(path, content, (), tensors, moments)

    def require_intact(self) -> None:
        """Raise ValueError if a file's bytes do not match their checksums. Reads every file in full."""
        for file in [self.path] if self.path.is_file() else files_of(self.path):
            require_intact(file)

    @property
    def masks(self) -> dict[str, LayerMask] | None:
        """Parameter name in the LightningModule -> mask. None if there is no state of the callback.

        Raises ValueError if a mask is not the one that was saved, or is missing.
        """
        contents = (self.content, *self.others)
        states = [state for content in contents if (state := pruning_state(content)) is not None]
        for state in states:
            require_format(state, self.path)
        if not states:
            return None
        try:
            masks = {name: LayerMask.from_state(mask) for state in states for name, mask in state["masks"].items()}
        except ValueError as error:
            raise ValueError(f"{self.path} is damaged ({error}): take another checkpoint") from error
        return {name: mask for name, mask, _ in checked(masks.items(), states[0]["pruned"])}

    def require_masks(self) -> dict[str, LayerMask]:
        """Return the masks, at least one. Raises ValueError if there is no state of the callback, or no mask in it."""
        masks = self.masks
        if masks is None:
            raise ValueError(
                f"{self.path} holds no state of a {CALLBACK_KEY}: give a checkpoint of a training with the callback"
            )
        if not masks:
            raise ValueError(
                f"{self.path} holds no masks yet: it was saved after {self.content.get('global_step')} optimizer "
                "steps, before the first pruning event. Give a later checkpoint"
            )
        return masks

    @property
    def describes_a_model(self) -> bool:
        """Whether the callback found a Hugging Face model and described it in its note."""
        return bool((self.content.get(NOTE_KEY) or {}).get("architecture"))

    def require_note(self) -> Mapping[str, Any]:
        """Return the note about the Hugging Face model. Raises ValueError if it is missing, or of another format."""
        if not self.describes_a_model:
            raise ValueError(
                f"{self.path} does not say which Hugging Face model it holds: train a LightningModule that keeps a "
                f"transformers model as a submodule, or load the sparse weights by torch.load({str(self.path)!r}, "
                "weights_only=True)['state_dict']"
            )
        note: Mapping[str, Any] = self.content[NOTE_KEY]
        require_format(note, self.path)
        if lacking := [name for name in ("config", "model_prefix", "adapters") if note.get(name) is None]:
            raise ValueError(f"{self.path} is damaged (its note has no {lacking[0]}): take another checkpoint")
        return note


def _require_types(content: Mapping[str, Any], path: Path) -> None:
    """Refuse other types than the callback writes into its state and its note. Other versions wrote other types."""
    try:
        callbacks = read_as(dict[str, Any], content.get("callbacks", {}), "callbacks")
        state = read_as(dict[str, Any] | None, pruning_state({"callbacks": callbacks}), "the callback's state")
        note = read_as(dict[str, Any] | None, content.get(NOTE_KEY), "the callback's note")
        for what, written, kinds in (("state", state, _OF_STATE), ("note", note, _OF_NOTE)):
            if written is not None and written.get("format") == CHECKPOINT_FORMAT:
                for name, kind in kinds.items():
                    read_as(kind, written.get(name), f"{name} in the callback's {what}")
        arguments = (state or {}).get("arguments") or {}  # text of any length: a schedule may have hundreds of events
        for name, value in arguments.items() if isinstance(arguments, dict) else ():
            if not isinstance(value, str):
                raise ValueError(f"arguments in the callback's state: {name} is {value!r}, not text")
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): take another checkpoint") from error


def _moments(content: Mapping[str, Any], path: Path) -> dict[str, dict[str, Tensor]] | None:
    """Map parameter names to their moments by name. Returns None if the moments have no known owners."""
    optimizers = content.get("optimizer_states", [])
    named: Sequence[Sequence[str | None]] | None = (content.get(NOTE_KEY) or {}).get("optimizer_parameters")
    if named is None:
        return None if optimizers else {}
    moments: dict[str, dict[str, Tensor]] = {}
    try:
        states = [entry.get("state") for entry in read_as(list[dict[str, Any]], optimizers, "optimizer_states")]
        if len(states) != len(named):
            raise ValueError(f"it has {len(states)} optimizers, and its note names the parameters of {len(named)}")
        for number, (state, names) in enumerate(zip(states, named, strict=True)):
            known = read_as(dict[int, dict[str, Any]], state, f"the state of optimizer {number}")
            if known and not 0 <= min(known) <= max(known) < len(names):
                raise ValueError(
                    f"optimizer {number} has a state of parameter {max(known)}, and {len(names)} parameters"
                )
            for index, values in known.items():
                if (name := names[index]) is not None:
                    shape = getattr(content["state_dict"].get(name), "shape", None)
                    moments[name] = {
                        what: value
                        for what, value in values.items()
                        if isinstance(value, Tensor) and value.is_floating_point() and value.shape == shape
                    }  # factored moments have no entry for each of the parameter's
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): take another checkpoint") from error
    return moments


def require_shapes(content: Mapping[str, Any]) -> None:
    """Raise ValueError if a moment of Adam or SGD has another shape than its parameter."""
    named = (content.get(NOTE_KEY) or {}).get("optimizer_parameters") or []
    weights = content.get("state_dict") or {}
    for optimizer, names in zip(content.get("optimizer_states", []), named, strict=False):
        for index, name in enumerate(names):
            like, state = weights.get(name), optimizer["state"].get(index, {})
            for what in sorted(MOMENTS & state.keys()):
                value = state[what]
                if isinstance(like, Tensor) and isinstance(value, Tensor) and value.shape != like.shape:
                    raise ValueError(
                        f"the moment {what} of {name} has shape {tuple(value.shape)}, the parameter has "
                        f"{tuple(like.shape)}: the checkpoint was changed after it was saved, take another one"
                    )


def sharded_error(path: Path) -> ValueError:
    """Make the error for a folder in which each rank wrote its own shards."""
    return ValueError(
        f"{path} is a folder of a sharding strategy other than DeepSpeed: resume from it and save a single file, with "
        "ModelParallelStrategy(save_distributed_checkpoint=False)"
    )


def _not_a_checkpoint(path: Path) -> ValueError:
    return ValueError(
        f"{path} is damaged or no trainer checkpoint: give a .ckpt file that Lightning's Trainer wrote (a Hugging Face "
        "model is given as its folder)"
    )
