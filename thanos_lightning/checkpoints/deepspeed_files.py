"""What DeepSpeed's checkpoint folders hold, read without an engine, without the job's world size, without its code.

A folder that Lightning's DeepSpeed strategy wrote:

    latest                                        the name of the folder below
    checkpoint/mp_rank_00_model_states.pt         stages 0 to 2: the model's copy, and all that Lightning keeps
    checkpoint/zero_pp_rank_R_…_model_states.pt   stage 3: what Lightning keeps, by rank
    checkpoint/…zero_pp_rank_R_…_optim_states.pt  stages 1 to 3: rank R's part of the fp32 master and the moments
    checkpoint/offloaded_tensors/                 stage 3 with the optimizer on NVMe: these instead, not readable here

and one that was resharded to DeepSpeed's universal format has `latest_universal` instead, and per parameter

    checkpoint/zero/NAME/fp32.pt, exp_avg.pt, …   the whole tensor

Tensors are mapped from disk and put together when they are asked for, one at a time.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thanos_lightning.checkpoints.lazy import LazyTensors

_UNIVERSAL = "latest_universal"
_MODEL_FILES = "*mp_rank_00_model_states.pt"
_OPTIMIZER_FILES = "*zero_pp_rank_*_mp_rank_00_optim_states.pt"
_RANK = re.compile(r"zero_pp_rank_(\d+)_")
_SWAPPED = "offloaded_tensors"
# moments are told from other state by their shape; what is left, such as the step, is none
_MASTER = "fp32"


class _Opaque:
    """Stands in for the few classes of DeepSpeed's that its files mention, so that none of its code is run."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Opaque:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


_STAND_INS: list[Any] = [
    (_Opaque, name)
    for name in (
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
        "deepspeed.utils.tensor_fragment.fragment_address",
    )
]


@dataclass(frozen=True, eq=False)
class ZeroFolder:
    """What a DeepSpeed checkpoint folder holds.

    Attributes:
        path: The folder.
        content: What Lightning and its callbacks keep, of rank 0.
        others: The same of the other ranks, where each has written its own (stage 3).
        weights: Parameter or buffer name -> its most exact copy: the fp32 master, where there is one.
        beside: Parameter name -> what else has its shape: the moments, and the model's copy where that is whole.
        is_universal: Whether it was resharded, and fits any number of ranks.
        world_size: The number of ranks that wrote it.
    """

    path: Path
    content: Mapping[str, Any]
    others: Sequence[Mapping[str, Any]]
    weights: Mapping[str, Tensor]
    beside: Mapping[str, Mapping[str, Tensor]]
    is_universal: bool
    world_size: int


def is_zero_folder(path: Path) -> bool:
    """Whether a path looks like a checkpoint folder of DeepSpeed's, as Lightning writes it."""
    return (path / "checkpoint").is_dir() and ((path / "latest").is_file() or (path / _UNIVERSAL).is_file())


def require_end(path: Path) -> None:
    """Refuse a folder that DeepSpeed has begun to write, and not ended: it names its inside at the very end.

    Raises:
        ValueError: If it is one.
    """
    if (path / "checkpoint").is_dir() and not is_zero_folder(path):
        raise ValueError(
            f"{path} is a checkpoint folder of DeepSpeed's that was not written to its end (it has no file `latest`): "
            "take another checkpoint, or copy the whole folder"
        )


def is_universal(path: Path) -> bool:
    """Whether a checkpoint folder of DeepSpeed's was resharded."""
    return (path / _UNIVERSAL).is_file()


@dataclass(frozen=True)
class Plan:
    """What a folder is made for.

    Attributes:
        stage: The ZeRO stage.
        world_size: The number of ranks that wrote it.
        is_universal: Whether it was resharded, and fits any number of ranks.
        shapes: Name -> shape of each trained parameter; empty where the folder doesn't tell.
    """

    stage: int
    world_size: int
    is_universal: bool
    shapes: Mapping[str, tuple[int, ...]]


