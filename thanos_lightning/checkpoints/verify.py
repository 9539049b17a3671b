"""Counts the zeros on disk in every pruned tensor of a Hugging Face folder or a trainer checkpoint.

Only +0 is a zero here. -0 and NaN count as values, as in the enforcement during training.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thanos_lightning.checkpoints.adapters import adapted_name
from thanos_lightning.checkpoints.deepspeed_files import is_zero_folder
from thanos_lightning.checkpoints.format import TrainerCheckpoint
from thanos_lightning.checkpoints.huggingface import SafetensorsFiles, build_model, read_config, read_json
from thanos_lightning.checkpoints.lazy import WithParts, part_of, whole_of
from thanos_lightning.checkpoints.names import stored_names
from thanos_lightning.checkpoints.quantized import is_quantized, read_quantized
from thanos_lightning.checkpoints.shrink import shrunk_shape
from thanos_lightning.layers.targets import find_targets, matches
from thanos_lightning.ranks.masks import LayerMask, dim_of_channels, recorded_pattern
from thanos_lightning.report.plain import read_as
from thanos_lightning.report.progress import open_phase
from thanos_lightning.solver import Channels, Experts, Pattern

_RECORD = "sparsity.json"
_RECORD_FORMAT = 1


@dataclass(frozen=True)
class TensorReport:
    """The result of checking one tensor on disk.

    Attributes:
        name: The tensor's name in the file.
        shape: The tensor's shape in the file; empty if the tensor is missing.
        pattern: The required pattern, such as "2:4".
        sparsity: The fraction of zeros that the pattern requires.
        zeros: How many entries are exactly 0.
        violations: Entries that should be 0 but are not, are not finite, or have moments that should be 0 but are not.
        problems: The violations in words.
        dense_shape: The tensor's shape before an export took channels or experts out of it; None if none did.
    """

    name: str
    shape: tuple[int, ...]
    pattern: str
    sparsity: float
    zeros: int
    violations: int
    problems: tuple[str, ...] = ()
    dense_shape: tuple[int, ...] | None = None

    @property
    def ok(self) -> bool:
        """Whether the tensor conforms."""
        return self.violations == 0

    @property
    def numel(self) -> int:
        """Number of entries."""
        return torch.Size(self.shape).numel() if self.shape else 0


@dataclass(frozen=True)
class _Expected:
    """What a tensor must satisfy."""

    pattern: Pattern
    transposed: bool = False  # whether the tensor is stored as (in_features, out_features)
    shape: tuple[int, ...] | None = None  # as stored, if it is known
    zeros: int | None = None  # the exact number, if it was recorded
    rounded: bool = False  # whether quantisation may have made more of them
    mask: LayerMask | None = None  # the layer's, which is unpacked only while the tensor is checked
    # by name: other tensors of the whole parameter's shape that the mask must hold for, such as moments
    moments: Mapping[str, Tensor] = field(default_factory=dict)
    # before channels or experts were taken out; nothing of what is left has to be 0
    dense_shape: tuple[int, ...] | None = None


def verify_checkpoint(
    path: str | Path,
    pattern: Pattern | None = None,
    *,
    targets: Sequence[str] = ("*",),
    ignore: Sequence[str] = ("lm_head",),
) -> list[TensorReport]:
    """Count zeros on disk, and compare them with the record of the training or export and with a pattern.

    A record is always checked: the counts in a `sparsity.json`, or the masks in a trainer checkpoint. Weights that a
    mask prunes must be 0, and so must their optimizer moments. Of a model that channels or experts were taken out of,
    the shapes are checked. Where torchao, llm-compressor or llama.cpp has quantised the weights, the zeros among the
    dequantised weights are counted, and there may be more of them than were recorded.

    Args:
        path: A Hugging Face folder, a .safetensors or .gguf file, or a trainer checkpoint (.ckpt): a file or a
            DeepSpeed folder. Of the latter, the fp32 masters, the moments and, where it is whole, the model's copy are
            checked.
        pattern: The pattern that every targeted layer must conform to; any but channels and experts. Optional if there
            is a record.
        targets: Globs or `re:` expressions of the module names that `pattern` applies to. The model that the
            configuration describes says which tensors are layers. Without a model, every matrix counts as a layer.
        ignore: Globs or `re:` expressions of the layers to leave out.

    Returns:
        A report for each tensor. The checkpoint conforms if `all(report.ok for report in reports)`.

    Raises:
        FileNotFoundError: If there is nothing at the path.
        ImportError: If the library that quantised the weights is not installed.
        ValueError: If the path cannot be verified, or has no tensor to check.

    Examples:
        >>> from thanos_lightning.solver import NM
        >>> all(report.ok for report in verify_checkpoint("exported", NM(2, 4)))  # doctest: +SKIP
        True
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist: give a Hugging Face folder, a .safetensors, .gguf or .ckpt file"
        )
    if isinstance(pattern, (Channels, Experts)):
        raise ValueError(
            f"{pattern.name} are checked by what was recorded, which says where they lie: leave --pattern out"
        )
    if (path.is_dir() and not is_zero_folder(path)) or path.suffix in (".safetensors", ".gguf"):
        tensors, expectations = _of_files(path, pattern, targets, ignore)
    else:
        with open_phase(f"Reading {path.name}"):
            tensors, expectations = _of_trainer_checkpoint(path, pattern, targets, ignore)
    expected: dict[str, list[_Expected]] = {}
    for name, entry in expectations:
        expected.setdefault(name, []).append(entry)
    if not expected:
        folder = "verify its folder, or " if path.suffix == ".safetensors" else ""
        raise ValueError(f"{path} has no tensor to check: {folder}change --targets and --ignore")
    return _count_zeros(tensors, expected)


