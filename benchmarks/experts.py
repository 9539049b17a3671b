"""What an expert that few tokens have reached loses, pruned on these alone, and with what it borrows from the others.

    python benchmarks/experts.py
    python benchmarks/experts.py --pattern unstructured --sparsity 0.6 --output benchmarks/results

No small mixture of experts is to be had everywhere, so layers of a dense model stand in for one: the inputs of a layer
are split among experts by the nearest of their centres (k-means of directions, as a router chooses), and each expert
has the layer's weight. It is pruned on a few of its tokens, and its error is that on other tokens of its own, over that
of the expert pruned on all that it has. "to 4 x" fills up to four times as many tokens as inputs with the mean of all
experts, as the callback does; "all" takes the moments of all experts instead of its own; without a token "alone" is
pruning by magnitude.
"""

import argparse
import math
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from machine import hardware, keep
from one_shot import RECOMMENDED, read_text
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from thanos_lightning.layers.targets import find_targets
from thanos_lightning.lm.pretrained import load_pretrained
from thanos_lightning.solver import Pattern, parse_pattern, prune

FRACTIONS = (0.0, 1 / 16, 1 / 4, 1.0, 2.0, 3.0)  # tokens, over inputs
# filled up to so many times its inputs
WAYS = {"alone": 0.0, "to 2 x": 2.0, "to 4 x": 4.0, "to 8 x": 8.0, "all": math.inf}


def moments(inputs: Tensor) -> Tensor:
    """The sum of x xᵀ, float32."""
    return inputs.T @ inputs


def split(inputs: Tensor, experts: int) -> list[Tensor]:
    """The inputs (tokens, width) of each expert."""
    directions = torch.nn.functional.normalize(inputs, dim=1)
    generator = torch.Generator().manual_seed(0)
    centres = directions[torch.randperm(len(inputs), generator=generator)[:experts]]
    for _ in range(20):
        nearest = (directions @ centres.T).argmax(1)
        means = [directions[nearest == expert].mean(0) for expert in range(experts)]
        centres = torch.nn.functional.normalize(torch.stack(means), dim=1)
    return [inputs[nearest == expert] for expert in range(experts)]


def error(weight: Tensor, total: Tensor, count: float, held_out: Tensor, pattern: Pattern) -> float:
    """The error on tokens that are held out, of a weight pruned on the mean of others."""
    pruned = prune(weight, 2 * total / count, pattern, **RECOMMENDED)
    return float((held_out @ (pruned.weight - weight).T).square().sum())


def measure(weight: Tensor, inputs: Tensor, experts: int, pattern: Pattern) -> list[dict[str, Any]]:
    """The errors of all experts of one layer."""
    results = []
    halves = [own.split(-(-len(own) // 2)) for own in split(inputs, experts)]
    whole, number = moments(torch.cat([seen for seen, _ in halves])), sum(len(seen) for seen, _ in halves)
    for seen, held_out in halves:
        if len(seen) < 2 * weight.shape[1]:
            continue
        best = error(weight, moments(seen), len(seen), held_out, pattern)
        for fraction in FRACTIONS:
            own = seen[: round(fraction * weight.shape[1])]
            for way, times in WAYS.items():
                if fraction == 0 and way == "alone":  # by magnitude, since nothing else is known
                    change = prune(weight, None, pattern, method="magnitude").weight - weight
                    found = float((held_out @ change.T).square().sum())
                elif math.isinf(times):
                    found = error(weight, whole, number, held_out, pattern)
                else:
                    lacks = max(0.0, times * weight.shape[1] - len(own))
                    total = moments(own) + lacks * whole / number
                    found = error(weight, total, len(own) + lacks, held_out, pattern)
                results.append({"fraction": fraction, "way": way, "ratio": found / best})
    return results


def note(inputs: list[Tensor], module: nn.Module, args: tuple[Tensor]) -> None:
    """Keep what a layer gets."""
    inputs.append(args[0].float().flatten(0, 1))


def main() -> None:
    """Measure, print, and write where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="hub name or folder")
    parser.add_argument("--text", default="python-reference", help="as TextData takes it")
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--sparsity", type=float)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--layers", nargs="+", default=["*.5.mlp.up_proj", "*.15.mlp.up_proj", "*.25.mlp.up_proj"])
    parser.add_argument("--sequences", type=int, default=72, help="of 512 tokens")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--output", type=Path, help="folder for a JSON file that is named after the hardware")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pattern = parse_pattern(arguments.pattern, arguments.sparsity)
    text, _ = read_text(
        arguments.text, arguments.model, length=512, sequences=arguments.sequences, validation_sequences=1
    )
    model = load_pretrained(arguments.model).eval()
    layers = find_targets(model, arguments.layers)
    inputs: dict[str, list[Tensor]] = {name: [] for name in layers}
    for name, layer in layers.items():
        layer.modules[0].register_forward_pre_hook(partial(note, inputs[name]))
    with torch.no_grad():
        for sequence in track(text, description="inputs"):
            model(input_ids=sequence.unsqueeze(0))
    measured = []
    for name, layer in track(layers.items(), description=pattern.name):
        weight = layer.parameter.detach().float()
        measured += measure(weight, torch.cat(inputs[name]), arguments.experts, pattern)
    results = [
        {
            "tokens_over_inputs": fraction,
            **{
                way: round(math.exp(statistics.fmean(math.log(one["ratio"]) for one in found)), 3)
                for way in WAYS
                if (found := [one for one in measured if (one["fraction"], one["way"]) == (fraction, way)])
            },
        }
        for fraction in FRACTIONS
    ]
    number = len(measured) // len(FRACTIONS) // len(WAYS)
    table = Table("tokens / inputs", *WAYS, title=f"{pattern.name}, {number} experts, error / that with all its tokens")
    for result in results:
        table.add_row(*(f"{value:g}" for value in result.values()))
    Console().print(table)
    if arguments.output is not None:
        about = {"model": Path(arguments.model).name, "pattern": pattern.name, "sparsity": pattern.sparsity}
        about |= {"experts": number, "tokens": text.numel(), "hardware": hardware()}
        print(keep(f"experts {pattern.name}".replace(":", "of"), arguments.output, {**about, "results": results}))


if __name__ == "__main__":
    main()
