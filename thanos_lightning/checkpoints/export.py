"""Exports a trainer checkpoint as a Hugging Face folder, and verifies the zeros on disk before the folder appears."""

from __future__ import annotations

import importlib.metadata
import warnings
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePath
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor

from thanos_lightning.checkpoints.adapters import merge_adapters, plain_name, write_adapters
from thanos_lightning.checkpoints.folders import require_free, whole_folder
from thanos_lightning.checkpoints.foreign import require_regular_files
from thanos_lightning.checkpoints.format import TrainerCheckpoint, pruning_state
from thanos_lightning.checkpoints.hub import go_offline_without_hub
from thanos_lightning.checkpoints.huggingface import SafetensorsFiles, build_model, first_line, write_model
from thanos_lightning.checkpoints.lazy import LazyTensors, WithParts, without_prefix
from thanos_lightning.checkpoints.names import stored_names
from thanos_lightning.checkpoints.shrink import channel_masks, shrink, without_experts
from thanos_lightning.checkpoints.verify import TensorReport, check_masks, smaller_shapes, write_record
from thanos_lightning.layers.targets import examples
from thanos_lightning.ranks.masks import LayerMask
from thanos_lightning.report.data import PruningReport
from thanos_lightning.report.progress import open_phase
from thanos_lightning.solver import Experts

_TOKENIZER_FILES = ("*token*", "vocab*", "merges.txt", "spiece.model")


class NonconformingError(ValueError):
    """The exported weights are not as sparse as their masks say.

    Attributes:
        reports: The reports of all pruned tensors, also of those that conform.
    """

    def __init__(self, message: str, reports: list[TensorReport]) -> None:
        super().__init__(message)
        self.reports = reports


# More than sixty lines, for what it says of its arguments
def export_checkpoint(
    checkpoint: str | Path,
    output: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    tokenizer: str | Path | None = None,
    keep_shape: bool = False,
    keep_adapter: bool = False,
) -> list[TensorReport]:
    """Turn a trainer checkpoint into a Hugging Face folder, and count its zeros on disk.

    The folder holds the weights as safetensors, the configurations, the tokenizer, a model card, and `sparsity.json`,
    the record that `verify_checkpoint` compares with later. The folder appears whole or not at all. Channels that were
    pruned, and experts, are taken out: the model is smaller, computes the same, and is one like any other. LoRA
    adapters are merged.

    Args:
        checkpoint: A .ckpt that a Trainer with a `ThanosPruningCallback` wrote: a file or a DeepSpeed folder. One
            process exports the folder's fp32 master, whatever the number of ranks that wrote it.
        output: Folder to write. It must be empty or not exist.
        dtype: Dtype of the written parameters, such as "bfloat16"; by default the checkpoint's.
        tokenizer: Name or path of the tokenizer; by default the one that was recorded in training.
        keep_shape: Whether channels stay in the model, as zeros. Experts can't: tokens would be sent to them.
        keep_adapter: Whether LoRA adapters are written beside the sparse weights, each into a folder of its name as
            peft does, and not merged. A model that loads them needs `mask_adapters`, or it is not what was trained.

    Returns:
        A report for each pruned tensor, in the order of the model. All of them conform.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If the output is taken, the path is no checkpoint or holds no masks yet, the weights do not fit
            the model, the model can't be made smaller, there is no adapter to keep, or the tokenizer cannot be loaded.
        NonconformingError: If a pruned entry isn't 0, or an entry isn't finite.

    Examples:
        >>> reports = export_checkpoint("runs/quickstart/checkpoints/quickstart.ckpt", "exported")  # doctest: +SKIP
        >>> min(report.sparsity for report in reports)  # doctest: +SKIP
        0.5
    """
    output = Path(output).resolve()
    require_free(output)
    path = Path(checkpoint)
    with open_phase(f"Reading {path.name}"):
        trained = TrainerCheckpoint.read(path)
        trained.require_intact()
    masks = _masks_in_model(trained)
    note = trained.require_note()
    loaded_tokenizer = _load_tokenizer(tokenizer, note["tokenizer"])
    model, tensors = _assemble(trained, None if dtype is None else _parse_dtype(dtype), keep_adapter=keep_adapter)
    model, tensors, masks, cut = _made_smaller(model, tensors, masks, path, keep_shape, keep_adapter)
    with whole_folder(output) as folder:
        with open_phase(f"Writing {output.name}"):
            try:
                write_model(folder, model, tensors)
            except SafetensorError as error:  # the write failed
                raise ValueError(
                    f"{output} can't be written ({error}): make room, or give a folder on another disk"
                ) from error
        weights = without_prefix(trained.state_dict, note["model_prefix"])
        adapters = write_adapters(folder, weights, note["adapters"], path) if keep_adapter else []
        if loaded_tokenizer is not None:
            loaded_tokenizer.save_pretrained(folder)
        files = SafetensorsFiles(folder)
        stored = {name: files.stored_name(names) for name, names in stored_names(model, masks).items()}
        on_disk = {stored[name]: mask for name, mask in masks.items()}
        reports = check_masks(WithParts(files), on_disk, {stored[name] for name in masks if name in cut})
        _require_zeros(reports, path)
        write_record(folder, reports, masks.values())
        _write_card(folder, trained, reports, adapters)
    return reports