def check_masks(
    tensors: Mapping[str, Tensor], masks: Mapping[str, LayerMask], cut: Collection[str] = ()
) -> list[TensorReport]:
    """Count the zeros of tensors, any of which may be missing, and compare them with the masks of their names.

    The tensors in `cut` lack the channels, or rows, that their masks prune: their shapes are checked.
    """
    expected = {name: _expected_of_mask(mask) for name, mask in masks.items()}
    for name in cut:
        mask = masks[name]
        expected[name] = _Expected(mask.pattern, mask.transposed, shrunk_shape(mask), dense_shape=mask.stored_shape)
    return _count_zeros(tensors, {name: [entry] for name, entry in expected.items()})


def smaller_shapes(reports: Iterable[TensorReport]) -> str:
    """Say what was taken out, such as "8 channels became 6", for a message; "" if nothing was."""
    sizes = {
        (before, after, "experts" if report.pattern == "experts" else "channels")
        for report in reports
        for before, after in zip(report.dense_shape or (), report.shape, strict=bool(report.dense_shape))
        if before != after
    }
    return "".join(f"{before:,} {what} became {after:,}" for before, after, what in sorted(sizes)[:1])


# What is expected, of each tensor first what was recorded, then the pattern


def _of_files(
    path: Path, pattern: Pattern | None, targets: Sequence[str], ignore: Sequence[str]
) -> tuple[Mapping[str, Tensor], list[tuple[str, _Expected]]]:
    folder = path if path.is_dir() else path.parent
    rounded = is_quantized(path)
    files = read_quantized(path) if rounded else SafetensorsFiles(path)
    tensors = WithParts(files)
    record = folder / _RECORD
    if path.suffix == ".gguf" and not (record.is_file() or (folder / "config.json").is_file()):
        raise ValueError(
            f"{path} does not say what was pruned: lay the {_RECORD} of the folder that it was made of beside it, or "
            "config.json and give --pattern"
        )
    if not record.is_file() and pattern is None:
        raise ValueError(f"{path} has no {_RECORD} beside it: say what to check with --pattern, such as --pattern 2:4")
    expected = [*_read_record(record).items()] if record.is_file() else []
    if pattern is not None and (folder / "config.json").is_file():
        for names, transposed in _layers_of_folder(folder, targets, ignore):
            expected.append((files.stored_name(names), _Expected(pattern, transposed)))
    elif pattern is not None:
        expected += [(name, _Expected(pattern)) for name in _matrices(tensors, targets, ignore)]
    if rounded:
        expected = [(name, replace(entry, rounded=True)) for name, entry in expected]
    if path.suffix == ".gguf":
        expected = [(name, _as_linear(entry)) for name, entry in expected]
    if not path.is_dir() and any(folder.glob("*.safetensors.index.json")):  # one shard has only some of the tensors
        expected = [(name, entry) for name, entry in expected if name in tensors]
    return tensors, expected


