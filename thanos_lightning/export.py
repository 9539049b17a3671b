"""From a trainer checkpoint to a Hugging Face folder, and the proof on disk: every pruned tensor is read and counted.

A zero is +0 here and nothing else: -0 and NaN are values, as they are for the enforcement during training.
"""

from __future__ import annotations

import json
import pickle
import shutil
import uuid
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from thanos_lightning.masks import LayerMask
from thanos_lightning.solver import Pattern, parse_pattern
from thanos_lightning.targets import find_targets, matches

_RECORD = "sparsity.json"
_RECORD_FORMAT = 1
_CHECKPOINT_FORMAT = 1
_NOTE = "thanos_lightning"
_CALLBACK = "ThanosPruningCallback"
_TOKENIZER_FILES = ("*token*", "vocab*", "merges.txt", "spiece.model")


@dataclass(frozen=True)
class TensorReport:
    """What was found in one tensor on disk.

    Attributes:
        name: Its name in the file.
        shape: Its shape in the file; empty where the tensor is missing.
        pattern: The pattern that it has to conform to, such as "2:4".
        sparsity: The fraction of zeros that the pattern asks for.
        zeros: How many entries are exactly 0.
        violations: Entries that should be 0 and are not, are not finite, or whose moments live on; 0 where all is well.
        problems: The same in words.
    """

    name: str
    shape: tuple[int, ...]
    pattern: str
    sparsity: float
    zeros: int
    violations: int
    problems: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the tensor conforms."""
        return self.violations == 0

    @property
    def numel(self) -> int:
        """Number of entries."""
        return torch.Size(self.shape).numel() if self.shape else 0


class NonconformingError(ValueError):
    """What was to be exported is not as sparse as its masks say.

    Attributes:
        reports: Of all tensors, also the ones that conform.
    """

    def __init__(self, message: str, reports: list[TensorReport]) -> None:
        super().__init__(message)
        self.reports = reports


@dataclass(frozen=True)
class _Expected:
    """What a tensor has to be.

    Attributes:
        pattern: To which it conforms.
        transposed: Whether it is stored as (in_features, out_features).
        shape: As stored, where known.
        zeros: Their exact number, where recorded.
        mask: A `LayerMask.state`, unpacked only while its tensor is checked.
        moments: Name -> tensor of the optimizer, with the layout of the parameter.
    """

    pattern: Pattern
    transposed: bool = False
    shape: tuple[int, ...] | None = None
    zeros: int | None = None
    mask: dict[str, Any] | None = None
    moments: Mapping[str, Tensor] = field(default_factory=dict)


class _SafetensorsFiles(Mapping[str, Tensor]):
    """The tensors of one or several .safetensors files, each read when it is asked for."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._file_of: dict[str, Path] = {}
        for file in files:
            try:
                with safe_open(file, framework="pt") as opened:
                    self._file_of.update(dict.fromkeys(opened.keys(), file))
            except SafetensorError as error:
                raise ValueError(f"{file} is damaged or no safetensors file ({error}): write it again") from error

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._file_of[name], framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._file_of

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


