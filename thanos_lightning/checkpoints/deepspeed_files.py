"""Reads DeepSpeed's checkpoint folders without an engine, without the job's world size and without DeepSpeed's code.

Lightning's DeepSpeed strategy writes a folder like this:

    latest                                        the name of the folder below
    checkpoint/mp_rank_00_model_states.pt         stages 0 to 2: the model's copy, and Lightning's state
    checkpoint/zero_pp_rank_R_…_model_states.pt   stage 3: Lightning's state on rank R
    checkpoint/…zero_pp_rank_R_…_optim_states.pt  stages 1 to 3: rank R's part of the fp32 master and the moments
    checkpoint/offloaded_tensors/                 stage 3, optimizer on NVMe: masters and moments, not readable here

A folder that was resharded to DeepSpeed's universal format has `latest_universal` instead of `latest`, and adds:

    checkpoint/zero/NAME/fp32.pt, exp_avg.pt, …   the whole tensors of each parameter

Tensors are mapped from disk. Each one is assembled only when it is asked for.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thanos_lightning.checkpoints.foreign import inside, not_plain, require_bounded, require_intact
from thanos_lightning.checkpoints.lazy import LazyTensors
from thanos_lightning.report.progress import open_phase

_UNIVERSAL = "latest_universal"
_MODEL_FILES = "*mp_rank_00_model_states.pt"
_OPTIMIZER_FILES = "*zero_pp_rank_*_mp_rank_00_optim_states.pt"
_RANK = re.compile(r"zero_pp_rank_(\d+)_")
_SWAPPED = "offloaded_tensors"
_trusts: ContextVar[bool] = ContextVar("trusts", default=False)
NOTE_KEY = "thanos_lightning"  # key of the callback's note, see `format.training_note`
# Of Adam and SGD. What other optimizers keep may have other shapes than the parameter
MOMENTS = frozenset({"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer"})
_MASTER = "fp32"  # the key and file name of the fp32 master


class _Opaque:
    """Stands in for the few DeepSpeed classes that its files mention, so that no DeepSpeed code runs."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Opaque:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