def _masks_in_model(checkpoint: TrainerCheckpoint) -> dict[str, LayerMask]:
    """The masks of the Hugging Face model, by the names that its parameters have in it. Warns of any others."""
    masks, note, path = checkpoint.require_masks(), checkpoint.require_note(), checkpoint.path
    prefix: str = note["model_prefix"]
    outside = [name for name in masks if not name.startswith(prefix)]
    if len(outside) == len(masks):
        raise ValueError(
            f"none of the {len(masks)} pruned tensors of {path} is part of its {note['architecture']}, so nothing "
            "sparse could be exported: keep the pruned layers inside a transformers model"
        )
    if outside:
        warnings.warn(
            f"{len(outside)} pruned tensor(s) of {path} are not part of its {note['architecture']} and not exported: "
            f"{examples(outside)}",
            stacklevel=3,
        )
    return {plain_name(name.removeprefix(prefix)): mask for name, mask in masks.items() if name.startswith(prefix)}


def _require_zeros(reports: list[TensorReport], path: Path) -> None:
    failed = [report for report in reports if not report.ok]
    if failed:
        raise NonconformingError(
            f"{len(failed)} of {len(reports)} pruned tensors of {path} do not conform "
            f"({failed[0].name}: {'; '.join(failed[0].problems)}), so nothing was exported: export another "
            "checkpoint, or another dtype if the numbers overflowed",
            reports,
        )


# The Hugging Face model


def _made_smaller(
    model: transformers.PreTrainedModel,
    tensors: LazyTensors,
    masks: dict[str, LayerMask],
    path: Path,
    keep_shape: bool,
    keep_adapter: bool,
) -> tuple[transformers.PreTrainedModel, LazyTensors, dict[str, LayerMask], Collection[str]]:
    """Take channels and experts that are zero out of a model, and return the names of the cut parameters last."""
    channels = {} if keep_shape else channel_masks(masks)
    if channels and keep_adapter:
        raise ValueError("adapters are as wide as the model was in training: give --keep-shape with --keep-adapter")
    experts = {name: mask for name, mask in masks.items() if isinstance(mask.pattern, Experts)}
    if experts and keep_shape:
        raise ValueError(
            "a model that keeps its shape would send tokens to experts that were dropped: leave --keep-shape out"
        )
    if zeros := channels | experts:
        _require_zeros(check_masks(WithParts(tensors), zeros), path)
    if channels:
        model, tensors = shrink(model, tensors, channels, path)
    if not experts:
        return model, tensors, masks, channels
    model, tensors, changed, others = without_experts(model, tensors, masks, path)
    return model, tensors, others | changed, channels | changed


def _assemble(
    checkpoint: TrainerCheckpoint, dtype: torch.dtype | None, *, keep_adapter: bool
) -> tuple[transformers.PreTrainedModel, LazyTensors]:
    """Build the trained model, without weights, and find its tensors, of which each is made when it is read."""
    note, path = checkpoint.require_note(), checkpoint.path
    model = build_model(note["architecture"], note["config"], path)
    if note["generation_config"] is not None:
        model.generation_config = transformers.GenerationConfig.from_dict(dict(note["generation_config"]))
    prefix: str = note["model_prefix"]
    weights = merge_adapters(without_prefix(checkpoint.state_dict, prefix), note["adapters"], keep=keep_adapter)
    if adapted := [name for name in weights if ".lora_" in name]:
        raise ValueError(
            f"{path} has adapters that an export can't merge, such as {prefix}{adapted[0]} (of an embedding, DoRA, or "
            "put on after the training began): merge them in Python, which writes over zeros of their layers"
        )
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    tied: Mapping[str, str] = model.all_tied_weights_keys  # name -> the name under which the files have the tensor
    mend = "export with the version of transformers that the model was trained with, and a module that was not altered"
    missing = [name for name in shapes if name not in weights and tied.get(name) not in weights]
    unexpected = [name for name in weights if name not in shapes]
    if missing or unexpected:
        raise ValueError(
            f"the weights in {path} do not fit {note['architecture']}: missing {examples(missing)}, unexpected "
            f"{examples(unexpected)}; {mend}"
        )
    for name, other in tied.items():
        if name in weights and other in weights and not torch.equal(weights[name], weights[other]):
            raise ValueError(
                f"{prefix}{name} in {path} is tied to another weight by the configuration, but has values of its own, "
                "which would be lost: train with tied weights, or with tie_word_embeddings=False in the configuration"
            )
    # Buffers keep their dtype, because models have some in fp32 on purpose.
    cast = set() if dtype is None else {name for name, _ in model.named_parameters(remove_duplicate=False)}

    def fitting(name: str) -> Tensor:
        value = weights[name if name in weights else tied[name]]
        if value.shape != shapes[name]:
            raise ValueError(
                f"the weights in {path} do not fit {note['architecture']} (size mismatch for {name}: "
                f"{tuple(value.shape)}, and {tuple(shapes[name])} in the model): {mend}"
            )
        return value.to(dtype) if name in cast else value

    return model, LazyTensors({name: partial(fitting, name) for name in shapes})


