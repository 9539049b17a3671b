"""Time and reconstruction error on the layers of a real model, over methods and how much they do: a Pareto plot.

    python benchmarks/layers.py
    python benchmarks/layers.py --patterns 2:4 unstructured:0.7 --every 6 --output benchmarks/results
    python benchmarks/layers.py --model MODEL --text corpus.txt --methods sparsegpt thanos

All layers get the Hessian of the dense model's inputs. Each method's error, ½ tr(ΔW H ΔWᵀ), is divided by that of
SparseGPT on the same layer, and its time by SparseGPT's; shown are the geometric mean of the errors and the ratio of
the summed times. "sparsegpt" is this package's, "column loop" is SparseGPT as its paper prints it (see solver.py).
With --output a picture lies beside the results, which needs matplotlib.
"""

import argparse
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from machine import hardware, keep
from one_shot import find_layers, read_text
from rich.console import Console
from rich.progress import track
from rich.table import Table
from solver import column_loop
from torch import Tensor
from transformers import PreTrainedModel

from thanos_lightning.collect.inputs import InputStatistics
from thanos_lightning.layers.targets import Layer
from thanos_lightning.lm.pretrained import load_pretrained
from thanos_lightning.solver import Pattern, Structured, parse_pattern, prune

BALANCED = {"saliency": "balanced"}
# name -> what `prune` is called with
METHODS: dict[str, dict[str, Any]] = {
    "sparsegpt": {"method": "sparsegpt"},
    "column loop": {},
    "thanos (paper)": {},
    "thanos (paper), B=32": {"block_size": 32},
    "thanos (paper), refine 10": {"refine_steps": 10},
    "sparsegpt, refine 10": {"method": "sparsegpt", "refine_steps": 10},
    "obs": {"saliency": "obs"},
    "balanced": BALANCED,
    "balanced, refine 10": {**BALANCED, "refine_steps": 10},
    **{
        f"balanced, {steps} ADMM" + f", refine {refinement}" * (refinement > 0): {
            **BALANCED,
            "admm_steps": steps,
            "refine_steps": refinement,
        }
        for steps, refinement in ((4, 0), (4, 2), (8, 0), (8, 2), (16, 2), (32, 2))
    },
    "wanda, 16 ADMM, refine 2": {"method": "wanda", "admm_steps": 16, "refine_steps": 2},
    "sparsegpt, 8 ADMM, refine 2": {"method": "sparsegpt", "admm_steps": 8, "refine_steps": 2},
}


def collect(model: PreTrainedModel, layers: dict[str, Layer], sequences: Tensor) -> InputStatistics:
    """The second moments of the layers' inputs in the dense model."""
    statistics_ = InputStatistics(layers)
    statistics_.start()
    try:
        with torch.no_grad():
            for sequence in track(sequences.unsqueeze(1), description="calibrating"):
                with statistics_.counting():
                    model(input_ids=sequence, use_cache=False)
    finally:
        statistics_.stop()
    return statistics_


def solve(weight: Tensor, hessian: Tensor, pattern: Pattern, method: str) -> tuple[float, float]:
    """Seconds and error of one call."""
    started = time.perf_counter()
    if method == "column loop":
        pruned = column_loop(weight, hessian, pattern)
        seconds = time.perf_counter() - started
        change = pruned - weight
        return seconds, float(((change @ hessian) * change).sum()) / 2
    layer = prune(weight, hessian, pattern, **METHODS[method])
    seconds = time.perf_counter() - started
    assert int((~layer.mask).sum()) == pattern.num_pruned(*weight.shape)
    return seconds, layer.loss


def measure(
    layers: dict[str, Layer], hessians: dict[str, Tensor], pattern: Pattern, methods: Sequence[str], repeats: int
) -> list[dict[str, Any]]:
    """All methods on all layers."""
    seconds: dict[str, list[float]] = {method: [] for method in methods}
    errors: dict[str, list[float]] = {method: [] for method in methods}
    for name, layer in track(layers.items(), description=pattern.name):
        weight = layer.oriented(layer.parameter.detach()).float()
        for method in methods:
            runs = [solve(weight, hessians[name], pattern, method) for _ in range(repeats)]
            seconds[method].append(statistics.median(run[0] for run in runs))
            errors[method].append(runs[-1][1])
    results = []
    for method in methods:
        ratios = [own / other for own, other in zip(errors[method], errors["sparsegpt"], strict=True)]
        results.append(
            {
                "pattern": f"{pattern.name} {pattern.sparsity:g}",
                "method": method,
                "settings": METHODS[method],
                "error": round(math.exp(statistics.fmean(map(math.log, ratios))), 4),
                "worst_layer": round(max(ratios), 3),
                "seconds": round(sum(seconds[method]), 3),
                "time": round(sum(seconds[method]) / sum(seconds["sparsegpt"]), 3),
                "time_of_column_loop": round(sum(seconds[method]) / sum(seconds["column loop"]), 3)
                if "column loop" in seconds
                else None,
            }
        )
    return results