CLASSES = (  # of DeepSpeed, which its files mention
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
_STAND_INS: list[Any] = [(_Opaque, name) for name in CLASSES]


def is_zero_folder(path: Path) -> bool:
    """Whether a path looks like a DeepSpeed checkpoint folder that Lightning wrote."""
    return (path / "checkpoint").is_dir() and ((path / "latest").is_file() or (path / _UNIVERSAL).is_file())


def require_end(path: Path) -> None:
    """Raise ValueError if DeepSpeed did not finish this folder (it writes `latest` last), or would load another."""
    if not (path / "checkpoint").is_dir():
        return
    if not is_zero_folder(path):
        raise ValueError(
            f"{path} is a checkpoint folder of DeepSpeed's that was not written to its end (it has no file `latest`): "
            "take another checkpoint, or copy the whole folder"
        )
    for file in (path / "latest", path / _UNIVERSAL):
        if file.is_file() and (named := file.read_bytes()[:99].strip()) != b"checkpoint":
            raise ValueError(
                f"{file} names the folder {named.decode(errors='replace')!r}, and Lightning writes into `checkpoint`: "
                "take another checkpoint, or copy the whole folder again"
            )


def is_universal(path: Path) -> bool:
    """Whether a DeepSpeed checkpoint folder was resharded."""
    return (path / _UNIVERSAL).is_file()


@dataclass(frozen=True)
class Plan:
    """The training that a folder fits."""

    stage: int  # of ZeRO
    world_size: int  # the number of ranks that wrote the folder; a folder that was resharded fits any number
    shapes: Mapping[str, tuple[int, ...]]  # of each trained parameter, by name; empty if the folder does not say


def read_plan(path: Path) -> Plan:
    """Read which training a folder fits. Raises ValueError if a file is missing, or the first is damaged."""
    content = load_file(model_files(path)[0])
    _require_all(path, content)
    return Plan(stage=stage_of(content), world_size=int(content["dp_world_size"]), shapes=_shapes_of(content))


def require_masters(path: Path) -> None:
    """Raise ValueError if masters and moments were on NVMe: their files do not say which parameters they are of."""
    if (path / "checkpoint" / _SWAPPED).exists():
        raise ValueError(
            f"the optimizer was offloaded to NVMe when {path} was written, and its masters and moments are in files "
            "that do not say which parameters they are of: resume from it on as many ranks, and save the model from "
            "the training (deepspeed.zero.GatheredParameters, save_pretrained), or train with the optimizer offloaded "
            "to the CPU (offload_optimizer_device='cpu')"
        )


def read_parameter_groups(path: Path) -> list[dict[str, Any]]:
    """Read the optimizer's parameter groups (learning rate, weight decay, …) from a resharded folder."""
    content = load_file(path / "checkpoint" / "zero" / "optimizer_state.pt")
    state = content.get("optimizer_state_dict") or content.get("base_optimizer_state") or content
    groups: list[dict[str, Any]] = state["param_groups"]
    return groups


def read_zero_folder(
    path: Path,
) -> tuple[dict[str, Any], list[dict[str, Any]], Mapping[str, Tensor], dict[str, Mapping[str, Tensor]]]:
    """Open a DeepSpeed checkpoint folder, and return what `TrainerCheckpoint` has beside its path.

    `beside` has the moments, and the model's copy where that is whole. Raises ValueError if a file is missing, damaged
    or from another save, or if this kind of folder is not supported.
    """
    require_masters(path)
    contents = load_contents(path)
    content, *of_others = contents
    files = _optimizer_files(path)
    states_of_ranks = [load_file(file) for file in files]
    opened = zip([*model_files(path), *files], [*contents, *states_of_ranks], strict=True)
    require_one_save(path, (fact for file, values in opened for fact in _facts_of(file, values)))
    module = {name: value for name, value in (content.get("module") or {}).items() if value.numel()}
    # Buffers, and parameters that the optimizer does not update, are only in the model's copy.
    weights: dict[str, Callable[[], Tensor]] = {name: value.detach for name, value in module.items()}
    if is_universal(path):
        states = _of_universal(path / "checkpoint" / "zero", content)
    elif not files:
        states = _of_stage_0(content)
    else:
        ranks = [of_rank["optimizer_state_dict"] for of_rank in states_of_ranks]
        states = _of_stage_3(content, ranks) if "fp32_flat_groups" in ranks[0] else _of_stage_12(content, ranks)
    beside: dict[str, Mapping[str, Tensor]] = {}
    for name, parts in states.items():
        others = {what: make for what, make in parts.items() if what != _MASTER}
        if name in module:
            others["model's copy"] = module[name].detach
        if _MASTER in parts:
            weights[name] = parts[_MASTER]
        beside[name] = LazyTensors(others)
    weights.update(_frozen(contents))
    # In fp32 like the masters: other readers would load a model of two precisions in the lower one.
    untrained = weights.keys() & (content.get("frozen_param_shapes") or {}).keys()
    weights.update({name: _in_fp32(weights[name]) for name in untrained})
    _share_masters(weights, module, states)
    return content, of_others, LazyTensors(weights), beside


def _share_masters(
    weights: dict[str, Callable[[], Tensor]], module: Mapping[str, Tensor], states: Mapping[str, Any]
) -> None:
    """Tied weights have one master, under the first of their names. Give it to the other names, too."""
    first = {module[name].data_ptr(): name for name in reversed(list(module)) if _MASTER in states.get(name, {})}
    for name, tensor in module.items():
        if name not in states and tensor.data_ptr() in first:
            weights[name] = weights[first[tensor.data_ptr()]]


# Files


@contextmanager
def trusting(trusts: bool) -> Iterator[None]:
    """Let `load_file` read any object inside the block, which may run any code from a file. False changes nothing."""
    token = _trusts.set(trusts or _trusts.get())
    try:
        yield
    finally:
        _trusts.reset(token)


def load_file(path: Path) -> dict[str, Any]:
    """Read one of a folder's files. Tensors stay on disk until they are used. No code of it runs, unless `trusting`.

    Raises ValueError if the file is damaged, or holds objects that are not plain values.
    """
    require_bounded(path)
    try:
        with torch.serialization.safe_globals(_STAND_INS):
            content: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=not _trusts.get())
    except pickle.UnpicklingError as error:
        mend = "allow the class (torch.serialization.add_safe_globals) or say reshard --trusted"
        raise not_plain(path, error, mend) from error
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{path} holds an object whose class is not to be had here ({error}): install it") from error
    except Exception as error:  # torch raises many kinds of errors for a truncated file
        raise ValueError(f"{path} is damaged, or was cut short: take another checkpoint, or copy it again") from error
    return content


