"""Perplexity of a whole language model pruned in one shot, and the time it takes, by method.

    python benchmarks/one_shot.py
    python benchmarks/one_shot.py --pattern unstructured --sparsity 0.6 --methods wanda sparsegpt thanos
    python benchmarks/one_shot.py --model MODEL --text corpus.txt --length 2048 --output benchmarks/results

Nothing is trained. The decoder layers are pruned one after the other, as SparseGPT and Wanda do it: the calibration
sequences go through a decoder layer to make the Hessians of all its Linear layers, these are pruned, and the
sequences go through it again, so that the next decoder layer sees what the pruned ones put out. Embeddings, norms and
the head stay as they are. All methods get the same sequences, and the run fails where one sets another number of
weights to zero in any layer than the pattern asks for. "Other zeros" are weights that a method kept and that are zero,
from the dense model or since an input always was. Perplexity is that of text that is held back; its sequences that have
a passage in common with a calibration sequence are left out.

"thanos-paper" is Thanos as its paper has it, "thanos" is what this package recommends.
"""

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from machine import add_device, hardware, keep
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from transformers import PreTrainedModel

from thanos_lightning.collect.inputs import InputStatistics
from thanos_lightning.layers.targets import Layer, find_targets
from thanos_lightning.lm import TextData
from thanos_lightning.lm.pretrained import load_pretrained
from thanos_lightning.plan.options import assign_patterns
from thanos_lightning.report.stopwatch import finish
from thanos_lightning.solver import HessianAccumulator, Pattern, parse_pattern, prune
from thanos_lightning.solver.layer import SolverOptions

RECOMMENDED: dict[str, Any] = {"method": "thanos", "saliency": "balanced", "admm_steps": 8, "refine_steps": 2}
# name -> what `prune` is called with
METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"method": "magnitude"},
    "wanda": {"method": "wanda"},
    "sparsegpt": {"method": "sparsegpt", "block_size": 128},
    "thanos-paper": {"method": "thanos", "block_size": 128, "refine_steps": 0},
    "thanos": RECOMMENDED,
}

# forward with Hessians, solver, forward of the pruned layer
STAGES = ("calibrating", "solving", "propagating")

# A validation sequence with so many tokens in a row from the calibration text is not held back: documents quote one
# another, and some occur twice.
PASSAGE = 32


@dataclass(frozen=True)
class DecoderLayer:
    """A decoder layer, its layers to prune, and what the model calls it with besides the hidden states."""

    module: nn.Module
    targets: dict[str, Layer]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, hidden: Tensor) -> Tensor:
        """Hidden states (1, length, hidden_size) -> the next ones."""
        return _hidden_states(self.module(hidden, *self.args, **self.kwargs))


@dataclass
class Outcome:
    """What a method did to the model, and its seconds in each stage."""

    pruned: int = 0
    other_zeros: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))

    @contextmanager
    def timing(self, stage: str, device: torch.device) -> Iterator[None]:
        """Count to a stage what a block takes the device."""
        finish(device)
        begin = time.perf_counter()
        yield
        finish(device)
        self.seconds[stage] += time.perf_counter() - begin


class _EmbeddedError(Exception):
    """Ends a forward whose rest nobody needs."""


def _hidden_states(output: Any) -> Tensor:
    states: Tensor = output if isinstance(output, Tensor) else output[0]
    return states


# Text


