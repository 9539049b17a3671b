"""What a trainer checkpoint and a Hugging Face folder hold, and how both are read."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from thanos_lightning.checkpoints.checksums import require_intact
from thanos_lightning.checkpoints.deepspeed_files import files_of, is_zero_folder, read_zero_folder, require_end
from thanos_lightning.sharding.masks import LayerMask

# What the callback writes into a trainer checkpoint
CHECKPOINT_FORMAT = 6  # of both parts
CALLBACK_KEY = "ThanosPruningCallback"  # its state, among those of all callbacks
NOTE_KEY = "thanos_lightning"  # its note about the optimizers and the Hugging Face model


def training_note(
    module: nn.Module, stepped: Iterable[Iterable[Tensor | None]], targets: Collection[str]
) -> dict[str, Any]:
    """What a checkpoint has to say for itself: whose the moments are, and how to rebuild the Hugging Face model.

    Args:
        module: The LightningModule.
        stepped: Of each optimizer, in the order of the checkpoint's `optimizer_states`, the parameters of the module
            that it numbers in its own state, in that order. None where a number is not that of one parameter.
        targets: Names of the layers to prune. Of several Hugging Face models (a teacher beside the trained one) the one
            with the most of them is described, the outermost of nested ones.

    Returns:
        Plain values, to be kept under `NOTE_KEY`.

    Examples:
        >>> layer = nn.Linear(2, 2)
        >>> training_note(layer, [layer.parameters()], targets=[""])["optimizer_parameters"]
        [['weight', 'bias']]
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    note: dict[str, Any] = {
        "format": CHECKPOINT_FORMAT,
        # an optimizer's state numbers its parameters in this order
        "optimizer_parameters": [[names.get(id(parameter)) for parameter in parameters] for parameters in stepped],
    }
    models = [
        (f"{name}." if name else "", part)
        for name, part in module.named_modules()
        if isinstance(part, transformers.PreTrainedModel)
    ]
    if models:
        # max takes the first of several, and named_modules() goes from the outside in
        prefix, model = max(models, key=lambda found: sum(name.startswith(found[0]) for name in targets))
        generation = getattr(model, "generation_config", None)
        note |= {
            "model_prefix": prefix,
            # fully_shard puts a class of its own in front
            "architecture": next(
                kind.__name__ for kind in type(model).__mro__ if not kind.__module__.startswith("torch.distributed.")
            ),
            "config": model.config.to_dict(),
            "generation_config": None if generation is None else generation.to_dict(),
            "tokenizer": getattr(module, "tokenizer_name", None) or model.config.name_or_path or None,
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        }
    return note


# Trainer checkpoints


def pruning_state(content: Mapping[str, Any]) -> dict[str, Any] | None:
    """The callback's state in what a Trainer keeps, or None where it has left none."""
    states = [state for key, state in content.get("callbacks", {}).items() if key.startswith(CALLBACK_KEY)]
    return states[0] if states else None  # the Trainer refuses two callbacks of one key