def read_plan(path: Path) -> Plan:
    """What a folder is made for. Reads no weights.

    Raises:
        ValueError: If a file is missing or damaged.
    """
    content = load_file(model_files(path)[0])
    return Plan(
        stage=int(content["ds_config"].get("zero_optimization", {}).get("stage", 0)),
        world_size=int(content["dp_world_size"]),
        is_universal=is_universal(path),
        shapes={name: tuple(shape) for group in content.get("param_shapes") or [] for name, shape in group.items()},
    )


def require_masters(path: Path) -> None:
    """Refuse a folder whose masters and moments were on NVMe.

    Raises:
        ValueError: If they are in files of DeepSpeed's swapper, which do not say whose they are.
    """
    if (path / "checkpoint" / _SWAPPED).exists():
        raise ValueError(
            f"the optimizer was offloaded to NVMe when {path} was written, and its masters and moments are in files "
            "that do not say which parameters they are of: resume from it on as many ranks, and save the model from "
            "the training (deepspeed.zero.GatheredParameters, save_pretrained), or train with the optimizer offloaded "
            "to the CPU (offload_optimizer_device='cpu')"
        )


def read_parameter_groups(path: Path) -> list[dict[str, Any]]:
    """The optimizer's parameter groups (learning rate, weight decay, …) of a resharded folder."""
    content = load_file(path / "checkpoint" / "zero" / "optimizer_state.pt")
    state = content.get("optimizer_state_dict") or content.get("base_optimizer_state") or content
    groups: list[dict[str, Any]] = state["param_groups"]
    return groups


def read_zero_folder(path: Path) -> ZeroFolder:
    """Open a checkpoint folder of DeepSpeed's.

    Raises:
        ValueError: If a file is missing or damaged or of another save, or the folder is of a kind that isn't known.
    """
    require_masters(path)
    contents = load_contents(path)
    check_one_save(path)
    content, *of_others = contents
    world_size = int(content["dp_world_size"])
    module = {name: value for name, value in (content.get("module") or {}).items() if value.numel()}
    # what the optimizer does not update, or is no parameter, is in the model's copy only
    weights: dict[str, Callable[[], Tensor]] = {name: _constant(value) for name, value in module.items()}
    if is_universal(path):
        states = _of_universal(path / "checkpoint" / "zero", content)
    else:
        files = _optimizer_files(path, content)
        if not files:
            states = _of_stage_0(content)
        else:
            ranks = [load_file(file)["optimizer_state_dict"] for file in files]
            states = _of_stage_3(content, ranks) if "fp32_flat_groups" in ranks[0] else _of_stage_12(content, ranks)
    beside: dict[str, Mapping[str, Tensor]] = {}
    for name, parts in states.items():
        others = {what: make for what, make in parts.items() if what != _MASTER}
        if name in module:
            others["model's copy"] = _constant(module[name])
        weights[name] = parts.get(_MASTER, weights.get(name, _missing(path, name)))
        beside[name] = LazyTensors(others)
    weights.update(_frozen(contents))
    # in fp32 like the masters, or a model of both would be read in the lesser precision by others
    untrained = weights.keys() & (content.get("frozen_param_shapes") or {}).keys()
    weights.update({name: _in_fp32(weights[name]) for name in untrained})
    _share_masters(weights, module, states)
    return ZeroFolder(path, content, of_others, LazyTensors(weights), beside, is_universal(path), world_size)


def _share_masters(
    weights: dict[str, Callable[[], Tensor]], module: Mapping[str, Tensor], states: Mapping[str, Any]
) -> None:
    """Tied weights have one master, under the first of their names: the others are that one too."""
    first = {module[name].data_ptr(): name for name in reversed(list(module)) if _MASTER in states.get(name, {})}
    for name, tensor in module.items():
        if name not in states and tensor.data_ptr() in first:
            weights[name] = weights[first[tensor.data_ptr()]]


