"""Prints to the terminal: a table after each event, and a summary at the end of the training."""

from __future__ import annotations

import math
import re
import shlex
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import rich
from rich.box import SIMPLE_HEAD
from rich.table import Table

from thanos_lightning.report.data import EventReport, LayerReport, Part, PruningReport, mean_loss

_WIDTH = 80
_LOSS = "Loss: the squared change of a layer's outputs, as a share of their square."
_RARE = ("scanning", "reconstructing")  # parts that many events lack


def kinds_of(names: Iterable[str]) -> dict[str, str]:
    """Map each layer's name to the name of its kind, the shortest suffix from a word on that tells the kinds apart.

    Layers are of the same kind if their names differ only in the numbers of their blocks.

    Examples:
        >>> kinds_of(["h.0.attn.proj", "h.0.mlp.proj", "h.1.attn.proj", "h.1.mlp.up"])
        {'h.0.attn.proj': 'attn.proj', 'h.0.mlp.proj': 'mlp.proj', 'h.1.attn.proj': 'attn.proj', 'h.1.mlp.up': 'up'}
    """
    paths: dict[str, tuple[str, ...]] = {}
    for name in names:
        *blocks, last = name.split(".")
        paths[name] = (*("*" if part.isdecimal() else part for part in blocks), last)
    labels: dict[tuple[str, ...], str] = {}
    for path in set(paths.values()):
        lengths = range(1, len(path) + 1)
        others = [other for other in set(paths.values()) if other != path]
        length = next(
            (n for n in lengths if path[-n][0].isalpha() and all(other[-n:] != path[-n:] for other in others)),
            len(path),
        )
        labels[path] = ".".join(path[-length:])
    return {name: labels[path] for name, path in paths.items()}


def print_event(event: EventReport) -> None:
    """Print a table after an event. It has a row per kind of layer, because a model has hundreds of similar layers."""
    # Without padding, eight columns fit into the 80 characters of a plain terminal.
    table = Table(box=SIMPLE_HEAD, padding=0, pad_edge=False)
    table.add_column("layers", no_wrap=True, overflow="ellipsis")
    for column in ("n", "shape", "pattern", "zeros", "mean loss", "worst", "solving"):
        table.add_column(column, justify="right", no_wrap=True)
    names = kinds_of(layer.name for layer in event.layers)
    kinds: dict[tuple[str, tuple[int, int], str], list[LayerReport]] = {}
    for layer in event.layers:
        kinds.setdefault((names[layer.name], layer.shape, layer.pattern), []).append(layer)
    for (kind, shape, pattern), layers in kinds.items():
        losses = [layer.relative_loss for layer in layers if math.isfinite(layer.relative_loss)]
        table.add_row(
            kind,
            str(len(layers)),
            f"{shape[0]}×{shape[1]}",
            pattern,
            f"{sum(layer.sparsity for layer in layers) / len(layers):.2%}",
            f"{mean_loss(layers):.4f}",
            f"{max(losses, default=math.nan):.4f}",
            f"{sum(layer.seconds for layer in layers):.1f} s",
        )
    table.add_section()
    table.add_row(
        "all", str(len(event.layers)), "", "", f"{event.sparsity:.2%}", f"{event.relative_loss:.4f}", "",
        f"{sum(layer.seconds for layer in event.layers):.1f} s",
    )  # fmt: skip
    console = rich.get_console()
    console.print(f"Pruned at optimizer step {event.step}, where {event.target:.1%} was asked for", highlight=False)
    console.print(table, width=min(_WIDTH, console.width))
    console.print(_LOSS, highlight=False)
    if event.blocks:
        solved = sum(block.error_solved for block in event.blocks) / len(event.blocks)
        trained = sum(block.error for block in event.blocks) / len(event.blocks)
        before, after = alike([solved, trained], digits=2)
        text = f"{len(event.blocks)} blocks reconstructed: the mean loss of a block went from {before} to {after}"
        console.print(text, highlight=False)
    console.print(_filled(f"{event.seconds:.1f} s in all: {_listed(event.parts)}"), highlight=False)


def alike(values: Sequence[float], digits: int = 4) -> list[str]:
    """Format numbers with the same decimals: so many digits for the largest.

    Examples:
        >>> alike([24.79, 37.4, 20.177])
        ['24.79', '37.40', '20.18']
    """
    largest = max((abs(value) for value in values if math.isfinite(value) and value), default=1.0)
    decimals = max(0, digits - 1 - math.floor(math.log10(largest)))
    return [f"{value:.{decimals}f}" for value in values]


def _filled(text: str) -> str:
    """Wrap a text, but never between a number and its unit."""
    return textwrap.fill(re.sub(r"(?<=\d) (?=s\b)", "\xa0", text), _WIDTH).replace("\xa0", " ")


def _listed(parts: Mapping[Part, float]) -> str:
    return ", ".join(f"{part} {seconds:.1f} s" for part, seconds in parts.items() if seconds or part not in _RARE)


def print_summary(report: PruningReport) -> None:
    """Print the sparsity of all layers to prune, the metric (dense, pruned and recovered) and the time of pruning."""
    summary, console = report.summary, rich.get_console()
    events = f"{len(report.events)} event{'s' if len(report.events) != 1 else ''}"
    of_model = ""
    if summary.model_weights:
        of_model = f", {summary.sparsity_of_model:.1%} of the whole model's,"
    console.print(f"Pruned {summary.sparsity:.2%} of the layers' weights{of_model} in {events}", highlight=False)
    if summary.metric is not None:
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        table.add_column(summary.metric)
        table.add_column("value", justify="right")
        values = {
            "dense, before the first event": summary.dense,
            "pruned, after the last event": summary.pruned,
            "recovered, at the end": summary.recovered,
        }
        formatted = iter(alike([value for value in values.values() if value is not None]))
        for label, value in values.items():
            table.add_row(label, "not measured" if value is None else next(formatted))
        console.print(table)
    if summary.training_seconds:
        parts = {part: sum(event.parts[part] for event in report.events) for part in EventReport(0, 0.0).parts}
        pruning = summary.event_seconds + summary.collecting_seconds
        console.print(
            f"Pruning took {pruning / summary.training_seconds:.1%} of {summary.training_seconds:.1f} s of training, "
            f"{pruning:.1f} s:\n{_filled(_listed(parts))}",
            highlight=False,
        )


def print_outcome(checkpoint: Path | None, report: Path, *, export: Path | None) -> None:
    """Print the paths of the files that the training wrote, and the next command.

    `checkpoint` is None if none was saved, and `export` if the model is not one that can be exported.
    """
    lines = [f"  report      {_shown(report)}"] if report.is_file() else []
    if checkpoint is not None:
        lines.insert(0, f"  checkpoint  {_shown(checkpoint)}")
        if export is not None:
            lines.append(f"  next        thanos-lightning export {shlex.quote(_shown(checkpoint))} {export}")
    for line in lines:  # never wrapped, because users copy them
        rich.get_console().print(line, markup=False, highlight=False, soft_wrap=True)


def _shown(path: Path) -> str:
    """Return the path relative to the working directory if it is inside."""
    here = Path.cwd()
    return str(path.resolve().relative_to(here)) if path.resolve().is_relative_to(here) else str(path)
