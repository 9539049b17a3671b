"""The recipes and launch files that come with the package, by name."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

from thanos_lightning.cli.mistakes import did_you_mean


def recipes() -> dict[str, Path]:
    """Map each name that `fit --config` takes to its file."""
    return {file.stem: file for file in sorted(_folder("recipes").glob("*.yaml"))}


def launch_files() -> dict[str, Path]:
    """Map file names to the files that start a training on several machines."""
    return {file.name: file for file in sorted(_folder("launch").iterdir())}


def _folder(name: str) -> Path:
    """Find a folder inside the package (installed from a wheel) or beside it (in a clone)."""
    package = Path(__file__).parents[1]
    return package / name if (package / name).is_dir() else package.parent / name


def headline(file: Path) -> str:
    """Return the first sentence of the comment at the head of a file."""
    lines = (line for line in file.read_text(encoding="utf-8").splitlines() if not line.startswith("#!"))
    head = itertools.takewhile(lambda line: line.startswith("# "), lines)
    sentence, *_ = " ".join(line.removeprefix("# ") for line in head).split(". ")
    return sentence.rstrip(".:")


def find(name: str, among: Mapping[str, Path]) -> Path:
    """Return the file of a name. Raises ValueError if no file has it."""
    if name not in among:
        meant = did_you_mean(name, among)
        raise ValueError(f"{name!r} is no recipe or launch file: {meant}`thanos-lightning recipes` lists all")
    return among[name]
