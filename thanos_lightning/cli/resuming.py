"""A checkpoint to go on from, held against the configuration before the training starts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from thanos_lightning.checkpoints.format import TrainerCheckpoint
from thanos_lightning.cli.mistakes import Mistake

_SPECIAL = ("best", "last", "hpc")  # names that the Trainer resolves


def content_of(ckpt_path: str) -> Mapping[str, Any]:
    """What a checkpoint keeps beside its tensors; nothing where it can't be known here.

    Args:
        ckpt_path: As the Trainer's.

    Raises:
        Mistake: If it's missing, or no checkpoint.
        ValueError: If it's damaged, or holds what is not a plain value.
    """
    path = Path(ckpt_path)
    if ckpt_path in _SPECIAL or "://" in ckpt_path or (path / ".metadata").is_file():  # FSDP2's folder
        return {}
    if not path.exists():
        raise Mistake(f"--ckpt_path {ckpt_path} does not exist (in {Path.cwd()}): give a .ckpt that the Trainer wrote")
    if path.is_dir() and not (path / "checkpoint").is_dir():
        inside = sorted(path.rglob("*.ckpt"))
        mend = f"give what is in it, such as {inside[0]}" if inside else "give a .ckpt that the Trainer wrote"
        raise Mistake(f"--ckpt_path {ckpt_path} is a folder, and no checkpoint: {mend}")
    return TrainerCheckpoint.read(path).content


def differences(section: Mapping[str, Any] | None, kept: Mapping[str, Any] | None) -> Iterator[tuple[str, Any, Any]]:
    """What a configuration says otherwise than what a checkpoint was trained with.

    Args:
        section: `model` or `data` of a configuration, as plain values with class_path.
        kept: The hyperparameters in the checkpoint.

    Yields:
        Name, value now, value then.

    Examples:
        >>> list(differences({"class_path": "a.B", "init_args": {"rate": 2}}, {"_class_path": "a.B", "rate": 1}))
        [('rate', 2, 1)]
    """
    if not section or not kept:
        return
    now, then = {"class": section["class_path"], **_plain(section)}, {"class": kept.get("_class_path"), **kept}
    if then["class"] is None:  # written from Python
        del then["class"]
    for name in now:
        if name in then and _plain(now[name]) != _plain(then[name]):
            yield name, now[name], then[name]


def _plain(value: Any) -> Any:
    """The arguments alone, where a class is given with them, and lists for tuples."""
    if isinstance(value, Mapping):
        arguments = value["init_args"] if "class_path" in value and "init_args" in value else value
        return {key: _plain(inner) for key, inner in arguments.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value