def read_text(
    text: str,
    model: str,
    *,
    length: int,
    sequences: int,
    validation_sequences: int,
    dataset_config: str | None = None,
    validation_split: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Calibration and validation tokens, each int64 of shape (sequences, length), with no passage in common.

    Args:
        text: As `TextData` takes it.
        model: Whose tokenizer to use.
        length: Tokens in a sequence.
        sequences: To calibrate on.
        validation_sequences: To validate on.
        dataset_config: Of a hub data set.
        validation_split: Of a hub data set; None holds back a tenth of the documents.

    Raises:
        ValueError: If the text is too short, or `TextData` can't read it.
    """
    try:
        data = TextData(
            text,
            model,
            block_size=length,
            batch_size=1,
            calibration_tokens=sequences * length,
            dataset_config=dataset_config,
            validation_split=validation_split,
        )
        data.setup("fit")
    except ValueError as error:
        raise ValueError(f"--text {text} with --length {length}: {error}") from error
    calibration = [batch["input_ids"] for batch in data.calibration_dataloader()]
    if len(calibration) < sequences:
        raise ValueError(
            f"--sequences is {sequences}, but --text {text} has {len(calibration)} of {length} tokens to calibrate on: "
            "give fewer, a smaller --length, or more text"
        )
    known = {passage for sequence in calibration for passage in _passages(sequence)}
    validation: list[Tensor] = []
    num_known = 0
    for batch in data.val_dataloader():
        if len(validation) == validation_sequences:
            break
        if known.isdisjoint(_passages(batch["input_ids"])):
            validation.append(batch["input_ids"])
        else:
            num_known += 1
    if len(validation) < validation_sequences:
        raise ValueError(
            f"--validation-sequences is {validation_sequences}, but --text {text} has {len(validation)} of {length} "
            f"tokens to validate on, besides {num_known} with a passage of the calibration text: give fewer, a smaller "
            "--length, or more text"
        )
    return torch.cat(calibration), torch.cat(validation)


def _passages(sequence: Tensor) -> Iterator[tuple[int, ...]]:
    tokens = sequence.flatten().tolist()
    size = min(PASSAGE, len(tokens))
    return (tuple(tokens[start : start + size]) for start in range(len(tokens) - size + 1))


# Model


def find_decoder(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The list of decoder layers and its name.

    Raises:
        ValueError: If the model has no such list, or several.
    """
    count = model.config.get_text_config().num_hidden_layers
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    found = [name for name, module in lists.items() if len(module) == count]
    if len(found) != 1:
        described = ", ".join(f"{name} ({len(module)})" for name, module in lists.items()) or "none"
        raise ValueError(
            f"{type(model).__name__} has {len(found)} ModuleLists of num_hidden_layers={count} modules, which does not "
            f"show its decoder layers (all ModuleLists: {described}): take one with one, such as a Llama, Qwen, OPT "
            "or GPT-2"
        )
    return found[0], lists[found[0]]


def find_layers(model: PreTrainedModel, pattern: Pattern) -> list[dict[str, Layer]]:
    """The layers to prune of each decoder layer, by name.

    Raises:
        ValueError: If the pattern doesn't fit one, or if a decoder layer has a matrix that would stay dense.
    """
    name, decoder = find_decoder(model)
    targets = find_targets(model, targets=[f"{name}.*"], ignore=())
    assign_patterns(targets, pattern)
    by_layer = []
    for index, module in enumerate(decoder):
        prefix = f"{name}.{index}."
        own = {target: layer for target, layer in targets.items() if target.startswith(prefix)}
        parameters = {id(layer.parameter) for layer in own.values()}
        for parameter_name, parameter in module.named_parameters():
            if parameter.ndim > 1 and id(parameter) not in parameters:
                raise ValueError(
                    f"{prefix}{parameter_name} of shape {tuple(parameter.shape)} is not the weight of a Linear or "
                    "Conv1D of this decoder layer alone, and would stay dense: take a model without such a layer"
                )
        by_layer.append(own)
    return by_layer


def embed(model: PreTrainedModel, decoder: nn.ModuleList, sequences: Tensor) -> list[Tensor]:
    """What the first decoder layer gets of each sequence: (1, length, hidden_size)."""
    embedded: list[Tensor] = []

    def stop(module: nn.Module, args: tuple[Any, ...]) -> None:
        embedded.append(args[0])
        raise _EmbeddedError

    handle = decoder[0].register_forward_pre_hook(stop)
    try:
        for sequence in sequences.unsqueeze(1):
            try:
                model(input_ids=sequence, use_cache=False)
            except _EmbeddedError:
                continue
    finally:
        handle.remove()
    return embedded


def capture(model: PreTrainedModel, sequences: Tensor, pattern: Pattern) -> tuple[list[DecoderLayer], list[Tensor]]:
    """The decoder layers with the arguments that the model gives each, and the embedded sequences.

    The arguments are those of the first sequence: masks and positions depend on the length only, which all have in
    common, and there is no padding.

    Raises:
        ValueError: If the decoder layers can't be run apart from the model, or not all of them be pruned.
    """
    targets = find_layers(model, pattern)
    _, decoder = find_decoder(model)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    outputs: list[Tensor] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not args:
            raise ValueError(
                f"{type(model).__name__} gives {type(module).__name__} its hidden states by keyword "
                f"({', '.join(kwargs)}): take a model that gives them first, such as a Llama, Qwen, OPT or GPT-2"
            )
        calls.append((args[1:], kwargs))

    handles = [module.register_forward_pre_hook(record, with_kwargs=True) for module in decoder]
    handles.append(decoder[-1].register_forward_hook(lambda module, args, output: outputs.append(output)))
    try:
        for sequence in (sequences[:1], sequences[-1:]):
            model(input_ids=sequence, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    layers = [
        DecoderLayer(module, own, *call)
        for module, own, call in zip(decoder, targets, calls[: len(decoder)], strict=True)
    ]
    embedded = embed(model, decoder, sequences)
    hidden = embedded[-1]
    for layer in layers:
        hidden = layer(hidden)
    expected = _hidden_states(outputs[-1])
    if not (hidden - expected).norm() <= 1e-3 * expected.norm():
        raise ValueError(
            f"the decoder layers of {type(model).__name__}, one after the other, do not give what the model gives: it "
            "does more between them, or gives them more than masks and positions. Take a model that does not, such as "
            "a Llama, Qwen, OPT or GPT-2"
        )
    return layers, embedded


def perplexity(model: PreTrainedModel, sequences: Tensor) -> float:
    """The exponential of the mean loss over all tokens but each sequence's first."""
    losses = [model(input_ids=sequence, labels=sequence, use_cache=False).loss for sequence in sequences.unsqueeze(1)]
    return float(torch.stack(losses).double().mean().exp())


# Pruning


def prune_model(
    name: str, layers: Sequence[DecoderLayer], embedded: Sequence[Tensor], pattern: Pattern, console: Console
) -> Outcome:
    """Prune all decoder layers in place by one of `METHODS`.

    Raises:
        RuntimeError: As `check_zeros`.
    """
    settings, outcome = METHODS[name], Outcome()
    needs_hessian = SolverOptions.as_published(**settings).needs_statistics
    hidden, device = list(embedded), embedded[0].device
    for index, layer in enumerate(track(layers, description=name, console=console)):
        accumulators: Mapping[str, HessianAccumulator] = {}
        if needs_hessian:
            with outcome.timing("calibrating", device):
                accumulators = calibrate(layer, hidden)
        with outcome.timing("solving", device):
            masks = {}
            for target, linear in layer.targets.items():
                hessian = accumulators[target].compute() if needs_hessian else None
                pruned = prune(linear.oriented(linear.parameter), hessian, pattern, **settings)
                linear.oriented(linear.parameter).copy_(pruned.weight)
                masks[target] = pruned.mask
        for target, linear in layer.targets.items():
            check_zeros(name, linear, masks[target], pattern)
            outcome.pruned += pattern.num_pruned(linear.rows, linear.cols)
            outcome.other_zeros += int(masks[target][linear.oriented(linear.parameter) == 0].sum())
        if needs_hessian and index + 1 < len(layers):
            with outcome.timing("propagating", device):
                hidden = [layer(states) for states in hidden]
    return outcome


def calibrate(layer: DecoderLayer, hidden: Sequence[Tensor]) -> Mapping[str, HessianAccumulator]:
    """The second moments of what the Linear layers get; those with the same inputs share them.

    Raises:
        ValueError: If a Linear layer gets nothing.
    """
    statistics = InputStatistics(layer.targets)
    statistics.start()
    try:
        for states in hidden:
            with statistics.counting():
                layer(states)
    finally:
        statistics.stop()
    unused = layer.targets.keys() - statistics.accumulators.keys()
    if unused:
        raise ValueError(
            f"layer {min(unused)} is not called with any of the {len(hidden)} calibration sequences, so it has no "
            "Hessian: give more --sequences, or take a model that uses all its layers"
        )
    return statistics.accumulators


def check_zeros(method: str, linear: Layer, mask: Tensor, pattern: Pattern) -> None:
    """Hold each method to what the pattern asks for, exactly, so that all have the same sparsity.

    Zeros are counted where the mask has them, not in the whole weight: dense weights can be zero, too, and a method
    that updates them keeps other zeros than one that doesn't.

    Raises:
        RuntimeError: If the weight has another number of zeros under the mask.
    """
    dropped = linear.oriented(linear.parameter)[~mask]
    zeros, expected = int((dropped == 0).sum()), pattern.num_pruned(linear.rows, linear.cols)
    if not len(dropped) == zeros == expected:
        raise RuntimeError(
            f"{method} prunes {len(dropped):,} weights of layer {linear.name}, {zeros:,} are zero, and {pattern} asks "
            f"for {expected:,}: perplexities at unequal sparsities can't be compared. Leave {method} out of --methods, "
            "and report it as an error of the solver"
        )


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    calibration: Tensor,
    validation: Tensor,
    pattern: Pattern,
    methods: Sequence[str],
    console: Console,
) -> list[dict[str, Any]]:
    """The dense model, and each method from the dense model on. The model is left as the last method leaves it."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and calibration.shape[1] > limit:
        raise ValueError(
            f"--length is {calibration.shape[1]}, but {type(model).__name__} takes {limit} tokens: give at most so many"
        )
    layers, embedded = capture(model, calibration, pattern)
    weights = {name: linear.parameter for layer in layers for name, linear in layer.targets.items()}
    dense = {name: weight.detach().clone() for name, weight in weights.items()}
    total = sum(weight.numel() for weight in dense.values())
    results: list[dict[str, Any]] = [{"method": "dense", "perplexity": round(perplexity(model, validation), 4)}]
    for method in methods:
        for name, weight in weights.items():
            weight.copy_(dense[name])
        outcome = prune_model(method, layers, embedded, pattern, console)
        results.append(
            {
                "method": method,
                "settings": METHODS[method],
                "perplexity": round(perplexity(model, validation), 4),
                "pruned": outcome.pruned,
                "other_zeros": outcome.other_zeros,
                "sparsity": outcome.pruned / total,
                "seconds": {stage: round(seconds, 3) for stage, seconds in outcome.seconds.items()},
            }
        )
    return results


# Command line


def _positive(value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise argparse.ArgumentTypeError(f"{value!r} is not a whole number above 0, such as 2")
    return int(value)


def _title(name: str) -> str:
    """A hub name as it is, of a path the last part: where it lies says nothing to others."""
    return Path(name).name if Path(name).exists() or Path(name).is_absolute() else name


def main() -> None:
    """Measure, print, and write where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="hub name, local folder or smollm2-135m")
    parser.add_argument("--text", default="python-reference", help="hub name, text file, glob, or python-reference")
    parser.add_argument("--dataset-config", help="configuration of a hub data set")
    parser.add_argument("--validation-split", help="of a hub data set; a tenth is held back where it is left out")
    parser.add_argument("--pattern", default="2:4", help="2:4 (any n:m), unstructured or structured")
    parser.add_argument("--sparsity", type=float, help="of a pattern that has none in its name; unstructured: 0.5")
    parser.add_argument("--sequences", type=_positive, default=64, help="sequences to calibrate on")
    parser.add_argument("--length", type=_positive, default=512, help="tokens of a sequence")
    parser.add_argument("--validation-sequences", type=_positive, default=16, help="sequences to validate on")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="methods, in this order")
    parser.add_argument("--dtype", default="float32", help="of weights and forward: float32, bfloat16 or float16")
    parser.add_argument("--threads", type=_positive, default=2, help="torch threads")
    parser.add_argument("--output", type=Path, help="folder for a JSON file that is named after the hardware")
    add_device(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    # not after all the work
    if arguments.output is not None and not arguments.output.is_dir():
        parser.error(f"--output {arguments.output} is not a folder: make it, or give another one")
    sparsity = 0.5 if arguments.sparsity is None and arguments.pattern == "unstructured" else arguments.sparsity
    pattern = parse_pattern(arguments.pattern, sparsity)

    model = load_pretrained(arguments.model, arguments.dtype).to(arguments.device)
    calibration, validation = read_text(
        arguments.text,
        arguments.model,
        length=arguments.length,
        sequences=arguments.sequences,
        validation_sequences=arguments.validation_sequences,
        dataset_config=arguments.dataset_config,
        validation_split=arguments.validation_split,
    )
    console = Console(width=120)
    sequences = (tokens.to(arguments.device) for tokens in (calibration, validation))
    results = measure(model, *sequences, pattern, arguments.methods, console)

    title = f"{_title(arguments.model)} {pattern.name} {pattern.sparsity:g}"
    text = f"{arguments.sequences}x{arguments.length} tokens of {_title(arguments.text)}, {arguments.dtype}"
    table = Table(title=f"{title}, {text}, {hardware(arguments.device)}")
    table.add_column("method")
    for column in ("perplexity", "pruned", "other zeros", "sparsity", *(f"{stage}, s" for stage in STAGES)):
        table.add_column(column, justify="right")
    for row in results:
        cells = []
        if row["method"] in METHODS:
            cells = [f"{row['pruned']:,}", f"{row['other_zeros']:,}", f"{row['sparsity']:.4%}"]
            cells += [f"{row['seconds'][stage]:.1f}" for stage in STAGES]
        table.add_row(row["method"], f"{row['perplexity']:.2f}", *cells)
    console.print(table)
    if arguments.output is not None:
        document = {
            "model": _title(arguments.model),
            "text": _title(arguments.text),
            "pattern": pattern.name,
            "sparsity": pattern.sparsity,
            "sequences": arguments.sequences,
            "length": arguments.length,
            "validation_sequences": arguments.validation_sequences,
            "dtype": arguments.dtype,
            "results": results,
        }
        print(keep(f"one shot {title}", arguments.output, document, arguments.device))


if __name__ == "__main__":
    main()
