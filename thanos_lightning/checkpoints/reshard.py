"""Converts a DeepSpeed checkpoint folder into one from which any number of ranks can resume."""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from thanos_lightning.checkpoints.deepspeed_files import (
    files_of,
    is_universal,
    is_zero_folder,
    load_contents,
    load_file,
    model_files,
    read_facts,
    require_end,
    require_masters,
    require_one_save,
    stage_of,
    trusting,
)
from thanos_lightning.checkpoints.folders import require_free, whole_folder
from thanos_lightning.checkpoints.foreign import inside
from thanos_lightning.checkpoints.format import pruning_state, require_format
from thanos_lightning.report.progress import open_phase


def reshard_checkpoint(
    checkpoint: str | Path, output: str | Path | None = None, *, processes: int = 1, trusted: bool = False
) -> Path:
    """Convert a checkpoint of ZeRO 1, 2 or 3 into a folder from which any number of ranks resumes, and return its path.

    DeepSpeed converts it to its universal format, which has one file per parameter for the fp32 master and each moment.
    Masks and schedule are kept, and so are the sums of all ranks if a window was being collected.

    Args:
        checkpoint: The folder that a Trainer with DeepSpeed's strategy wrote.
        output: Folder to write; it must be empty or not exist. By default the checkpoint's name with `-resharded`.
        processes: How many processes convert at a time. Each holds one rank's part in memory.
        trusted: Whether to read files with objects other than plain values and DeepSpeed's own, which may run any code.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If the output is taken, or if the checkpoint cannot be resharded or does not need it.
        ImportError: If deepspeed is not installed.
    """
    path = Path(checkpoint).resolve()
    output = (path.with_name(f"{path.name}-resharded") if output is None else Path(output)).resolve()
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: give a checkpoint folder that DeepSpeed's strategy wrote")
    require_free(output)
    require_end(path)
    if not is_zero_folder(path):
        raise ValueError(
            f"{path} is no checkpoint folder of DeepSpeed's: other checkpoints resume on any number of ranks as they "
            "are"
        )
    with trusting(trusted):
        contents = load_contents(path)
        _check(path, contents[0], processes)
        states = [state for content in contents if (state := pruning_state(content)) is not None]
        for state in states:
            require_format(state, path)
        files = files_of(path)
        require_one_save(path, read_facts(path, files))
        with open_phase("Checking names", len(files), "files") as phase:
            for file in files:
                _require_names(file)
                phase.advance(note=file.name)
        with whole_folder(output) as folder:
            with open_phase(f"Converting {path.name}", adopts_bars=True):
                _convert(path / "checkpoint", folder / "checkpoint", processes)
            (folder / "latest_universal").write_text("checkpoint")
            _join_ranks(states, folder, trusted)
    return output


def _check(path: Path, content: Mapping[str, Any], processes: int) -> None:
    if processes < 1:
        raise ValueError(f"processes is {processes}: give a number ≥ 1")
    if is_universal(path):
        raise ValueError(f"{path} is resharded already: resume from it on any number of ranks")
    require_masters(path)
    if stage_of(content) == 0:
        raise ValueError(f"{path} was written at ZeRO stage 0, where nothing is sharded: resume from it as it is")
    untrained = content.get("frozen_param_shapes")
    if stage_of(content) == 3 and untrained:
        raise ValueError(
            f"{path} has parameters that are not trained, such as {next(iter(untrained))}, which DeepSpeed's universal "
            "format leaves out at stage 3: resume on the number of ranks that wrote it"
        )


def _require_names(file: Path) -> None:
    """Raise ValueError if a parameter has a name that is no name of a folder, since DeepSpeed makes one of each."""
    content = load_file(file)
    state = content.get("optimizer_state_dict") or {}
    groups = [*(content.get("param_shapes") or []), *(state.get("param_slice_mappings") or [])]
    for name in (name for group in groups for name in group):
        inside(file.parent, name, file)


def _convert(source: Path, target: Path, processes: int) -> None:
    try:
        from deepspeed.checkpoint import ds_to_universal
    except ImportError as error:
        raise ImportError("resharding needs deepspeed: pip install deepspeed") from error
    arguments = argparse.Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=processes,
        num_merge_workers=processes,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    target.mkdir(parents=True)
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            ds_to_universal.main(arguments)
    except Exception as error:
        if isinstance(error, OSError) or "inline_container" in str(error):  # torch's writer of files
            raise ValueError(
                f"the resharded checkpoint can't be written ({error}): make room, or give a folder on another disk"
            ) from error
        raise ValueError(
            f"DeepSpeed could not convert {source} ({type(error).__name__}: {error}). Its universal format knows the "
            "moments of Adam (exp_avg, exp_avg_sq): with another optimizer, resume on the number of ranks that wrote it"
        ) from error


def _join_ranks(states: list[dict[str, Any]], folder: Path, trusted: bool) -> None:
    """Put the masks and statistics of all writing ranks into the one file that every resuming rank reads."""
    if len(states) < 2:  # there is no callback, or one file already has everything
        return
    target = model_files(folder)[0]
    content = dict(torch.load(target, map_location="cpu", weights_only=not trusted))
    joined = pruning_state(content)
    assert joined is not None, "it is a copy"
    joined["masks"] = {name: mask for state in states for name, mask in state["masks"].items()}
    if joined["collected"] is not None:
        joined["collected"] = [state["collected"][rank] for rank, state in enumerate(states)]
    torch.save(content, target)