# Files


def load_file(path: Path) -> dict[str, Any]:
    """Read one of a folder's files. Tensors stay on disk until they are used, and no code of the file is run.

    Raises:
        ValueError: If it's damaged, or holds objects that are not plain values.
    """
    try:
        with torch.serialization.safe_globals(_STAND_INS):
            content: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f" ({named[1]})" if named else ""
        raise ValueError(
            f"{path} holds objects that are not plain values{what}, and reading these could run any code: if you trust "
            "who wrote it, say so (reshard --trusted, fit --weights_only false), else don't use it"
        ) from error
    except Exception as error:  # whatever a file that was cut short makes torch say
        raise ValueError(f"{path} is damaged, or was cut short: take another checkpoint, or copy it again") from error
    return content


def files_of(path: Path) -> list[Path]:
    """All files with tensors of a checkpoint folder of DeepSpeed's."""
    return sorted((path / "checkpoint").rglob("*.pt"))


def check_files(path: Path) -> None:
    """Read each file as `load_file` does, before DeepSpeed reads it in a way that runs what it is told to.

    Raises:
        ValueError: Naming the first file that is damaged, or holds objects that are not plain values.
    """
    for file in files_of(path):
        load_file(file)


def check_one_save(path: Path) -> None:
    """Refuse a folder that lacks files, or whose files were not written together, since a rank was killed meanwhile.

    All that each file says of itself is held against the others: Lightning's and DeepSpeed's steps, those of the
    callback and its mark of the save, and Adam's.

    Raises:
        ValueError: Naming the rank whose files are missing, or the two files, and the steps that they are of.
    """
    if is_universal(path):
        return  # made anew, out of a folder that was checked
    by_file: dict[str, dict[str, Any]] = {}
    contents = load_contents(path)
    for file, content in zip(model_files(path), contents, strict=True):
        steps: dict[str, Any] = {"global step": content.get("global_step")}
        if "global_steps" in content:
            steps["step of the optimizer"] = content["global_steps"] - (content.get("skipped_steps") or 0)
        for state in (content.get("callbacks") or {}).values():
            if isinstance(state, Mapping) and "optimizer_steps" in state:
                steps |= {"step of the callback": state["optimizer_steps"], "mark of the save": state.get("save")}
        by_file[file.name] = steps
    for file in _optimizer_files(path, contents[0]):
        counts = _steps_of_optimizer(load_file(file)["optimizer_state_dict"])
        by_file[file.name] = {"step of the optimizer": max(counts)} if counts else {}
    first: dict[str, tuple[str, Any]] = {}
    for name, steps in by_file.items():
        for what, value in steps.items():
            known = first.setdefault(what, (name, value))
            if known[1] != value:
                raise ValueError(
                    f"{path} was not written as a whole: {known[0]} is of {what} {known[1]}, and {name} of {value}. "
                    "Take another checkpoint: a rank ended while this one was written over an older one"
                )


def _steps_of_optimizer(state: Mapping[str, Any]) -> set[int]:
    base = state.get("base_optimizer_state", state.get("optimizer_state_dict"))
    entries = base if isinstance(base, list) else (base or {}).get("state", {}).values()
    return {int(entry["step"]) for entry in entries if "step" in entry}


def model_files(path: Path) -> list[Path]:
    """The files with what Lightning keeps: of rank 0, and at stage 3 of all ranks, in their order.

    Raises:
        ValueError: If there is none.
    """
    files = sorted((path / "checkpoint").glob(_MODEL_FILES), key=_rank_of)
    if not files:
        raise ValueError(f"{path / 'checkpoint'} holds no {_MODEL_FILES[1:]}: copy the whole folder, from all nodes")
    return files