def files_of(path: Path) -> list[Path]:
    """List all files with tensors in a DeepSpeed checkpoint folder.

    Raises ValueError if a folder in it is a link. DeepSpeed would follow the link, and this search does not.
    """
    entries = sorted((path / "checkpoint").rglob("*"))
    for entry in entries:
        if entry.is_symlink() and entry.is_dir():
            raise ValueError(f"{entry} is a link to a folder: copy the folder that it leads to into its place")
    return [entry for entry in entries if entry.suffix == ".pt"]


Fact = tuple[str, str, Any]  # what one of the files says, such as "global step", the file's name, and the value


def read_facts(path: Path, files: Sequence[Path]) -> list[Fact]:
    """Read some of a folder's files for `require_one_save`. Raises ValueError if the bytes of a file have changed."""
    facts: list[Fact] = []
    with open_phase(f"Reading {path.name}", len(files), "files") as phase:
        for file in files:
            require_intact(file)
            facts += _facts_of(file, load_file(file))
            phase.advance(note=file.name)
    return facts


def _facts_of(file: Path, content: Mapping[str, Any]) -> list[Fact]:
    """What all files of one save have in common: steps of Lightning, DeepSpeed, Adam and the callback, and its mark."""
    facts: dict[str, Any] = {}
    if fnmatch(file.name, _OPTIMIZER_FILES):
        facts["step of the optimizer"] = _step_of_optimizer(content["optimizer_state_dict"])
    elif fnmatch(file.name, _MODEL_FILES):
        facts["global step"] = content.get("global_step")
        if "global_steps" in content:
            facts["step of the optimizer"] = content["global_steps"] - (content.get("skipped_steps") or 0)
        for state in (content.get("callbacks") or {}).values():
            if isinstance(state, Mapping) and "optimizer_steps" in state:
                facts |= {"step of the callback": state["optimizer_steps"], "mark of the save": state.get("save")}
    return [(what, file.name, value) for what, value in facts.items() if value is not None]


def require_one_save(path: Path, facts: Iterable[Fact]) -> None:
    """Refuse a folder that mixes files of two saves, because a rank was killed during the second.

    `facts` are those of all files. Raises ValueError if two of them differ.
    """
    if is_universal(path):
        return  # reshard_checkpoint checks its source
    first: dict[str, tuple[str, Any]] = {}
    for what, name, value in facts:
        before, known = first.setdefault(what, (name, value))
        if known != value:
            raise ValueError(
                f"{path} was not written as a whole: {before} is of {what} {known}, and {name} of {value}. "
                "Take another checkpoint: a rank ended while this one was written over an older one"
            )


def _step_of_optimizer(state: Mapping[str, Any]) -> int | None:
    base = state.get("base_optimizer_state", state.get("optimizer_state_dict"))
    entries = base if isinstance(base, list) else (base or {}).get("state", {}).values()
    return max((int(entry["step"]) for entry in entries if "step" in entry), default=None)


def model_files(path: Path) -> list[Path]:
    """List the files with what Lightning keeps: rank 0's, and at stage 3 those of all ranks in rank order."""
    files = sorted((path / "checkpoint").glob(_MODEL_FILES), key=_rank_of)
    if not files:
        raise ValueError(f"{path / 'checkpoint'} holds no {_MODEL_FILES[1:]}: copy the whole folder, from all nodes")
    return files