def export_checkpoint(
    checkpoint: str | Path,
    output: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    tokenizer: str | Path | None = None,
) -> list[TensorReport]:
    """Turn a trainer checkpoint into a Hugging Face folder, and count its zeros on disk.

    The folder holds the weights as safetensors, the configurations, the tokenizer, and `sparsity.json`: what
    `verify_checkpoint` compares with later. It appears whole or not at all.

    Args:
        checkpoint: A .ckpt file that a Trainer with a `ThanosPruningCallback` wrote.
        output: Folder to write. It must not exist, or be empty.
        dtype: Of the written parameters, such as "bfloat16"; as in the checkpoint by default.
        tokenizer: Name or path of the tokenizer; by default the one that was recorded in training.

    Returns:
        A report for each pruned tensor, in the order of the model. All of them conform.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If the output isn't free, the checkpoint is none or holds no masks yet, its weights don't fit the
            model, or the tokenizer can't be had.
        NonconformingError: If a pruned entry isn't 0, or an entry isn't finite.
    """
    output = Path(output).resolve()
    _require_free(output)
    path = Path(checkpoint)
    content = _load_trainer_checkpoint(path)
    masks = _require_masks(content, path)
    note = _note(content, path)
    prefix: str = note["model_prefix"]
    outside = [name for name in masks if not name.startswith(prefix)]
    if outside:
        warnings.warn(
            f"{len(outside)} pruned tensor(s) of {path} are not part of its {note['architecture']} and not exported: "
            f"{_some(outside)}",
            stacklevel=2,
        )
    inside = {name.removeprefix(prefix): mask for name, mask in masks.items() if name.startswith(prefix)}
    loaded_tokenizer = _load_tokenizer(tokenizer, note["tokenizer"])
    model = _assemble(note, content["state_dict"], path)
    if dtype is not None:
        _cast(model, _parse_dtype(dtype))
    with _whole_folder(output) as folder:
        model.save_pretrained(folder)
        if loaded_tokenizer is not None:
            loaded_tokenizer.save_pretrained(folder)
        tensors = _SafetensorsFiles(_weight_files(folder))
        aliases = _aliases(model)
        reports = [
            _check(_stored_name(aliases[name], tensors), tensors, [_expected_of_mask(mask)])
            for name, mask in inside.items()
        ]
        failed = [report for report in reports if not report.ok]
        if failed:
            raise NonconformingError(
                f"{len(failed)} of {len(reports)} pruned tensors of {path} do not conform "
                f"({failed[0].name}: {'; '.join(failed[0].problems)}), so nothing was exported: export another "
                "checkpoint, or another dtype if the numbers overflowed",
                reports,
            )
        _write_record(folder, reports, inside.values())
    return reports