def _of_trainer_checkpoint(
    path: Path, pattern: Pattern | None, targets: Sequence[str], ignore: Sequence[str]
) -> tuple[Mapping[str, Tensor], list[tuple[str, _Expected]]]:
    checkpoint = TrainerCheckpoint.read(path)
    checkpoint.require_intact()
    if pattern is None and checkpoint.masks is None:
        raise ValueError(
            f"{path} holds no state of a ThanosPruningCallback: say what to check with --pattern, such as --pattern 2:4"
        )
    masks = checkpoint.require_masks() if pattern is None else checkpoint.masks or {}
    moments = checkpoint.beside
    if moments is None and masks:
        warnings.warn(
            f"the optimizer's moments in {path} were not checked: it does not say whose they are. Save it from a "
            "Trainer that has the callback",
            stacklevel=3,
        )
    expected = [
        (name, _expected_of_mask(mask, (moments or {}).get(whole_of(name), {}))) for name, mask in masks.items()
    ]
    if pattern is not None and checkpoint.describes_a_model:
        note = checkpoint.require_note()
        model = build_model(note["architecture"], note["config"], path)
        for name, layer in find_targets(model, targets, ignore).items():
            stored = layer.parameter_name if layer.part else f"{adapted_name(name, note)}.weight"
            expected.append((f"{note['model_prefix']}{stored}", _Expected(pattern, layer.transposed)))
    elif pattern is not None:
        expected += [(name, _Expected(pattern)) for name in _matrices(checkpoint.state_dict, targets, ignore)]
    return WithParts(checkpoint.state_dict), expected


def _expected_of_mask(mask: LayerMask, moments: Mapping[str, Tensor] | None = None) -> _Expected:
    return _Expected(mask.pattern, mask.transposed, mask.stored_shape, mask=mask, moments=moments or {})


def _matrices(tensors: Mapping[str, Tensor], targets: Sequence[str], ignore: Sequence[str]) -> list[str]:
    """Name every targeted matrix, where no model says which tensors are layers."""

    def is_targeted(module: str) -> bool:
        return any(matches(module, glob) for glob in targets) and not any(matches(module, glob) for glob in ignore)

    named = [name for name in tensors if is_targeted(name.removesuffix(".weight"))]
    return [name for name in named if (tensor := tensors[name]).dim() == 2 and tensor.is_floating_point()]


def _layers_of_folder(folder: Path, targets: Sequence[str], ignore: Sequence[str]) -> list[tuple[list[str], bool]]:
    """Return each targeted weight's possible names in the files, and whether it is stored transposed."""
    config = read_config(folder)
    if not config.architectures:
        raise ValueError(
            f"{folder / 'config.json'} names no architecture, so its layers are not known: add "
            '"architectures": ["…ForCausalLM"] to it'
        )
    model = build_model(config.architectures[0], config, folder)
    layers = {layer.parameter_name: layer for layer in find_targets(model, targets, ignore).values()}
    return [(names, layers[name].transposed) for name, names in stored_names(model, layers).items()]


# Checking a tensor


def _is_value(tensor: Tensor) -> Tensor:
    return tensor.ne(0) | tensor.signbit()


def _count_zeros(tensors: Mapping[str, Tensor], expected: Mapping[str, Sequence[_Expected]]) -> list[TensorReport]:
    reports = []
    with open_phase("Counting zeros", len(expected), "tensors") as phase:
        for name, expectations in expected.items():
            reports.append(_check(name, tensors, expectations))
            phase.advance(note=name)
    return reports


def _check(name: str, tensors: Mapping[str, Tensor], expectations: Sequence[_Expected]) -> TensorReport:
    asked = expectations[-1].pattern  # the user's, if there is one
    if name not in tensors:
        shape = expectations[0].shape
        return TensorReport(
            name=name,
            shape=(),
            pattern=asked.name,
            sparsity=asked.sparsity,
            zeros=0,
            violations=torch.Size(shape).numel() if shape else 1,
            problems=("the tensor is missing",),
        )
    tensor = _as_matrix(tensors[name])
    missing_zeros, other, problems = 0, 0, []
    if not_finite := tensor.numel() - int(tensor.isfinite().count_nonzero()):
        other += not_finite
        problems.append(f"{not_finite} entries are NaN or infinite")
    values = _is_value(tensor)
    zeros = values.numel() - int(values.count_nonzero())
    for expected in expectations:
        if tensor.dim() != 2 or (expected.shape is not None and tuple(tensor.shape) != expected.shape):
            other += tensor.numel()
            problems.append(f"the shape is {tuple(tensor.shape)}, not {expected.shape or 'that of a matrix'}")
            continue
        drop = None if expected.mask is None else _oriented(expected.mask.keep.logical_not(), expected)
        count, more_problems = _missing_zeros(values, zeros, expected, drop)
        missing_zeros = max(missing_zeros, count)  # several checks see the same entries
        problems += more_problems
        for moment_name, moment in expected.moments.items():
            assert drop is not None, "moments come with a mask"
            if alive := int((_is_value(_as_matrix(part_of(moment, name))) & drop).count_nonzero()):
                other += alive
                problems.append(f"{alive} pruned entries of its moment {moment_name} are not 0")
    negative = int((tensor.eq(0) & tensor.signbit()).count_nonzero()) if missing_zeros else 0
    if negative:
        problems.append(f"{negative} entries are -0, which is not counted as 0")
    problems = list(dict.fromkeys(problems))  # the recorded and the given pattern may find the same problem
    return TensorReport(
        name,
        tuple(tensor.shape),
        asked.name,
        asked.sparsity if expectations[-1].dense_shape is None else 0.0,
        zeros,
        missing_zeros + other,
        tuple(problems),
        expectations[0].dense_shape,
    )