def draw(results: Sequence[dict[str, Any]], title: str, picture: Path) -> None:
    """Error over time, a panel for each pattern; no other method beats those on the line in both."""
    from matplotlib.figure import Figure

    patterns = list(dict.fromkeys(result["pattern"] for result in results))
    figure = Figure(figsize=(6.9, 4.2 * len(patterns)), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(len(patterns), squeeze=False).flatten()
    for panel, pattern in zip(panels, patterns, strict=True):
        own = [result for result in results if result["pattern"] == pattern]
        front = sorted(own, key=lambda result: result["time"])
        best, steps = math.inf, []
        for result in front:
            if result["error"] < best:
                best = result["error"]
                steps.append(result)
        panel.plot([one["time"] for one in steps], [one["error"] for one in steps], color="tab:gray", linewidth=1)
        panel.scatter([one["time"] for one in own], [one["error"] for one in own], s=18, color="silver")
        named = [one for one in own if one["method"] in ("sparsegpt", "thanos (paper)")]
        for one in steps:  # without those that gain next to nothing
            if one["error"] < 0.98 * min(other["error"] for other in named):
                named.append(one)
        panel.scatter([one["time"] for one in named], [one["error"] for one in named], s=24, color="#0072B2")
        longest = max(one["time"] for one in own)
        for one in named:
            is_right = one["time"] > 0.7 * longest
            beside = (8, -4) if one["time"] < 1.3 else (0 if is_right else 6, 6)
            panel.annotate(one["method"], (one["time"], one["error"]), xytext=beside, textcoords="offset points",
                           ha="right" if is_right else "left", fontsize=9)  # fmt: skip
        panel.set(title=pattern, xlabel="time / SparseGPT's", ylabel="error / SparseGPT's")
        panel.set_xlim(left=0)
    figure.savefig(picture, dpi=110)


def main() -> None:
    """Measure, print, and write where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="hub name or folder")
    parser.add_argument("--text", default="python-reference", help="as TextData takes it")
    parser.add_argument("--patterns", nargs="+", default=["unstructured:0.5", "2:4"], help="n:m, or name:sparsity")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--every", type=int, default=1, help="take every so many of the decoder layers")
    parser.add_argument("--sequences", type=int, default=64, help="to calibrate on")
    parser.add_argument("--length", type=int, default=512, help="tokens in a sequence")
    parser.add_argument("--repeats", type=int, default=3, help="median of so many runs")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--output", type=Path, help="folder for a JSON file that is named after the hardware")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    methods = list(dict.fromkeys(["sparsegpt", *arguments.methods]))
    patterns = []
    for text in arguments.patterns:
        name, _, sparsity = text.partition(":")
        patterns.append(parse_pattern(text) if name.isdecimal() else parse_pattern(name, float(sparsity or 0.5)))

    calibration, _ = read_text(
        arguments.text, arguments.model, length=arguments.length, sequences=arguments.sequences, validation_sequences=1
    )
    model = load_pretrained(arguments.model).eval()
    chosen = find_layers(model, patterns[0])[:: arguments.every]
    layers = {name: layer for own in chosen for name, layer in own.items()}
    accumulators = collect(model, layers, calibration).accumulators
    shared = {id(one): one.compute() for one in accumulators.values()}
    hessians = {name: shared[id(one)] for name, one in accumulators.items()}

    results: list[dict[str, Any]] = []
    for pattern in patterns:
        fitting = [one for one in methods if one != "column loop" or not isinstance(pattern, Structured)]
        measured = measure(layers, hessians, pattern, fitting, arguments.repeats)
        results += measured
        title = f"{measured[0]['pattern']}, {len(layers)} layers of {Path(arguments.model).name}, {hardware()}"
        columns = ("method", "error", "worst_layer", "seconds", "time", "time_of_column_loop")
        table = Table(*columns, title=title)
        for result in measured:
            table.add_row(*(str(result[column]) for column in columns))
        Console(width=140).print(table)
    if arguments.output is not None:
        about = {"model": Path(arguments.model).name, "layers": len(layers), "tokens": calibration.numel()}
        written = keep(
            f"{len(layers)} layers of {Path(arguments.model).name}", arguments.output, {**about, "results": results}
        )
        draw(results, f"{about['layers']} layers of {about['model']}, {hardware()['cpu']}", written.with_suffix(".png"))
        print(written)


if __name__ == "__main__":
    main()
