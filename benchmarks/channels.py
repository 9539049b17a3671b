"""What is left of a language model's perplexity after channels of its feed-forward blocks were taken out, by method.

    python benchmarks/channels.py --text pydocs --validation-split validation
    python benchmarks/channels.py --text pydocs --validation-split validation --sparsities 0.3 --contenders flap once
    python benchmarks/channels.py --text pydocs --validation-split validation --only-report --output results

(`python_documentation.py` makes that folder.) All blocks keep the same number of channels, a multiple of 64. Task,
text, training and held-back text are those of `recovery.py`, whose "dense" contender is read from its kept runs. A run
that has been finished is kept in --runs and not repeated.

"once" and "four events" are ThanosPruningCallback with `pattern: channels` and its defaults: before the first step on
the calibration sequences, and at 10, 20, 30 and 40 % of the training on its batches. All others choose channels of each
block before the first step, on the same sequences, take them out, and train the smaller model:

    random      any
    magnitude   the smallest L2 norm of all weights of a channel (a column of down, a row of gate and of up)
    activation  the smallest mean absolute input of down (Minitron, arXiv 2407.14679)
    wanda-sp    the smallest sum of |W_ij| ‖X_j‖ over a column of down (Wanda's score, arXiv 2306.11695, as FLAP's
                authors apply it to columns)
    flap        the smallest variance of the input of down times ‖W_:j‖²; a bias stands for the mean of what is taken
                out (FLAP, arXiv 2312.11983)
    structured  `pattern: structured` of this package's solver on down: Wanda's score, and the kept columns make up
"""

import argparse
import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import recovery
import torch
from lightning.pytorch import Callback, seed_everything
from machine import add_device, hardware, keep, multiply_bf16_in_fp32
from recovery import DENSE, Continued, Curve, Task, batches, prunable, quiet_trainer, validation_batches
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from thanos_lightning import CalibrationOptions, SparsitySchedule, ThanosPruningCallback
from thanos_lightning.checkpoints.shrink import shrink
from thanos_lightning.lm import CausalLM
from thanos_lightning.lm.pretrained import load_pretrained
from thanos_lightning.ranks.masks import LayerMask
from thanos_lightning.solver import Channels, Structured, prune

KEPT = Path(__file__).parent / "results"
MULTIPLE_OF = 64
ONE_SHOT = ("random", "magnitude", "activation", "wanda-sp", "flap", "structured")
OWN = {"once": (0,), "four events": (0.1, 0.2, 0.3, 0.4)}


def kept_channels(sparsity: float, width: int) -> int:
    """The nearest multiple."""
    return round((1 - sparsity) * width / MULTIPLE_OF) * MULTIPLE_OF


# Choosing


class Inputs:
    """Sums over tokens of the inputs of the down layers."""

    def __init__(self, model: LlamaForCausalLM, calibration: Iterable[Mapping[str, Tensor]], *, products: bool) -> None:
        self.tokens = 0
        self.sums: list[dict[str, Tensor]] = [{} for _ in model.model.layers]
        handles = [
            layer.mlp.down_proj.register_forward_pre_hook(self._hook(sums, products))
            for layer, sums in zip(model.model.layers, self.sums, strict=True)
        ]
        model.eval()
        with torch.no_grad():
            for batch in calibration:
                self.tokens += batch["input_ids"].numel()
                model(input_ids=batch["input_ids"], use_cache=False)
        for handle in handles:
            handle.remove()

    @staticmethod
    def _hook(sums: dict[str, Tensor], products: bool) -> Any:
        def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].flatten(0, -2).double()
            found = {"x": x.sum(0), "|x|": x.abs().sum(0), "x²": x.square().sum(0)}
            if products:
                found["xxᵀ"] = x.T @ x
            for name, value in found.items():
                sums[name] = sums.get(name, 0) + value

        return add


def scores(method: str, mlp: Any, sums: Mapping[str, Tensor], tokens: int, seed: int, layer: int) -> Tensor:
    """What a channel is worth to a method, (width,); the lowest go."""
    layers: tuple[nn.Linear, ...] = (mlp.down_proj, mlp.gate_proj, mlp.up_proj)
    down, gate, up = (one.weight.double() for one in layers)
    if method == "random":
        return torch.rand(down.shape[1], generator=torch.Generator().manual_seed(1000 * seed + layer))
    if method == "magnitude":
        return down.square().sum(0) + gate.square().sum(1) + up.square().sum(1)
    if method == "activation":
        return sums["|x|"]
    if method == "wanda-sp":
        return down.abs().sum(0) * sums["x²"].sqrt()
    assert method == "flap"
    variance = sums["x²"] / tokens - (sums["x"] / tokens).square()
    return variance * down.square().sum(0)