def _as_matrix(tensor: Tensor) -> Tensor:
    return tensor.unsqueeze(1) if tensor.dim() == 1 else tensor  # a bias is a matrix of one column


def _missing_zeros(values: Tensor, zeros: int, expected: _Expected, drop: Tensor | None) -> tuple[int, list[str]]:
    """Return the largest number of entries by which a check is off, and the problems of all checks."""
    problems: list[str] = []
    try:
        # Of what is left where channels were taken out, nothing has to be 0
        excess = 0 if expected.dense_shape is not None else expected.pattern.violations(_oriented(values, expected))
    except ValueError as error:  # the pattern doesn't divide the layer
        return values.numel(), [str(error)]
    if excess:
        problems.append(f"{excess} entries more than pattern {expected.pattern.name} allows are not 0")
    missing = 0 if expected.zeros is None else expected.zeros - zeros
    if off := max(missing, 0) if expected.rounded else abs(missing):
        problems.append(f"{zeros} zeros, recorded were {expected.zeros}")
    if came_back := 0 if drop is None else int((values & drop).count_nonzero()):
        problems.append(f"{came_back} pruned entries are not 0")
    return max(excess, off, came_back), problems


def _as_linear(expected: _Expected) -> _Expected:
    """What is expected of the tensor of a GGUF file, in which no matrix is transposed."""
    if not expected.transposed or expected.shape is None:
        return replace(expected, transposed=False)
    return replace(expected, transposed=False, shape=expected.shape[::-1])


def _oriented(tensor: Tensor, expected: _Expected) -> Tensor:
    return tensor.t() if expected.transposed else tensor


# The record


def _read_record(path: Path) -> dict[str, _Expected]:
    record = read_json(path)
    if not isinstance(record, dict) or record.get("format") != _RECORD_FORMAT:
        raise ValueError(
            f"{path} is not of format {_RECORD_FORMAT}: use the version of thanos_lightning that wrote it, or remove "
            "it and verify against a pattern"
        )
    try:
        entries = read_as(dict[str, dict[str, Any]], record.get("tensors"), "tensors")
        return {name: _expected_of_record(name, entry) for name, entry in entries.items()}
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({error}): restore it, or remove it and verify against a pattern"
        ) from error


def _expected_of_record(name: str, entry: Mapping[str, Any]) -> _Expected:
    return _Expected(
        pattern=recorded_pattern(entry),
        transposed=read_as(bool, entry.get("transposed"), f"transposed of {name}"),
        shape=read_as(tuple[int, ...], entry.get("shape"), f"shape of {name}"),
        zeros=read_as(int, entry.get("zeros"), f"zeros of {name}"),
        dense_shape=read_as(tuple[int, ...] | None, entry.get("dense_shape"), f"dense_shape of {name}"),
    )


def write_record(folder: Path, reports: Sequence[TensorReport], masks: Iterable[LayerMask]) -> None:
    """Write `sparsity.json`, which `verify_checkpoint` compares with. The masks are in the order of the reports."""
    record = {
        "format": _RECORD_FORMAT,
        "sparsity": sum(report.zeros for report in reports) / sum(report.numel for report in reports),
        "tensors": {
            report.name: {
                "shape": list(report.shape),
                "pattern": report.pattern,
                "sparsity": mask.pattern.sparsity,
                "outlier_fraction": mask.pattern.outlier_fraction,
                **dim_of_channels(mask.pattern),
                "zeros": report.zeros,
                "transposed": mask.transposed,
                **({} if report.dense_shape is None else {"dense_shape": list(report.dense_shape)}),
            }
            for report, mask in zip(reports, masks, strict=True)
        },
    }
    (folder / _RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