def verify_checkpoint(
    path: str | Path,
    pattern: Pattern | None = None,
    *,
    targets: Sequence[str] = ("*",),
    ignore: Sequence[str] = ("lm_head",),
) -> list[TensorReport]:
    """Count zeros on disk: against what was recorded in training or export, and against a pattern.

    What is recorded is checked wherever it is found: the counts of a `sparsity.json`; the masks inside a trainer
    checkpoint, under which the weights and the optimizer's moments must be 0.

    Args:
        path: A Hugging Face folder, a .safetensors file, or a trainer checkpoint (.ckpt).
        pattern: What every targeted layer must conform to. May be left out where something is recorded.
        targets: Globs or `re:` expressions of module names, for `pattern`. Which tensors are layers is told by the
            model that the configuration describes; where there is none, every matrix counts as one.
        ignore: Layers to leave out, in the same words.

    Returns:
        A report for each tensor. Whether all is well is `all(report.ok for report in reports)`.

    Raises:
        FileNotFoundError: If there is nothing at the path.
        ValueError: If it's nothing that can be verified, or there is no tensor to check.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: give a Hugging Face folder, a .safetensors or a .ckpt file")
    if path.is_dir() or path.suffix == ".safetensors":
        tensors, expected = _expect_of_files(path, pattern, targets, ignore)
    else:
        tensors, expected = _expect_of_trainer_checkpoint(path, pattern, targets, ignore)
    return [_check(name, tensors, expectations) for name, expectations in expected.items()]


# What is expected


def _expect_of_files(
    path: Path, pattern: Pattern | None, targets: Sequence[str], ignore: Sequence[str]
) -> tuple[Mapping[str, Tensor], dict[str, list[_Expected]]]:
    folder = path if path.is_dir() else path.parent
    tensors = _SafetensorsFiles(_weight_files(path) if path.is_dir() else [path])
    # a shard holds only some of what was recorded for all
    is_shard = not path.is_dir() and bool(list(folder.glob("*.safetensors.index.json")))
    expected: dict[str, list[_Expected]] = {}
    record = folder / _RECORD
    if record.is_file():
        for name, entry in _read_record(record).items():
            if name in tensors or not is_shard:
                expected[name] = [entry]
    elif pattern is None:
        raise ValueError(f"{path} has no {_RECORD} beside it: say what to check with --pattern, such as --pattern 2:4")
    if pattern is not None:
        layers = _layers_of_folder(folder, targets, ignore) if (folder / "config.json").is_file() else None
        if layers is None:
            _expect_matrices(expected, tensors, pattern, targets, ignore)
        else:
            for names, transposed in layers:
                name = _stored_name(names, tensors)
                if name in tensors or not is_shard:
                    expected.setdefault(name, []).append(_Expected(pattern, transposed))
    if not expected:
        raise ValueError(f"{path} has no tensor to check: verify the folder, or change --targets and --ignore")
    return tensors, expected


def _expect_of_trainer_checkpoint(
    path: Path, pattern: Pattern | None, targets: Sequence[str], ignore: Sequence[str]
) -> tuple[Mapping[str, Tensor], dict[str, list[_Expected]]]:
    content = _load_trainer_checkpoint(path)
    tensors: Mapping[str, Tensor] = content["state_dict"]
    masks = _require_masks(content, path) if pattern is None else _masks(content) or {}
    moments = _moments(content)
    if moments is None and masks:
        warnings.warn(
            f"the optimizer's moments in {path} were not checked: it does not say whose they are. Save it from a "
            "Trainer that has the callback",
            stacklevel=3,
        )
    expected = {name: [_expected_of_mask(mask, moments=(moments or {}).get(name, {}))] for name, mask in masks.items()}
    if pattern is not None:
        if "architecture" in content.get(_NOTE, {}):
            note = _note(content, path)
            model = _build(note["architecture"], note["config"], path)
            for name, layer in find_targets(model, targets, ignore).items():
                full_name = f"{note['model_prefix']}{name}.weight"
                expected.setdefault(full_name, []).append(_Expected(pattern, layer.transposed))
        else:
            _expect_matrices(expected, tensors, pattern, targets, ignore)
    if not expected:
        raise ValueError(f"{path} has no tensor to check: change --targets and --ignore")
    return tensors, expected


def _expected_of_mask(mask: dict[str, Any], moments: Mapping[str, Tensor] | None = None) -> _Expected:
    shape = tuple(mask["shape"])
    return _Expected(
        pattern=_pattern_of(mask),
        transposed=mask["transposed"],
        shape=shape[::-1] if mask["transposed"] else shape,
        mask=mask,
        moments=moments or {},
    )


def _expect_matrices(
    expected: dict[str, list[_Expected]],
    tensors: Mapping[str, Tensor],
    pattern: Pattern,
    targets: Sequence[str],
    ignore: Sequence[str],
) -> None:
    """Where no model tells which tensors are layers, every matrix that is targeted has to conform."""
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        if (
            tensor.dim() == 2
            and tensor.is_floating_point()
            and any(matches(module, expression) for expression in targets)
            and not any(matches(module, expression) for expression in ignore)
        ):
            expected.setdefault(name, []).append(_Expected(pattern))


def _layers_of_folder(folder: Path, targets: Sequence[str], ignore: Sequence[str]) -> list[tuple[list[str], bool]]:
    """The possible names in the file, and whether it is stored transposed, of each targeted layer's weight."""
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    if not config.architectures:
        raise ValueError(
            f"{folder / 'config.json'} names no architecture, so its layers are not known: add "
            '"architectures": ["…ForCausalLM"] to it'
        )
    model = _build(config.architectures[0], config, folder)
    aliases = _aliases(model)
    return [
        (aliases[layer.parameter_name], layer.transposed) for layer in find_targets(model, targets, ignore).values()
    ]


def _pattern_of(entry: Mapping[str, Any]) -> Pattern:
    return parse_pattern(entry["pattern"], entry["sparsity"], entry["outlier_fraction"])


# Checking a tensor


def _is_value(tensor: Tensor) -> Tensor:
    return tensor.ne(0) | tensor.signbit()