@torch.no_grad()
def without_channels(
    model: LlamaForCausalLM, method: str, sparsity: float, calibration: Iterable[Mapping[str, Tensor]], seed: int
) -> LlamaForCausalLM:
    """The model without the channels that a method chooses."""
    width = model.config.intermediate_size
    gone = width - kept_channels(sparsity, width)
    found = Inputs(model, calibration, products=method == "structured")
    masks: dict[str, LayerMask] = {}
    biases: dict[str, Tensor] = {}
    for number, (layer, sums) in enumerate(zip(model.model.layers, found.sums, strict=True)):
        mlp, name = layer.mlp, f"model.layers.{number}.mlp"
        keep = torch.ones(width, dtype=torch.bool)
        if method == "structured":
            hessian = (2 / found.tokens * sums["xxᵀ"]).float()
            pruned = prune(mlp.down_proj.weight, hessian, Structured(gone / width))
            keep = pruned.mask.any(0)
            mlp.down_proj.weight.copy_(pruned.weight)
        else:
            keep[scores(method, mlp, sums, found.tokens, seed, number).argsort()[:gone]] = False
        if method == "flap":
            mean = (sums["x"] / found.tokens).float()
            biases[f"{name}.down_proj.bias"] = mlp.down_proj.weight[:, ~keep] @ mean[~keep]
        pattern = Channels(gone / width)
        masks[f"{name}.down_proj.weight"] = LayerMask.of(keep.expand(len(mlp.down_proj.weight), -1), pattern)
        for owned in ("gate_proj", "up_proj"):
            rows = keep.unsqueeze(1).expand(-1, mlp.gate_proj.in_features)
            masks[f"{name}.{owned}.weight"] = LayerMask.of(rows, Channels(gone / width, dim=0))
    smaller, tensors = shrink(model, model.state_dict(), masks, Path("."))
    config = type(model.config)(**{**smaller.config.to_dict(), "mlp_bias": method == "flap"})
    made = LlamaForCausalLM(config)  # with the buffers that no file holds
    zeros = {name: torch.zeros_like(value) for name, value in made.state_dict().items() if name.endswith(".bias")}
    made.load_state_dict({**zeros, **biases, **tensors})
    return made


# Training