def load_contents(path: Path) -> list[dict[str, Any]]:
    """Read all `model_files`, in their order. Raises ValueError if one is missing or damaged."""
    contents = [load_file(file) for file in model_files(path)]
    _require_all(path, contents[0])
    return contents


def _require_all(path: Path, content: Mapping[str, Any]) -> None:
    """Raise ValueError if a file is missing, by what the first of `model_files` says. Opens no file."""
    if is_universal(path):
        return
    ranks, files = int(content["dp_world_size"]), model_files(path)
    if any(_RANK.search(file.name) for file in files):
        _require_ranks(path, files, ranks, "model")
    if stage_of(content):
        _require_ranks(path, _optimizer_files(path), ranks, "optimizer")


def _require_ranks(path: Path, files: Sequence[Path], number: int, what: str) -> None:
    if missing := set(range(number)) - {_rank_of(file) for file in files}:
        raise ValueError(
            f"{path / 'checkpoint'} lacks the {what} states of rank {min(missing)}: copy the whole folder, from all "
            "nodes"
        )


def _rank_of(file: Path) -> int:
    rank = _RANK.search(file.name)
    return int(rank[1]) if rank else 0


def stage_of(content: Mapping[str, Any]) -> int:
    """The stage of ZeRO that one of `model_files` was written at."""
    return int(content["ds_config"].get("zero_optimization", {}).get("stage", 0))


def _optimizer_files(path: Path) -> list[Path]:
    """List the optimizer files of all ranks in rank order. Stage 0 and a folder that was resharded have none."""
    return sorted((path / "checkpoint").glob(_OPTIMIZER_FILES), key=_rank_of)


def _in_fp32(make: Callable[[], Tensor]) -> Callable[[], Tensor]:
    return lambda: make().float()


def _joined(pieces: Sequence[Tensor], shape: Sequence[int]) -> Callable[[], Tensor]:
    numel = torch.Size(shape).numel()
    return lambda: torch.cat([piece.detach().view(-1) for piece in pieces])[:numel].view(tuple(shape))


# One reader per kind of folder. Each returns parameter name -> "fp32" or moment name -> function that makes the tensor


_States = dict[str, dict[str, Callable[[], Tensor]]]


def _shapes_of(content: Mapping[str, Any]) -> dict[str, torch.Size]:
    return {name: torch.Size(shape) for group in content.get("param_shapes") or [] for name, shape in group.items()}


def _moments_of(state: Mapping[str, Any], like: Tensor) -> dict[str, Tensor]:
    # Moments have the master's dimensions, unlike the step. Those of a flat group also keep the padding at its end.
    moments = {}
    for name, value in state.items():
        if isinstance(value, Tensor) and like.numel() > 0:
            if value.dim() == like.dim() and value.numel() >= like.numel():
                moments[name] = value
            elif name in MOMENTS:
                raise ValueError(
                    f"a moment {name} has shape {tuple(value.shape)}, its parameters have {tuple(like.shape)}: the "
                    "checkpoint was changed after it was saved, take another one"
                )
    return moments


def _with_moments(masters: Sequence[Tensor], saved: Mapping[int, Mapping[str, Any]]) -> list[dict[str, Tensor]]:
    return [{_MASTER: master, **_moments_of(saved.get(group, {}), master)} for group, master in enumerate(masters)]