def _check(name: str, tensors: Mapping[str, Tensor], expectations: Sequence[_Expected]) -> TensorReport:
    asked = expectations[-1].pattern  # the user's, where it comes on top of the recorded one
    if name not in tensors:
        wanted = expectations[0].shape
        return TensorReport(
            name=name,
            shape=(),
            pattern=asked.name,
            sparsity=asked.sparsity,
            zeros=0,
            violations=torch.Size(wanted).numel() if wanted else 1,
            problems=("the tensor is missing",),
        )
    tensor = tensors[name]
    missing_zeros, other, problems = 0, 0, []
    not_finite = tensor.numel() - int(tensor.isfinite().count_nonzero())
    if not_finite:
        other += not_finite
        problems.append(f"{not_finite} entries are NaN or infinite")
    values = _is_value(tensor)
    zeros = values.numel() - int(values.count_nonzero())
    for expected in expectations:
        if tensor.dim() != 2 or (expected.shape is not None and tuple(tensor.shape) != expected.shape):
            other += tensor.numel()
            problems.append(f"the shape is {tuple(tensor.shape)}, not {expected.shape or 'that of a matrix'}")
            continue
        drop = None
        if expected.mask is not None:
            drop = _oriented(LayerMask.from_state(expected.mask).keep.logical_not(), expected)
        count, found = _missing_zeros(values, zeros, expected, drop)
        missing_zeros = max(missing_zeros, count)  # several checks see the same entries
        problems += found
        for moment_name, moment in expected.moments.items():
            assert drop is not None, "moments come with a mask"
            alive = int((_is_value(moment) & drop).count_nonzero())
            if alive:
                other += alive
                problems.append(f"{alive} pruned entries of its moment {moment_name} are not 0")
    negative = int((tensor.eq(0) & tensor.signbit()).count_nonzero()) if missing_zeros else 0
    if negative:
        problems.append(f"{negative} entries are -0, which is not counted as 0")
    return TensorReport(
        name, tuple(tensor.shape), asked.name, asked.sparsity, zeros, missing_zeros + other, tuple(problems)
    )


def _missing_zeros(values: Tensor, zeros: int, expected: _Expected, drop: Tensor | None) -> tuple[int, list[str]]:
    """By how many zeros the worst of the checks is off, and what each of them says."""
    problems: list[str] = []
    try:
        excess = expected.pattern.violations(_oriented(values, expected))
    except ValueError as error:  # the pattern doesn't divide the layer
        return values.numel(), [str(error)]
    if excess:
        problems.append(f"{excess} entries more than pattern {expected.pattern.name} allows are not 0")
    off = 0 if expected.zeros is None else abs(zeros - expected.zeros)
    if off:
        problems.append(f"{zeros} zeros, recorded were {expected.zeros}")
    came_back = 0 if drop is None else int((values & drop).count_nonzero())
    if came_back:
        problems.append(f"{came_back} pruned entries are not 0")
    return max(excess, off, came_back), problems


def _oriented(tensor: Tensor, expected: _Expected) -> Tensor:
    return tensor.t() if expected.transposed else tensor


# Trainer checkpoints


def _load_trainer_checkpoint(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: give a checkpoint that the Trainer wrote (.ckpt)")
    if path.is_dir():
        raise _sharded(path)
    if not zipfile.is_zipfile(path):
        raise _not_a_checkpoint(path)
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds objects that are not plain values, and reading these could run any code: "
            f"{_first_line(error)} Save plain values as hyperparameters, or, if you trust the file, allow the class "
            "(torch.serialization.add_safe_globals) and call thanos_lightning.export from Python"
        ) from error
    except RuntimeError as error:  # a zip archive, but not torch's
        raise _not_a_checkpoint(path) from error
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise _not_a_checkpoint(path)
    return content


