"""Draws a run as one picture. Only this file imports matplotlib."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thanos_lightning.report.data import LayerReport, PruningReport
from thanos_lightning.report.tables import kinds_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which colour-blind readers can tell apart. Further kinds differ by their markers.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P")  # one fewer than colours, so that all pairs of both come in turn
_GREY = "#6b6b6b"
_MOST_KINDS, _ALL = 14, "all layers"


def plot_report(report: PruningReport, path: Path) -> None:
    """Draw how the training went, how sparse each layer is, and what each layer lost.

    The suffix of `path` chooses the picture's format. Raises ValueError if the report has no event, and
    ModuleNotFoundError if matplotlib is not installed.
    """
    if not report.events:
        raise ValueError("the report has no event: nothing to plot")
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("plots need matplotlib: pip install 'thanos-lightning[plots]'") from error
    style = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 11,
             "axes.titlelocation": "left", "axes.titleweight": "bold", "axes.grid": False,
             "text.parse_math": False}  # fmt: skip
    with rc_context(style):
        figure = Figure(figsize=(12, 8.5), layout="constrained", dpi=120)
        last = {layer.name: layer for event in report.events for layer in event.layers}  # what the last event gave
        layers = list(last.values())
        figure.suptitle(_title(report, layers), x=0.01, ha="left", fontsize=13)
        halves: Any = figure.subfigures(2, 1, height_ratios=(1, 1.15))
        over_time, by_layer = halves
        _draw_history(report, over_time)
        groups = _by_kind(layers)
        sparsities = [layer.sparsity for layer in layers]
        differ = max(sparsities) - min(sparsities) > 0.005  # else a map would be of one colour
        *of_sparsity, losses = by_layer.subplots(1, 1 + differ, squeeze=False)[0]
        for axis in of_sparsity:
            _draw_sparsities(groups, axis)
        _draw_losses(groups, losses)
        for axis in (*of_sparsity, losses):
            axis.set_xlabel(f"{'layer' if _ALL in groups else 'block'}, front to back")
        figure.savefig(path)


def _title(report: PruningReport, layers: Sequence[LayerReport]) -> str:
    summary = report.summary
    patterns = ", ".join(sorted({layer.pattern for layer in layers}))
    title = f"{len(layers)} layer{'s' if len(layers) != 1 else ''} pruned ({patterns}): {summary.sparsity:.1%} zeros"
    if summary.model_weights:
        title += f", {summary.sparsity_of_model:.1%} of the whole model"
    if summary.metric is not None:
        values = [("dense", summary.dense), ("pruned", summary.pruned), ("recovered", summary.recovered)]
        told = ", ".join(f"{what} {value:.4g}" for what, value in values if value is not None)
        title += f"\n{summary.metric}: {told}" if told else ""
    return title


# The training


def _draw_history(report: PruningReport, figure: Any) -> None:
    history, metric = report.history, report.summary.metric
    panels = [(metric, history.metrics)] if history.metrics and metric else []
    if history.losses or not panels:
        panels.append(("training loss", history.losses))
    axes: Sequence[Axes] = figure.subplots(1, len(panels), sharex=True, squeeze=False)[0]
    last = max([step for _, points in panels for step, _ in points] + [event.step for event in report.events] + [1])
    for axis, (name, points), colour in zip(axes, panels, _COLOURS, strict=False):
        axis.set(xlabel="optimizer step", xlim=(-0.03 * last, 1.03 * last))
        axis.set_title(f"{name} over steps", pad=18)  # leaves room for the events' sparsities
        is_metric = name == metric
        if points:
            steps, values = zip(*points, strict=True)
            # between few measurements nobody knows the course
            look: dict[str, Any] = {
                "linestyle": "none" if is_metric and len(points) < 5 else "-",
                "markersize": 5 if is_metric else 3,
            }
            marker = "o" if is_metric or len(steps) < 40 else ""
            axis.plot(steps, values, color=colour, linewidth=1.6 if is_metric else 0.6, marker=marker, **look)
            if not is_metric:
                axis.plot(steps, _running_mean(values), color=colour, linewidth=2)
        if is_metric and report.summary.dense is not None:
            axis.axhline(report.summary.dense, color=_GREY, linewidth=1, linestyle=":", label="dense", zorder=0)
        _scale(axis, [value for _, value in points], widest=20, otherwise="no losses were recorded")
        if is_metric:
            _name_extremes(axis, points)
        _mark_events(report, axis)
    axes[0].legend(loc="best", frameon=False, fontsize=9)


def _running_mean(values: Sequence[float]) -> list[float]:
    """Return the mean of a tenth of all values, centred on each."""
    half = max(len(values) // 20, 1)
    around = [values[max(0, index - half) : index + half + 1] for index in range(len(values))]
    return [sum(some) / len(some) for some in around]


def _scale(axis: Axes, values: Sequence[float], *, widest: float, otherwise: str) -> None:
    """Use logarithms if values are further apart than `widest` times; say `otherwise` if there are none."""
    finite = [value for value in values if math.isfinite(value)]
    if not values:
        axis.text(0.5, 0.5, otherwise, transform=axis.transAxes, ha="center", color=_GREY)
        axis.set_yticks([])
    elif finite and min(finite) > 0 and max(finite) / min(finite) > widest:
        axis.set_yscale("log")
        # mathematical text is off
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:.2g}".replace("e-0", "e-"))
    axis.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axis.set_axisbelow(True)


def _name_extremes(axis: Axes, points: Sequence[tuple[int, float]]) -> None:
    """Write the first, the highest and the last value beside their points."""
    highest = max(range(len(points)), key=lambda index: points[index][1])
    for index in sorted({0, highest, len(points) - 1}):
        step, value = points[index]
        if math.isfinite(value):
            is_last = index == len(points) - 1 and index > 0
            axis.annotate(f"{value:.4g}", (step, value), xytext=(-6 if is_last else 6, 5), fontsize=9,
                          ha="right" if is_last else "left", textcoords="offset points")  # fmt: skip
    axis.margins(y=0.15)


def _mark_events(report: PruningReport, axis: Axes) -> None:
    for number, event in enumerate(report.events):
        axis.axvline(
            event.step, color=_GREY, linestyle=(0, (4, 3)), linewidth=1, zorder=0,
            label="pruning event, and the sparsity that it asks for" if not number else None,
        )  # fmt: skip
        if len(report.events) <= 8:
            axis.annotate(
                f"{event.target:.0%}", (event.step, 1), xycoords=("data", "axes fraction"), xytext=(0, 2),
                textcoords="offset points", ha="center", fontsize=8, color=_GREY,
            )  # fmt: skip


# The layers


def _depth(name: str) -> int:
    """Return the number of a layer's block, which is the first number in its name."""
    number = re.search(r"(?:^|\.)(\d+)(?=\.)", name)
    return int(number[1]) if number else 0