def _split(groups: Sequence[Sequence[Mapping[str, Tensor]]], shapes: Mapping[str, torch.Size]) -> _States:
    """Split each rank's groups, in which flat tensors join equal parts of parameters, each padded to split evenly."""
    states: _States = {}
    group, offset = 0, 0
    for name, shape in shapes.items():
        part = -(-shape.numel() // len(groups))
        if offset + part > groups[0][group][_MASTER].numel():
            group, offset = group + 1, 0
        place = slice(offset, offset + part)
        states[name] = {
            what: _joined([of_rank[group][what][place] for of_rank in groups], shape) for what in groups[0][group]
        }
        offset += part
    return states


def _of_stage_3(content: Mapping[str, Any], ranks: Sequence[Mapping[str, Any]]) -> _States:
    """At stage 3 each rank has a part of each parameter in its flat groups."""
    groups = [_with_moments(rank["fp32_flat_groups"], rank["optimizer_state_dict"]["state"]) for rank in ranks]
    return _split(groups, _shapes_of(content))


def _of_stage_12(content: Mapping[str, Any], ranks: Sequence[Mapping[str, Any]]) -> _States:
    """At stages 1 and 2 each rank has a piece of a group's flat vector. The files map parameters to its entries."""
    shapes = _shapes_of(content)
    pieces: dict[str, dict[str, list[Tensor]]] = {}
    for rank in ranks:
        base = rank["base_optimizer_state"]
        # Elastic checkpoints hold a list of states instead of a dict by number.
        saved = dict(enumerate(base)) if isinstance(base, list) else base["state"]
        groups = _with_moments(rank["single_partition_of_fp32_groups"], saved)
        for mapping, flats in zip(rank["param_slice_mappings"], groups, strict=True):
            for name, fragment in mapping.items():
                for what, values in flats.items():
                    piece = values[fragment.start : fragment.start + fragment.numel]
                    pieces.setdefault(name, {}).setdefault(what, []).append(piece)
    return {
        name: {what: _joined(values, shapes[name]) for what, values in parts.items()} for name, parts in pieces.items()
    }


def _of_stage_0(content: Mapping[str, Any]) -> _States:
    """At stage 0 tensors are whole and numbered as in the optimizer. The callback's note names their parameters."""
    optimizer = content["optimizer"]
    named = (content.get(NOTE_KEY) or {}).get("optimizer_parameters")
    if not named or not optimizer:
        return {}
    names: list[Any] = named[0]  # None for what is no parameter of the module
    states: _States = {}
    module = content["module"]
    saved = optimizer.get("optimizer_state_dict", optimizer)["state"]
    if "fp32_groups_flat" in optimizer:
        assert None not in names, "a fused optimizer has the module's own parameters"
        return _split(
            [_with_moments(optimizer["fp32_groups_flat"], saved)], {name: module[name].shape for name in names}
        )
    masters = [master for group in optimizer.get("fp32_groups", []) for master in group]
    for index, name in enumerate(names):
        if name is not None:
            tensors = _moments_of(saved.get(index, {}), module[name])
            if masters:
                tensors[_MASTER] = masters[index]
            states[name] = {what: value.detach for what, value in tensors.items()}
    return states


def _of_universal(folder: Path, content: Mapping[str, Any]) -> _States:
    """Each parameter has a folder with one file per tensor. The tensor may be flat and padded."""

    def read(file: Path) -> Any:
        value: Any = load_file(file)
        return value.get("param") if isinstance(value, dict) else value

    def read_whole(file: Path, shape: Sequence[int]) -> Tensor:
        return _joined([read(file)], shape)()

    states: _States = {}
    for name, shape in _shapes_of(content).items():
        files = sorted(inside(folder, name, folder.parent).glob("*.pt"))
        if _MASTER not in {file.stem for file in files}:
            raise ValueError(f"{folder / name} holds no {_MASTER}.pt: reshard the checkpoint again")
        states[name] = {}
        for file in files:
            value = read(file)
            if isinstance(value, Tensor) and value.dim() > 0 and value.numel() >= shape.numel():
                states[name][file.stem] = partial(read_whole, file, shape)
    return states


def _frozen(contents: Sequence[Mapping[str, Any]]) -> dict[str, Callable[[], Tensor]]:
    """Join the untrained parameters of stage 3. Each rank wrote its part beside what Lightning keeps."""
    shapes = contents[0].get("frozen_param_shapes") or {}
    if not shapes or not contents[0].get("frozen_param_fragments"):
        return {}
    fragments = [content["frozen_param_fragments"] for content in contents]
    return {name: _joined([part[name] for part in fragments], shape) for name, shape in shapes.items()}