def _sharded(path: Path) -> ValueError:
    return ValueError(
        f"{path} is a folder, as DeepSpeed and other sharding strategies write checkpoints; these are not supported "
        "yet. Give a single .ckpt file: train on one device or with DDP"
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


def _masks(content: Mapping[str, Any]) -> dict[str, dict[str, Any]] | None:
    """Parameter name in the LightningModule -> `LayerMask.state`; None where no callback has left a state."""
    states = [state for key, state in content.get("callbacks", {}).items() if key.startswith(_CALLBACK)]
    return states[0]["masks"] if states else None  # the Trainer refuses two callbacks of one key


def _require_masks(content: Mapping[str, Any], path: Path) -> dict[str, dict[str, Any]]:
    masks = _masks(content)
    if masks is None:
        raise ValueError(
            f"{path} holds no state of a {_CALLBACK}: train with the callback, or say what to verify with --pattern, "
            "such as --pattern 2:4"
        )
    if not masks:
        raise ValueError(
            f"{path} holds no masks yet: it was saved after {content.get('global_step')} optimizer steps, before the "
            "first pruning event. Give a later checkpoint"
        )
    return masks


def _note(content: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """What the callback wrote down about the Hugging Face model."""
    note: Mapping[str, Any] | None = content.get(_NOTE)
    if note is None or "architecture" not in note:
        raise ValueError(
            f"{path} does not say which Hugging Face model it holds: train a LightningModule that keeps a transformers "
            "model as a submodule"
        )
    if note["format"] != _CHECKPOINT_FORMAT:
        raise ValueError(
            f"{path} has format {note['format']!r}, this version reads {_CHECKPOINT_FORMAT}: use the version of "
            "thanos_lightning that wrote it"
        )
    return note


def _moments(content: Mapping[str, Any]) -> dict[str, dict[str, Tensor]] | None:
    """Parameter name -> name -> moment of the matrices, or None where it isn't told which moment is whose."""
    optimizers = content.get("optimizer_states", [])
    named: Sequence[Sequence[str | None]] | None = content.get(_NOTE, {}).get("optimizer_parameters")
    if named is None:
        return None if optimizers else {}
    found: dict[str, dict[str, Tensor]] = {}
    for optimizer, names in zip(optimizers, named, strict=True):
        for index, state in optimizer["state"].items():
            name = names[index]
            if name is not None:
                found[name] = _matrix_moments(state)
    return found


def _matrix_moments(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {
        name: value
        for name, value in state.items()
        if isinstance(value, Tensor) and value.dim() == 2 and value.is_floating_point()
    }


# The Hugging Face model


def _build(architecture: str, config: Any, path: Path) -> transformers.PreTrainedModel:
    """The model of a configuration (or its dict) without memory for its weights."""
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


def _assemble(note: Mapping[str, Any], state_dict: Mapping[str, Tensor], path: Path) -> transformers.PreTrainedModel:
    """The trained model, its weights being the ones of the checkpoint, not copies."""
    model = _build(note["architecture"], note["config"], path)
    if note["generation_config"] is not None:
        model.generation_config = transformers.GenerationConfig.from_dict(dict(note["generation_config"]))
    prefix: str = note["model_prefix"]
    weights = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
    mend = "export with the version of transformers that the model was trained with, and a module that was not altered"
    try:
        unexpected = model.load_state_dict(weights, strict=False, assign=True).unexpected_keys
    except RuntimeError as error:  # shapes
        raise ValueError(f"the weights in {path} do not fit {note['architecture']} ({error}): {mend}") from error
    model.tie_weights()
    loaded = model.state_dict()
    missing = [name for name, value in loaded.items() if value.is_meta]
    if missing or unexpected:
        raise ValueError(
            f"the weights in {path} do not fit {note['architecture']}: missing {_some(missing)}, unexpected "
            f"{_some(unexpected)}; {mend}"
        )
    for name, value in weights.items():
        if loaded[name].data_ptr() != value.data_ptr() and not torch.equal(loaded[name], value):
            raise ValueError(
                f"{prefix}{name} in {path} is tied to another weight by the configuration, but has values of its own, "
                "which would be lost: train with tied weights, or with tie_word_embeddings=False in the configuration"
            )
    return model


def _aliases(model: nn.Module) -> dict[str, list[str]]:
    """Parameter name -> all names of that parameter, itself first."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: [name, *(other for other in group if other != name)] for group in names.values() for name in group}


def _stored_name(names: Sequence[str], tensors: Mapping[str, Tensor]) -> str:
    """Of the names of one parameter, the one that is in the file, where tied weights are stored once."""
    return next((name for name in names if name in tensors), names[0])


def _parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    parsed = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(parsed, torch.dtype) or not parsed.is_floating_point:
        raise ValueError(f"dtype is {dtype!r}: give a floating point type of torch, such as bfloat16 or float32")
    return parsed


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the parameters. Buffers stay: models keep some in fp32 on purpose."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _load_tokenizer(given: str | Path | None, recorded: str | None) -> Any:
    """The tokenizer to export, or None with a warning where the checkpoint knows of none."""
    name = given or recorded
    folder = Path(name) if name else None
    if name is None or (
        given is None
        and folder is not None
        and folder.is_dir()
        and not any(any(folder.glob(files)) for files in _TOKENIZER_FILES)
    ):
        warnings.warn(
            f"{'the checkpoint names no tokenizer' if name is None else f'{name} holds no tokenizer'}, so none is "
            "exported: give one with --tokenizer",
            stacklevel=3,
        )
        return None
    try:
        return transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"the tokenizer {str(name)!r} {'' if given else 'that was used in training '}can't be loaded "
            f"({str(error).splitlines()[0]}): give the name or path of one with --tokenizer"
        ) from error


# Folders


def _require_free(output: Path) -> None:
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists():
        raise ValueError(f"{output} exists already: give another folder, or remove it first")


@contextmanager
def _whole_folder(output: Path) -> Iterator[Path]:
    """A folder to write to, that becomes `output` at the end; after an error nothing of it is left."""
    partial = output.with_name(f".{output.name}.{uuid.uuid4().hex[:8]}.partial")
    new_parents = [parent for parent in output.parents if not parent.exists()]
    try:
        partial.mkdir(parents=True)
        yield partial
        if output.exists():  # an empty folder, which not every system lets a rename replace
            output.rmdir()
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in new_parents:
            with suppress(OSError):  # not empty: somebody else uses it by now
                parent.rmdir()
        raise


def _weight_files(folder: Path) -> list[Path]:
    """The .safetensors files of a Hugging Face folder; not the ones of another format that some folders hold too."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(_read_json(index)["weight_map"].values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ValueError(f"{folder} lacks {_some(missing)}, which {index.name} names: copy the whole folder")
        return [folder / name for name in names]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        if (folder / "latest").is_file() or (folder / "checkpoint").is_dir() or (folder / ".metadata").is_file():
            raise _sharded(folder)
        raise ValueError(f"{folder} holds no .safetensors file: give a Hugging Face folder, or a .ckpt file")
    return files


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): restore or remove it") from error


def _read_record(path: Path) -> dict[str, _Expected]:
    record = _read_json(path)
    if not isinstance(record, dict) or record.get("format") != _RECORD_FORMAT:
        raise ValueError(
            f"{path} is not of format {_RECORD_FORMAT}: use the version of thanos_lightning that wrote it, or remove "
            "it and verify against a pattern"
        )
    return {
        name: _Expected(
            pattern=_pattern_of(entry),
            transposed=entry["transposed"],
            shape=tuple(entry["shape"]),
            zeros=entry["zeros"],
        )
        for name, entry in record["tensors"].items()
    }


def _write_record(folder: Path, reports: Sequence[TensorReport], masks: Iterable[Mapping[str, Any]]) -> None:
    record = {
        "format": _RECORD_FORMAT,
        "sparsity": sum(report.zeros for report in reports) / sum(report.numel for report in reports),
        "tensors": {
            report.name: {
                "shape": list(report.shape),
                "pattern": report.pattern,
                "sparsity": report.sparsity,
                "outlier_fraction": mask["outlier_fraction"],
                "zeros": report.zeros,
                "transposed": mask["transposed"],
            }
            for report, mask in zip(reports, masks, strict=True)
        },
    }
    (folder / _RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _some(names: Sequence[str]) -> str:
    return f"{', '.join(names[:3])}{f', … ({len(names)} in all)' if len(names) > 3 else ''}" or "nothing"