def train(
    task: Task, contender: str, sparsity: float, rate: float, seed: int, every: int, device: str
) -> dict[str, Any]:
    """One run."""
    model: Any = load_pretrained(task.model, "float32")
    dense_size = sum(parameter.numel() for parameter in model.parameters())
    calibration = batches(task, 1, task.calibration // task.batch)
    callbacks: list[Callback] = []
    pruning: ThanosPruningCallback | None = None
    begin = time.perf_counter()
    if contender in OWN:
        on = CalibrationOptions(batches=calibration) if contender == "once" else CalibrationOptions()
        schedule = SparsitySchedule(at=OWN[contender])
        pruning = ThanosPruningCallback("channels", sparsity, schedule, multiple_of=MULTIPLE_OF, calibration=on)
        callbacks.append(pruning)
    else:
        model = without_channels(model, contender, sparsity, calibration, seed)
    choosing = time.perf_counter() - begin
    model.set_attn_implementation("eager")  # of short sequences on CPUs: a tenth of a step less than by sdpa
    curve = Curve(task, every, validation_batches(task), prunable(model))
    callbacks.append(curve)
    seed_everything(seed, verbose=False)
    module = CausalLM(model, learning_rate=rate, warmup=task.warmup, lr_schedule="cosine")
    trainer = quiet_trainer(task, callbacks, Path("runs/channels"), device)
    begin = time.perf_counter()
    trainer.fit(module, Continued(batches(task, seed, task.steps), task.steps))
    seconds = time.perf_counter() - begin - curve.seconds
    size = sum(parameter.numel() for parameter in model.parameters())
    events = choosing
    if pruning is not None:
        summary = pruning.report.summary
        events = summary.event_seconds + summary.collecting_seconds
        size -= sum(int((~LayerMask.from_state(mask).keep).sum()) for mask in pruning.state_dict()["masks"].values())
    return {
        "curve": curve.points,
        "before": None if contender == "four events" else curve.points[0]["perplexity"],  # the training
        "perplexity": curve.points[-1]["perplexity"],
        "size": round(size / dense_size, 4),
        "seconds": round(seconds, 1),
        "event_seconds": round(events, 1),
    }


# Table


def key(contender: str, sparsity: float, rate: float, seed: int) -> str:
    """The name of a run's file."""
    return f"{contender.replace(' ', '_')}_{sparsity:g}_{rate:g}_{seed}"


def finished(runs: Path, task: Task, contender: str, sparsity: float, rate: float, seed: int) -> dict[str, Any] | None:
    """A run that is kept, None where there is none for this task."""
    if contender == DENSE:
        found = recovery.finished(KEPT / "recovery", task, DENSE, "2:4", rate, seed)
        before = None if found is None else found["curve"][0]["perplexity"]
        return found and {**found, "sparsity": 0.0, "before": before, "size": 1.0, "event_seconds": 0.0}
    path = runs / f"{key(contender, sparsity, rate, seed)}.json"
    if not path.exists():
        return None
    run: dict[str, Any] = json.loads(path.read_text())
    return run if run["task"] == task.described() else None


def main() -> None:
    """Train what is missing, print, and write where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    contenders = [DENSE, *ONE_SHOT, *OWN]
    parser.add_argument("--model", default="smollm2-135m", help="a Llama: hub name, local folder or smollm2-135m")
    parser.add_argument("--text", default="python-reference", help="as TextData takes it")
    parser.add_argument("--validation-split", help="of a data set; a tenth is held back where it is left out")
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.2, 0.3, 0.5], help="of channels")
    parser.add_argument("--contenders", nargs="+", choices=contenders, default=contenders)
    parser.add_argument("--rates", nargs="+", type=float, default=[3e-4, 6e-4], help="learning rates")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1], help="orders of the text")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=8, help="sequences of a step")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--calibration", type=int, default=256, help="sequences to choose channels on")
    parser.add_argument("--validation", type=int, default=160, help="sequences to validate on")
    parser.add_argument("--every", type=int, default=40, help="steps between points of a curve")
    parser.add_argument("--runs", type=Path, default=KEPT / "channels", help="kept runs")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--only-report", action="store_true", help="train nothing, show the runs that are kept")
    parser.add_argument("--output", type=Path, help="folder for a JSON file, named after the hardware")
    add_device(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.device == "cpu" and multiply_bf16_in_fp32():
        print("This CPU has no instructions for bf16: products of bf16 are computed in fp32, and rounded")
    names = ("model", "text", "validation_split", "steps", "batch", "length", "calibration", "validation")
    task = Task(**{name: getattr(arguments, name) for name in names})
    arguments.runs.mkdir(parents=True, exist_ok=True)
    table = Table(title=f"channels, {task.tokens:,} tokens of {Path(task.text).name}")
    for column in ("channels gone", "contender", "weights", "before", "perplexity", "learning rate", "s", "events, s"):
        table.add_column(column, justify="right")
    lines: list[dict[str, Any]] = []
    for sparsity in arguments.sparsities:
        for contender in arguments.contenders:
            tried: list[dict[str, Any]] = []
            for rate in arguments.rates:
                for seed in arguments.seeds:
                    found = finished(arguments.runs, task, contender, sparsity, rate, seed)
                    if found is None and not arguments.only_report and contender != DENSE:
                        print(f"{contender}, {sparsity:.0%}, learning rate {rate:g}, seed {seed}", flush=True)
                        result = train(task, contender, sparsity, rate, seed, arguments.every, arguments.device)
                        made = {"contender": contender, "sparsity": sparsity, "rate": rate, "seed": seed}
                        machine = hardware(arguments.device)
                        found = {"task": task.described(), **made, **result, "hardware": machine}
                        path = arguments.runs / f"{key(contender, sparsity, rate, seed)}.json"
                        path.write_text(json.dumps(found, indent=1) + "\n")
                    if found is not None:
                        tried.append(found)
            if not tried:
                continue
            best = min(tried, key=lambda run: run["perplexity"])
            by_rate = " ".join(f"{run['rate']:g}: {run['perplexity']:.2f}" for run in tried)
            table.add_row(
                f"{sparsity:.0%}",
                contender,
                f"{best['size']:.1%}",
                "" if best["before"] is None else f"{best['before']:.2f}",
                f"{best['perplexity']:.2f}",
                f"{best['rate']:g} of {by_rate}",
                f"{best['seconds']:.0f}",
                f"{best['event_seconds']:.0f}",
            )
            lines.append({name: best[name] for name in best if name != "task"})
    Console(width=160).print(table)
    if arguments.output is not None:
        document = {"task": task.described(), "results": lines}
        print(keep(f"channels {Path(task.model).name}", arguments.output, document, arguments.device))


if __name__ == "__main__":
    main()