@dataclass(frozen=True, eq=False)
class TrainerCheckpoint:
    """What a .ckpt holds that Lightning's Trainer wrote: a file, or DeepSpeed's folder.

    Attributes:
        path: The file or folder.
        content: What Lightning and its callbacks keep: plain values and tensors.
        others: The same of other ranks, where each has written its own.
        state_dict: Name in the LightningModule -> parameter or buffer: the fp32 master, where there is one.
        beside: Parameter name -> what else has its shape, such as the moments; None where it isn't told whose they are.
    """

    path: Path
    content: Mapping[str, Any]
    others: Sequence[Mapping[str, Any]]
    state_dict: Mapping[str, Tensor]
    beside: Mapping[str, Mapping[str, Tensor]] | None

    @classmethod
    def read(cls, path: Path) -> TrainerCheckpoint:
        """Open a checkpoint. Tensors stay on disk until they are used, and no code of the file is run.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it's no trainer checkpoint, or holds objects that are not plain values.
        """
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist: give a checkpoint that the Trainer wrote (.ckpt)")
        require_end(path)
        if path.is_dir() and is_zero_folder(path):
            folder = read_zero_folder(path)
            return cls(path, folder.content, folder.others, folder.weights, folder.beside)
        if (path / "config.json").is_file():
            raise ValueError(f"{path} is a Hugging Face folder, not a trainer's: give a .ckpt, which the Trainer wrote")
        if path.is_dir() and not any(path.glob("**/.metadata")):
            raise _not_a_checkpoint(path)
        if path.is_dir():
            raise sharded_error(path)
        if not zipfile.is_zipfile(path):
            raise _not_a_checkpoint(path)
        try:
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{path} holds objects that are not plain values, and reading these could run any code: "
                f"{_first_line(error)} Save plain values as hyperparameters, or, if you trust the file, allow the "
                "class (torch.serialization.add_safe_globals) and call export_checkpoint or verify_checkpoint from "
                "Python"
            ) from error
        except RuntimeError as error:  # a zip archive, but not torch's
            raise _not_a_checkpoint(path) from error
        if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
            raise _not_a_checkpoint(path)
        return cls(path, content, (), content["state_dict"], _moments(content))

    def require_intact(self) -> None:
        """Hold all its files against their checksums; reads them whole.

        Raises:
            ValueError: Naming a file of which bytes have changed.
        """
        for file in [self.path] if self.path.is_file() else files_of(self.path):
            require_intact(file)

    @property
    def masks(self) -> dict[str, LayerMask] | None:
        """Parameter name in the LightningModule -> mask; None where no callback has left a state."""
        states = [pruning_state(content) for content in (self.content, *self.others)]
        found = [state["masks"] for state in states if state is not None]
        if not found:
            return None
        return {name: LayerMask.from_state(state) for masks in found for name, state in masks.items()}

    def require_masks(self) -> dict[str, LayerMask]:
        """The masks, of which there must be some.

        Raises:
            ValueError: If no callback has left a state, or nothing was pruned by then.
        """
        masks = self.masks
        if masks is None:
            raise ValueError(
                f"{self.path} holds no state of a {CALLBACK_KEY}: train with the callback, or say what to verify with "
                "--pattern, such as --pattern 2:4"
            )
        if not masks:
            raise ValueError(
                f"{self.path} holds no masks yet: it was saved after {self.content.get('global_step')} optimizer "
                "steps, before the first pruning event. Give a later checkpoint"
            )
        return masks

    @property
    def describes_a_model(self) -> bool:
        """Whether the callback found a Hugging Face model and wrote down which."""
        return "architecture" in (self.content.get(NOTE_KEY) or {})

    def require_note(self) -> Mapping[str, Any]:
        """What the callback wrote down about the Hugging Face model.

        Raises:
            ValueError: If it found none, or wrote in another format.
        """
        if not self.describes_a_model:
            raise ValueError(
                f"{self.path} does not say which Hugging Face model it holds: train a LightningModule that keeps a "
                "transformers model as a submodule"
            )
        note: Mapping[str, Any] = self.content[NOTE_KEY]
        if note["format"] != CHECKPOINT_FORMAT:
            raise ValueError(
                f"{self.path} has format {note['format']!r}, this version reads {CHECKPOINT_FORMAT}: use the version "
                "of thanos_lightning that wrote it"
            )
        return note


def _moments(content: Mapping[str, Any]) -> dict[str, dict[str, Tensor]] | None:
    """Parameter name -> name -> moment of the matrices, or None where it isn't told which moment is whose."""
    optimizers = content.get("optimizer_states", [])
    named: Sequence[Sequence[str | None]] | None = content.get(NOTE_KEY, {}).get("optimizer_parameters")
    if named is None:
        return None if optimizers else {}
    found: dict[str, dict[str, Tensor]] = {}
    for optimizer, names in zip(optimizers, named, strict=True):
        for index, state in optimizer["state"].items():
            name = names[index]
            if name is not None:
                found[name] = _matrix_moments(state)
    return found


def sharded_error(path: Path) -> ValueError:
    """For a folder in which each rank has written its own shards."""
    return ValueError(
        f"{path} is a folder of a sharding strategy other than DeepSpeed: resume from it and save a single file, with "
        "ModelParallelStrategy(save_distributed_checkpoint=False)"
    )


def _not_a_checkpoint(path: Path) -> ValueError:
    return ValueError(
        f"{path} is damaged or no trainer checkpoint: give a .ckpt file that Lightning's Trainer wrote (a Hugging Face "
        "model is given as its folder)"
    )


def _first_line(error: Exception) -> str:
    """The line of a long torch error that names the class."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if "GLOBAL" in line or "class" in line), lines[0])


def _matrix_moments(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {
        name: value
        for name, value in state.items()
        if isinstance(value, Tensor) and value.dim() == 2 and value.is_floating_point()
    }