def load_contents(path: Path) -> list[dict[str, Any]]:
    """What Lightning and its callbacks keep: of rank 0, and at stage 3 of all ranks, in their order.

    Raises:
        ValueError: If a file is missing or damaged.
    """
    files = model_files(path)
    contents = [load_file(file) for file in files]
    if any(_RANK.search(file.name) for file in files) and not is_universal(path):
        missing = set(range(int(contents[0]["dp_world_size"]))) - {_rank_of(file) for file in files}
        if missing:
            raise ValueError(
                f"{path / 'checkpoint'} lacks the model states of rank {min(missing)}: copy the whole folder, from all "
                "nodes"
            )
    return contents


def _rank_of(file: Path) -> int:
    found = _RANK.search(file.name)
    return int(found[1]) if found else 0


def _optimizer_files(path: Path, content: Mapping[str, Any]) -> list[Path]:
    """Of all ranks, in their order; at stage 0 there is none."""
    files = sorted((path / "checkpoint").glob(_OPTIMIZER_FILES), key=_rank_of)
    stage = int(content["ds_config"].get("zero_optimization", {}).get("stage", 0))
    missing = set(range(int(content["dp_world_size"]) if stage else 0)) - {_rank_of(file) for file in files}
    if missing:
        raise ValueError(
            f"{path / 'checkpoint'} lacks the optimizer states of rank {min(missing)}: copy the whole folder, from all "
            "nodes"
        )
    return files


def _constant(tensor: Tensor) -> Callable[[], Tensor]:
    return tensor.detach


def _in_fp32(make: Callable[[], Tensor]) -> Callable[[], Tensor]:
    return lambda: make().float()


def _missing(path: Path, name: str) -> Callable[[], Tensor]:
    def fail() -> Tensor:
        raise ValueError(f"{path} holds no weights of {name}, only moments: it is damaged, give another one")

    return fail


def _joined(pieces: Sequence[Tensor], shape: Sequence[int]) -> Callable[[], Tensor]:
    numel = torch.Size(shape).numel()
    return lambda: torch.cat([piece.detach().view(-1) for piece in pieces])[:numel].view(tuple(shape))


# Kinds of folders. Each returns name -> {"fp32", moments …} -> what makes the tensor


_States = dict[str, dict[str, Callable[[], Tensor]]]


def _moments_of(state: Mapping[str, Any], like: Tensor) -> dict[str, Tensor]:
    # the padding at the end of a flat group is saved with the moments, but not with the master
    return {
        name: value
        for name, value in state.items()
        if isinstance(value, Tensor) and value.dim() == like.dim() and value.numel() >= like.numel() > 0
    }