_Groups = dict[str, dict[int, list[LayerReport]]]  # kind -> number of the block -> layers


def _by_kind(layers: Sequence[LayerReport]) -> _Groups:
    """Group layers. If no two share a kind, or there are too many kinds, each is by its place a block of one kind."""
    kinds = kinds_of(layer.name for layer in layers)
    if len(set(kinds.values())) > min(_MOST_KINDS, len(layers) - 1):
        return {_ALL: {place: [layer] for place, layer in enumerate(layers)}}
    groups: _Groups = {}
    for layer in layers:
        groups.setdefault(kinds[layer.name], {}).setdefault(_depth(layer.name), []).append(layer)
    return groups


def _means(blocks: Mapping[int, Sequence[LayerReport]], what: str) -> dict[int, float]:
    return {
        depth: sum(getattr(layer, what) for layer in layers) / len(layers) for depth, layers in sorted(blocks.items())
    }


def _draw_sparsities(groups: _Groups, axis: Axes) -> None:
    rows = [_means(blocks, "sparsity") for blocks in groups.values()]
    depths = sorted({depth for row in rows for depth in row})
    cells = [[row.get(depth, math.nan) for depth in depths] for row in rows]
    image = axis.imshow(cells, aspect="auto", cmap="YlGnBu", vmin=0, vmax=1)
    axis.set_yticks(range(len(groups)), list(groups))
    some = range(0, len(depths), max(1, -(-len(depths) // 12)))
    axis.set_xticks(list(some), [str(depths[index]) for index in some])
    axis.set(title="sparsity by layer and kind")
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    if len(rows) * len(depths) <= 60:
        for row, column in itertools.product(range(len(rows)), range(len(depths))):
            value = cells[row][column]
            if math.isfinite(value):
                axis.text(column, row, f"{value:.0%}", ha="center", va="center", fontsize=8,
                          color="white" if value > 0.55 else "black")  # fmt: skip
    bar = axis.figure.colorbar(image, ax=axis, shrink=0.9, pad=0.02, format=lambda value, _: f"{value:.0%}")
    bar.outline.set_visible(False)


def _draw_losses(groups: _Groups, axis: Axes) -> None:
    looks = zip(itertools.cycle(_COLOURS), itertools.cycle(_MARKERS), strict=False)
    for (kind, blocks), (colour, marker) in zip(groups.items(), looks, strict=False):
        means = _means(blocks, "relative_loss")
        axis.plot(
            list(means), list(means.values()), color=colour, marker=marker, markersize=4, linewidth=1.2, label=kind
        )
    axis.set(title="what each layer lost", ylabel="relative loss")
    losses = [layer.relative_loss for blocks in groups.values() for layers in blocks.values() for layer in layers]
    known = [loss for loss in losses if math.isfinite(loss)]
    _scale(axis, known, widest=5, otherwise="this method measures no loss")
    axis.locator_params(axis="x", integer=True)
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=9)
