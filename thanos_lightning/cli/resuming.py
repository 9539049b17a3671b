"""Compares a checkpoint with the configuration before a training resumes from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from thanos_lightning.checkpoints.folders import bring_back
from thanos_lightning.checkpoints.format import read_content
from thanos_lightning.cli.mistakes import Mistake

_SPECIAL = ("best", "last", "hpc")  # names that the Trainer resolves


def content_of(ckpt_path: str) -> Mapping[str, Any]:
    """Read what Lightning and its callbacks saved in a checkpoint; empty if it cannot be read here.

    Raises a Mistake if the path is no checkpoint of a training, and what `read_content` raises.
    """
    path = Path(ckpt_path)
    if ckpt_path in _SPECIAL or "://" in ckpt_path:
        return {}
    bring_back(path)
    if (path / ".metadata").is_file():  # a folder of FSDP2
        return {}
    if path.is_dir() and not (path / "checkpoint").is_dir():
        inside = sorted(path.rglob("*.ckpt"))
        mend = f"give what is in it, such as {inside[0]}" if inside else "give a .ckpt that the Trainer wrote"
        raise Mistake(f"--ckpt_path {ckpt_path} is a folder, and no checkpoint: {mend}")
    content = read_content(path)
    if "pytorch-lightning_version" not in content:
        raise Mistake(
            f"--ckpt_path {ckpt_path} holds weights and nothing of a training: give a .ckpt that the Trainer wrote, or "
            "load the weights in a module of your own"
        )
    return content


def differences(section: Mapping[str, Any] | None, saved: Mapping[str, Any] | None) -> Iterator[tuple[str, Any, Any]]:
    """Yield the name, the configured value and the checkpoint's value of each argument in which the two differ.

    `section` is the section `model` or `data` of a configuration, as plain values with class_path. `saved` has the
    hyperparameters in the checkpoint.

    Examples:
        >>> list(differences({"class_path": "a.B", "init_args": {"rate": 2}}, {"_class_path": "a.B", "rate": 1}))
        [('rate', 2, 1)]
    """
    if not section or not saved:
        return
    now, then = {"class": section["class_path"], **_plain(section)}, {"class": saved.get("_class_path"), **saved}
    if then["class"] is None:  # a training from Python records none
        del then["class"]
    for name in now:
        if name in then and _plain(now[name]) != _plain(then[name]):
            yield name, now[name], then[name]


def _plain(value: Any) -> Any:
    """Strip classes from their arguments, and turn tuples into lists."""
    if isinstance(value, Mapping):
        arguments = value["init_args"] if "class_path" in value and "init_args" in value else value
        return {key: _plain(inner) for key, inner in arguments.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value