def _of_stage_3(content: Mapping[str, Any], ranks: Sequence[Mapping[str, Any]]) -> _States:
    """Each flat group is a sequence of equal parts of its parameters, padded at the end."""
    states: _States = {}
    group, offset = 0, 0
    flat_groups = [rank["fp32_flat_groups"] for rank in ranks]
    moments = [
        {
            index: _moments_of(rank["optimizer_state_dict"]["state"].get(index, {}), flat)
            for index, flat in enumerate(rank["fp32_flat_groups"])
        }
        for rank in ranks
    ]
    for name, shape in (item for shapes in content["param_shapes"] for item in shapes.items()):
        part = -(-torch.Size(shape).numel() // len(ranks))
        if offset + part > flat_groups[0][group].numel():
            group, offset = group + 1, 0
        place = slice(offset, offset + part)
        parts = {_MASTER: _joined([flat[group][place] for flat in flat_groups], shape)}
        for what in moments[0][group]:
            parts[what] = _joined([of_rank[group][what][place] for of_rank in moments], shape)
        states[name] = parts
        offset += part
    return states


def _of_stage_12(content: Mapping[str, Any], ranks: Sequence[Mapping[str, Any]]) -> _States:
    """The flat vector of each group is cut by rank; the files say which entries of it are whose."""
    shapes = {name: shape for group in content["param_shapes"] for name, shape in group.items()}
    pieces: dict[str, dict[str, list[Tensor]]] = {}
    for rank in ranks:
        base = rank["base_optimizer_state"]
        for group, mapping in enumerate(rank["param_slice_mappings"]):
            flat = rank["single_partition_of_fp32_groups"][group]
            # with elastic checkpoints DeepSpeed writes the states without their numbers
            state = base[group] if isinstance(base, list) else base["state"].get(group, {})
            flats = {_MASTER: flat, **_moments_of(state, flat)}
            for name, fragment in mapping.items():
                for what, values in flats.items():
                    piece = values[fragment.start : fragment.start + fragment.numel]
                    pieces.setdefault(name, {}).setdefault(what, []).append(piece)
    return {
        name: {what: _joined(values, shapes[name]) for what, values in parts.items()} for name, parts in pieces.items()
    }


def _of_stage_0(content: Mapping[str, Any]) -> _States:
    """All is whole, and numbered as in the optimizer; whose number is whose, the callback wrote down."""
    optimizer = content["optimizer"]
    named = (content.get("thanos_lightning") or {}).get("optimizer_parameters")
    if not named or not optimizer:
        return {}
    names: list[str | None] = named[0]
    states: _States = {name: {} for name in names if name is not None}
    saved = optimizer.get("optimizer_state_dict", optimizer)["state"]
    if "fp32_groups_flat" in optimizer:
        _split_flat_groups(states, names, content["module"], optimizer["fp32_groups_flat"], saved)
        return states
    masters = [master for group in optimizer.get("fp32_groups", []) for master in group]
    for index, name in enumerate(names):
        if name is None:
            continue
        if masters:
            states[name][_MASTER] = _constant(masters[index])
        for what, value in _moments_of(saved.get(index, {}), content["module"][name]).items():
            states[name][what] = _constant(value)
    return states


def _split_flat_groups(
    states: _States,
    names: Sequence[str | None],
    module: Mapping[str, Tensor],
    flats: Sequence[Tensor],
    saved: Mapping[int, Mapping[str, Any]],
) -> None:
    group, offset = 0, 0
    for name in names:
        assert name is not None, "a fused optimizer has the module's own parameters"
        shape = module[name].shape
        if offset + shape.numel() > flats[group].numel():
            group, offset = group + 1, 0
        place = slice(offset, offset + shape.numel())
        for what, values in {_MASTER: flats[group], **_moments_of(saved.get(group, {}), flats[group])}.items():
            states[name][what] = _joined([values[place]], shape)
        offset += shape.numel()


def _of_universal(folder: Path, content: Mapping[str, Any]) -> _States:
    """A folder per parameter with a file per tensor, which may be flat and padded."""

    def read(file: Path) -> Any:
        value: Any = load_file(file)
        return value.get("param") if isinstance(value, dict) else value

    def whole(file: Path, shape: Sequence[int]) -> Callable[[], Tensor]:
        return lambda: _joined([read(file)], shape)()

    states: _States = {}
    for name, shape in (item for shapes in content["param_shapes"] for item in shapes.items()):
        files = sorted((folder / name).glob("*.pt"))
        if _MASTER not in {file.stem for file in files}:
            raise ValueError(f"{folder / name} holds no {_MASTER}.pt: reshard the checkpoint again")
        numel = torch.Size(shape).numel()
        states[name] = {}
        for file in files:
            value = read(file)
            if isinstance(value, Tensor) and value.dim() > 0 and value.numel() >= numel:
                states[name][file.stem] = whole(file, shape)
    return states


def _frozen(contents: Sequence[Mapping[str, Any]]) -> dict[str, Callable[[], Tensor]]:
    """Stage 3: the parameters that are not trained, of which each rank wrote a part with what Lightning keeps."""
    shapes = contents[0].get("frozen_param_shapes") or {}
    if not shapes or not contents[0].get("frozen_param_fragments"):
        return {}
    fragments = [content["frozen_param_fragments"] for content in contents]
    return {name: _joined([part[name] for part in fragments], shape) for name, shape in shapes.items()}