def _parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    parsed = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(parsed, torch.dtype) or not parsed.is_floating_point:
        raise ValueError(f"dtype is {dtype!r}: give a floating point type of torch, such as bfloat16 or float32")
    return parsed


def _load_tokenizer(given: str | Path | None, recorded: str | None) -> Any:
    """Load the tokenizer to export. Warn and return None if there is none."""
    name = given or recorded
    folder = Path(name or "")
    holds_none = folder.is_dir() and not any(any(folder.glob(files)) for files in _TOKENIZER_FILES)
    if name is None or (given is None and holds_none):
        warnings.warn(
            f"{'the checkpoint names no tokenizer' if name is None else f'{name} holds no tokenizer'}, so none is "
            "exported: give one with --tokenizer",
            stacklevel=3,
        )
        return None
    require_regular_files(folder)
    if not folder.exists():
        go_offline_without_hub()
    try:
        return transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"the tokenizer {str(name)!r} {'' if given else 'that was used in training '}can't be loaded "
            f"({first_line(error)}): give the name or path of one with --tokenizer"
        ) from error


# The model card


def _write_card(
    folder: Path, checkpoint: TrainerCheckpoint, reports: Sequence[TensorReport], adapters: Sequence[str]
) -> None:
    """Write how a model was made and measured, from its checkpoint; `adapters` names the folders beside it."""
    note = checkpoint.require_note()
    state = pruning_state(checkpoint.content)
    assert state is not None, "it has masks"
    base = note["config"].get("_name_or_path") or note["tokenizer"]
    if base and PurePath(base).is_absolute():  # the card is published, and where a user keeps files is not
        base = PurePath(base).name
    source = f" from {base}" if base else ""
    zeros, numel = sum(report.zeros for report in reports), sum(report.numel for report in reports)
    patterns = ", ".join(sorted({report.pattern for report in reports}))
    what = f"{len(reports)} weights were pruned to the pattern {patterns}"
    if shapes := smaller_shapes(reports):
        what += f", and what was zero as a whole was taken out: {shapes}"
    if zeros:
        what += f". {zeros / numel:.2%} of their entries are zero"
    beside = [
        f"LoRA adapters lie beside it ({', '.join(adapters)}). They add nothing where a weight is 0: after "
        "loading one with peft, call thanos_lightning.mask_adapters(model).",
        "",
    ]
    lines = [
        "---",
        "library_name: transformers",
        "tags: [pruned, thanos-lightning]",
        "---",
        "",
        f"# {note['architecture']}, pruned",
        "",
        f"Made{source} by thanos-lightning {importlib.metadata.version('thanos-lightning')}, in a training of "
        f"{state['optimizer_steps']} optimizer steps: {what}. It loads as any model of transformers does.",
        "",
        *(beside if adapters else []),
        *_measured(PruningReport.from_state(state["report"])),
        "The options of ThanosPruningCallback were:",
        "",
        *(f"    {name} = {value}" for name, value in state["arguments"].items() if value != "None"),
        "",
    ]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")


def _measured(report: PruningReport) -> list[str]:
    summary = report.summary
    if summary.metric is None:
        return []
    label, last = "at the end of the training", summary.recovered
    if last is None and report.history.metrics:  # the checkpoint was saved before the end
        step, value = report.history.metrics[-1]
        if not report.events or step > report.events[-1].step:  # later than what is told of the event
            label, last = f"after {step} optimizer steps", value
    rows = (("before pruning", summary.dense), ("right after the last event", summary.pruned), (label, last))
    table = [f"| {label} | {value:.4g} |" for label, value in rows if value is not None]
    return [f"| {summary.metric} | |", "|---|---|", *table, ""] if table else []
