"""What is left of a language model's perplexity after it was pruned and trained on, by method and recipe.

    python benchmarks/recovery.py --text pydocs --validation-split validation
    python benchmarks/recovery.py --text pydocs --validation-split validation --contenders dense once
    python benchmarks/recovery.py --text pydocs --validation-split validation --only-report --output results

(`python_documentation.py` makes that folder; `wikipedia_summaries.py` makes one of more general text.) Each contender
trains on the same batches in the same order, with AdamW, warm-up and cosine, at each of the learning rates with the
first seed, then at its best one with the other seeds; a seed is an order of the text. A run that has been finished is
kept in --runs and not repeated, so that a long table can be made in pieces. Perplexity is that of text that is held
back, and sparsity is counted in the weights themselves.

"one-shot" contenders are pruned before the training by `one_shot.py`'s pass over the decoder layers, and keep those
zeros. "lightning" is Lightning's ModelPruning with magnitude on the schedule of the gradual ones, unstructured for any
pattern, since it has no other; "sr-ste" chooses 2:4 masks by magnitude anew in every forward (arXiv 2102.04010). All
others are ThanosPruningCallback in the training, with its defaults but for what is said.

On CPUs with glibc, huge pages that are not given back saved a fifth of the time of a step:
    export GLIBC_TUNABLES=glibc.malloc.hugetlb=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000
    export MALLOC_TOP_PAD_=500000000 THP_MEM_ALLOC_ENABLE=1
"""

import argparse
import itertools
import json
import math
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelPruning
from machine import add_device, hardware, keep, multiply_bf16_in_fp32
from one_shot import METHODS, capture, prune_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from thanos_lightning import CalibrationOptions, SolverOptions, SparsitySchedule, ThanosPruningCallback
from thanos_lightning.layers.targets import find_targets
from thanos_lightning.lm import CausalLM, Distillation, TextData
from thanos_lightning.lm.pretrained import load_pretrained
from thanos_lightning.plan.allocation import Allocation
from thanos_lightning.solver import Pattern, parse_pattern

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PATTERNS = {
    "2:4": parse_pattern("2:4"),
    "60%": parse_pattern("unstructured", 0.6),
    "70%": parse_pattern("unstructured", 0.7),
    "80%": parse_pattern("unstructured", 0.8),
}
DENSE, LIGHTNING, SR_STE = "dense", "lightning magnitude", "sr-ste"
ONE_SHOT = tuple(f"one-shot {name}" for name in ("magnitude", "wanda", "sparsegpt", "thanos-paper"))
_CALIBRATION_STEPS = 32  # as many tokens as the one-shot methods have, where there are so many steps before an event
TEACHER_RATE = 3e-4  # the middle one of --rates
LIGHTNING_END = 0.4  # of the training, when lightning's schedule ends


@dataclass(frozen=True)
class Recipe:
    """A training with ThanosPruningCallback.

    Attributes:
        schedule: When the callback prunes: fractions of the training, or 0 for before the first step.
        options: Other arguments of the callback, those in its groups by their own names; batches are so many of the
            first ones of the text, "first batches" as many as the one-shot methods calibrate on.
        distillation: Arguments of `Distillation`; None trains on the text alone. A teacher "fine-tuned" is the dense
            contender at the end of its training with `TEACHER_RATE` and the same seed.
        pruned: A method of `one_shot.py` that prunes the model before the training, in place of the callback.
        fine_tuned: Whether the dense contender at the end of its training, as above, is pruned and trained on: twice
            the tokens in all.
        blocks: Whether blocks are trained at the events, as is the callback's default on a calibration set.
        reordered: Whether channels get another order at an event before the first step, as is its default, too.
        training: Other arguments of `CausalLM`.
        norms_alone: Whether nothing but the norms is trained.
    """

    schedule: tuple[float, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    distillation: Mapping[str, Any] | None = None
    pruned: str | None = None
    fine_tuned: bool = False
    blocks: bool = False
    reordered: bool = False
    training: Mapping[str, Any] = field(default_factory=dict)
    norms_alone: bool = False


_BEFORE, _ONCE, _LATE = (0,), (0.1,), (0.3,)
_TWICE, _FOUR_TIMES = (0.1, 0.2), (0.1, 0.2, 0.3, 0.4)
_FIRST_BATCHES, _FINE_TUNED = "first batches", "fine-tuned"
_FIRST_STEP = {"batches": _FIRST_BATCHES}
_LORA = {"lora": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}}
_ALIKE = {"allocation": {"by": "uniform"}}
OWN: dict[str, Recipe] = {
    "gradual": Recipe(_TWICE),
    "gradual, on the first batches": Recipe(_TWICE, _FIRST_STEP),
    "first step": Recipe(_BEFORE, _FIRST_STEP),
    # each quarter of the layers on what the quarters before it have become
    "first step, in four windows": Recipe(_BEFORE, {**_FIRST_STEP, "memory_gib": 0.125}),
    "two stages, one-shot sparsegpt": Recipe(_BEFORE, pruned="sparsegpt", fine_tuned=True),
    "defaults": Recipe(_BEFORE, _FIRST_STEP, blocks=True, reordered=True),
    "defaults, four events": Recipe(_FOUR_TIMES, _FIRST_STEP, blocks=True, reordered=True),
    "defaults, lora": Recipe(_BEFORE, _FIRST_STEP, blocks=True, reordered=True, training=_LORA),
    "defaults, norms alone": Recipe(_BEFORE, _FIRST_STEP, blocks=True, reordered=True, norms_alone=True),
    "two stages, defaults": Recipe(_BEFORE, _FIRST_STEP, fine_tuned=True, blocks=True, reordered=True),
    "first step, blocks": Recipe(_BEFORE, _FIRST_STEP, blocks=True),
    "late, blocks": Recipe(_LATE, _FIRST_STEP, blocks=True),
    "once": Recipe(_ONCE),
    "once, on the first batches": Recipe(_ONCE, _FIRST_STEP),
    "gradual, four events": Recipe(_FOUR_TIMES),
    "gradual, four events, alike": Recipe(_FOUR_TIMES, _ALIKE),
    **{
        f"first step, a fifth of the rows dense{name}": Recipe(
            _BEFORE, {**_FIRST_STEP, "outlier_fraction": 0.2, "allocation": {"by": by}}
        )
        for name, by in {"": "uniform", ", allocated": "loss"}.items()
    },
    **{
        f"first step, {name}": Recipe(_BEFORE, _FIRST_STEP, training=training)
        for name, training in {
            "falling linearly": {"lr_schedule": "linear"},
            "without warm-up": {"warmup": 0},
            "decayed": {"weight_decay": 0.1},
        }.items()
    },
    "first step, taught by the start": Recipe(_BEFORE, _FIRST_STEP, {"teacher": "start"}),
    "once, taught by the start": Recipe(_ONCE, distillation={"teacher": "start"}),
    "once, taught by the fine-tuned": Recipe(_ONCE, distillation={"teacher": _FINE_TUNED}),
    **{
        f"first step, {amount} the calibration": Recipe(_BEFORE, {"batches": number})
        for amount, number in (("half", 16), ("four times", 128))
    },
    "first step, alike": Recipe(_BEFORE, {**_FIRST_STEP, **_ALIKE}),
    **{
        f"first step{name}, taught by the fine-tuned": Recipe(_BEFORE, _FIRST_STEP, {"teacher": _FINE_TUNED, **weights})
        for name, weights in {
            "": {},
            ", logits x 4": {"logits": 4.0},
            ", logits x 0.5": {"logits": 0.5},
            ", logits alone": {"cross_entropy": 0.0},
        }.items()
    },
}
ALL = {**{name: Recipe(_BEFORE, pruned=name.removeprefix("one-shot ")) for name in ONE_SHOT}, **OWN}
# what is in the table; the others, which differ from one of these in one thing or few, only where they are asked for
_BASELINES = (DENSE, *ONE_SHOT, LIGHTNING)
_PRUNED_IN_TRAINING = ("gradual", "first step", "defaults")
IN_TABLE = {
    "2:4": (*_BASELINES, SR_STE, *_PRUNED_IN_TRAINING),
    "60%": (*_BASELINES, *_PRUNED_IN_TRAINING),
    "70%": (),  # for comparisons that are asked for
    "80%": (),
}


@dataclass(frozen=True)
class Task:
    """What all contenders have in common."""

    model: str
    text: str
    validation_split: str | None
    steps: int
    batch: int
    length: int
    calibration: int
    validation: int
    warmup: float = 0.05

    @property
    def tokens(self) -> int:
        """Of a training."""
        return self.steps * self.batch * self.length

    def described(self) -> dict[str, Any]:
        """Plain values; of paths the last part, since where they lie changes nothing."""
        return {**asdict(self), "model": Path(self.model).name, "text": Path(self.text).name}


def contenders(pattern: str) -> list[str]:
    """The contenders for a pattern, baselines first."""
    return list(dict.fromkeys((*IN_TABLE[pattern], *OWN)))


# Text


def batches(task: Task, seed: int, number: int) -> list[dict[str, Tensor]]:
    """The first training batches, in the order of a seed."""
    return list(itertools.islice(_text(task, seed).train_dataloader(), number))


def validation_batches(task: Task) -> list[dict[str, Tensor]]:
    """Held back, the same for all."""
    return list(itertools.islice(_text(task, 0).val_dataloader(), task.validation // task.batch))


def _text(task: Task, seed: int) -> TextData:
    data = TextData(
        task.text,
        task.model,
        validation_split=task.validation_split,
        block_size=task.length,
        batch_size=task.batch,
        seed=seed,
    )
    data.setup("fit")
    return data


class Continued:
    """Batches that go on in the next epoch where the last one ended."""

    def __init__(self, batches: Iterable[Any], per_epoch: int) -> None:
        self._batches, self._per_epoch = iter(batches), per_epoch

    def __len__(self) -> int:
        return self._per_epoch

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(self._batches, self._per_epoch)


# Measuring


@torch.no_grad()
def perplexity(model: PreTrainedModel, held_back: Iterable[Mapping[str, Tensor]]) -> float:
    """The exponential of the mean loss, under bf16 autocast as in the training."""
    was_training = model.training
    model.eval()
    device = model.device
    with torch.autocast(device.type, torch.bfloat16):
        on_it = ({name: tensor.to(device) for name, tensor in batch.items()} for batch in held_back)
        losses = [model(**batch, use_cache=False).loss.double() for batch in on_it]
    model.train(was_training)
    return float(torch.stack(losses).mean().exp())


def prunable(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that all contenders prune, by name."""
    return {name: model.get_submodule(name) for name in find_targets(model, "*", "lm_head")}


class Curve(Callback):
    """Perplexity and sparsity over tokens."""

    def __init__(
        self, task: Task, every: int, held_back: list[dict[str, Tensor]], layers: dict[str, nn.Module]
    ) -> None:
        self.points: list[dict[str, float]] = []
        self.seconds = 0.0  # of measuring
        self._task, self._every, self._held_back, self._layers = task, every, held_back, layers
        self._steps = 0

    def measure(self, module: LightningModule) -> None:
        """Add a point."""
        begin = time.perf_counter()
        weights = [layer.weight for layer in self._layers.values()]
        zeros = sum(weight.numel() - int(weight.count_nonzero()) for weight in weights)
        point = {
            "tokens": self._steps * self._task.batch * self._task.length,
            "perplexity": round(perplexity(module.model, self._held_back), 4),
            "sparsity": round(zeros / sum(weight.numel() for weight in weights), 6),
        }
        self.points.append(point)
        print("   ", point, flush=True)
        self.seconds += time.perf_counter() - begin

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before anything was learnt."""
        self.measure(pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """At every so many steps, and at the last one."""
        self._steps += 1
        if self._steps % self._every == 0 or self._steps == self._task.steps:
            self.measure(pl_module)


# Contenders


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, decay: float) -> Tensor:
        a, b, c, d = weight.abs().unflatten(-1, (-1, 4)).unbind(-1)
        second = torch.maximum(
            torch.minimum(torch.maximum(a, b), torch.maximum(c, d)),
            torch.maximum(torch.minimum(a, b), torch.minimum(c, d)),
        )
        kept = (weight.abs().unflatten(-1, (-1, 4)) >= second.unsqueeze(-1)).flatten(-2)
        ctx.save_for_backward(weight, kept)
        ctx.decay = decay
        return weight * kept

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        weight, kept = ctx.saved_tensors
        return gradient + ctx.decay * weight.masked_fill(kept, 0), None


class SrSte(nn.Module):
    """2:4 by magnitude in every forward; the gradient goes to all weights, and what is masked shrinks."""

    def __init__(self, decay: float = 2e-4) -> None:  # as in the paper
        super().__init__()
        self.decay = decay

    def forward(self, weight: Tensor) -> Tensor:
        """The weight with two nonzeros in each four."""
        masked: Tensor = _StraightThrough.apply(weight, self.decay)
        return masked


def one_shot_folder(
    task: Task, pruned: Path, pattern: str, method: str, console: Console, fine_tuned: Path | None = None
) -> Path:
    """The model, or the one that was fine-tuned, pruned by a method, in a folder that is written at the first call."""
    read = [task.described()[name] for name in ("model", "text", "validation_split", "length", "calibration")]
    before = [] if fine_tuned is None else [(fine_tuned / "task.json").read_text()]
    described = json.dumps([*read, pattern, method, METHODS[method], *before], sort_keys=True)
    folder = pruned / f"{pattern.replace(':', '-')}-{method}{'' if fine_tuned is None else f'-of-{fine_tuned.name}'}"
    note = folder / "task.json"
    if note.exists() and note.read_text() == described:
        return folder
    model = load_pretrained(str(fine_tuned or task.model), "float32")
    sequences = torch.cat([batch["input_ids"] for batch in batches(task, 1, task.calibration // task.batch)])
    with torch.no_grad():
        layers, embedded = capture(model, sequences, PATTERNS[pattern])
        outcome = prune_model(method, layers, embedded, PATTERNS[pattern], console)
    model.save_pretrained(folder)
    (folder / "outcome.json").write_text(json.dumps(asdict(outcome)))
    note.write_text(described)
    return folder


def fine_tuned_folder(task: Task, pruned: Path, seed: int, device: str) -> Path:
    """The dense contender after its training, in a folder that is written at the first call."""
    described = json.dumps([task.described(), TEACHER_RATE, seed], sort_keys=True)
    folder = pruned / f"fine-tuned-{seed}"
    note = folder / "task.json"
    if not (note.exists() and note.read_text() == described):
        any_pattern = next(iter(PATTERNS))
        train(task, DENSE, any_pattern, TEACHER_RATE, seed, pruned, task.steps, folder, device)
        note.write_text(described)
    return folder


def lightning_pruning(model: nn.Module, final: float, epochs: int) -> ModelPruning:
    """Lightning's callback, on a cubic schedule that ends with `epochs`: it prunes a fraction of what is left."""

    def amount(epoch: int) -> float:
        before, now = (final * (1 - (1 - min(1.0, e / epochs)) ** 3) for e in (epoch, epoch + 1))
        return 1 - (1 - now) / (1 - before)

    parameters = [(layer, "weight") for layer in prunable(model).values()]
    return ModelPruning(
        "l1_unstructured",
        parameters_to_prune=parameters,
        use_global_unstructured=False,
        amount=amount,
        use_lottery_ticket_hypothesis=False,
    )


def quiet_trainer(task: Task, callbacks: list[Callback], root: Path, device: str) -> Trainer:
    """The Trainer of all contenders."""
    return Trainer(
        accelerator=device,
        devices=1,
        precision="bf16-mixed",
        max_steps=task.steps,
        max_epochs=-1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=root,
    )


def train(
    task: Task,
    contender: str,
    pattern: str,
    rate: float,
    seed: int,
    pruned: Path,
    every: int,
    save_to: Path | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """One run; the trained model is written to a folder if one is given."""
    console = Console(width=120)
    final: Pattern = PATTERNS[pattern]
    recipe = ALL.get(contender)
    source = task.model
    fine_tuned = None
    if recipe is not None and recipe.fine_tuned:
        fine_tuned = fine_tuned_folder(task, pruned, seed, device)
        source = str(fine_tuned)
    if recipe is not None and recipe.pruned is not None:
        source = str(one_shot_folder(task, pruned, pattern, recipe.pruned, console, fine_tuned))
    model = load_pretrained(source, "float32")
    model.set_attn_implementation("eager")  # of short sequences on CPUs: a tenth of a step less than by sdpa
    if recipe is not None and recipe.norms_alone:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("norm" in name)
    layers = prunable(model)
    callbacks: list[Callback] = []
    pruning: ThanosPruningCallback | None = None
    of_pattern: dict[str, Any] = {"pattern": pattern} if pattern == "2:4" else {
        "pattern": "unstructured", "sparsity": final.sparsity
    }  # fmt: skip
    if recipe is not None and recipe.pruned is not None:
        # of these weights magnitude chooses the zeros that are there
        once = SparsitySchedule(at=[0])
        pruning = ThanosPruningCallback(**of_pattern, schedule=once, solver=SolverOptions.as_published("magnitude"))
    elif recipe is not None:
        options = {"reorder": recipe.reordered, **recipe.options}
        if "batches" not in options:
            options = {"steps": _CALIBRATION_STEPS, **options}
        if "allocation" in options:
            options["allocation"] = Allocation(**options["allocation"])
        if (calibration := options.get("batches")) is not None:
            number = task.calibration // task.batch if calibration == _FIRST_BATCHES else calibration
            options["batches"] = batches(task, 1, number)
            if not recipe.blocks:
                options["block_steps"] = 0
        for group, kind in (("solver", SolverOptions), ("calibration", CalibrationOptions)):
            own = {one.name: options.pop(one.name) for one in fields(kind) if one.name in options}
            options[group] = kind(**own)
        pruning = ThanosPruningCallback(**of_pattern, schedule=SparsitySchedule(at=recipe.schedule), **options)
    per_epoch = task.steps
    if contender == LIGHTNING:
        per_epoch = task.steps // 20
        callbacks.append(lightning_pruning(model, final.sparsity, round(LIGHTNING_END * 20)))
    if contender == SR_STE:
        for layer in layers.values():
            parametrize.register_parametrization(layer, "weight", SrSte())
    if pruning is not None:
        callbacks.append(pruning)
    curve = Curve(task, every, validation_batches(task), layers)
    callbacks.append(curve)
    distillation = None
    if recipe is not None and recipe.distillation is not None:
        arguments = dict(recipe.distillation)
        if arguments["teacher"] == _FINE_TUNED:
            arguments["teacher"] = str(fine_tuned_folder(task, pruned, seed, device))
        distillation = Distillation(**arguments)
    seed_everything(seed, verbose=False)
    training = {"warmup": task.warmup, "lr_schedule": "cosine", **({} if recipe is None else recipe.training)}
    module = CausalLM(model, learning_rate=rate, distillation=distillation, **training)
    trainer = quiet_trainer(task, callbacks, pruned, device)
    begin = time.perf_counter()
    trainer.fit(module, Continued(batches(task, seed, task.steps), per_epoch))
    seconds = time.perf_counter() - begin - curve.seconds
    if save_to is not None:
        model.save_pretrained(save_to)
    event_seconds = 0.0
    if recipe is not None and recipe.pruned is not None:  # what the method took when the folder was made
        outcome = json.loads((Path(source) / "outcome.json").read_text())
        event_seconds = sum(outcome["seconds"].values())
        seconds += event_seconds
    elif pruning is not None:
        event_seconds = pruning.report.summary.event_seconds + pruning.report.summary.collecting_seconds
    return {
        "curve": curve.points,
        "perplexity": curve.points[-1]["perplexity"],
        "sparsity": curve.points[-1]["sparsity"],
        "seconds": round(seconds, 1),
        "event_seconds": round(event_seconds, 1),
    }


# Table


def key(contender: str, pattern: str, rate: float, seed: int) -> str:
    """The name of a run's file."""
    pattern = "any" if contender == DENSE else pattern
    return re.sub(r"[^A-Za-z0-9.%-]+", "_", f"{contender} {pattern} {rate:g} {seed}")


def finished(runs: Path, task: Task, contender: str, pattern: str, rate: float, seed: int) -> dict[str, Any] | None:
    """A run that is kept, None where there is none for this task."""
    path = runs / f"{key(contender, pattern, rate, seed)}.json"
    if not path.exists():
        return None
    run: dict[str, Any] = json.loads(path.read_text())
    same = run["task"] == task.described() and run["settings"] == settings(contender)
    return run if same else None


def settings(contender: str) -> Any:
    """What makes the contender, as JSON."""
    recipe = ALL.get(contender)
    if recipe is None:
        return None
    made = asdict(recipe)
    for name in ("fine_tuned", "blocks", "reordered", "training", "norms_alone"):
        if not made[name]:
            del made[name]  # which the oldest kept runs don't say
    solver = None if recipe.pruned is None else METHODS[recipe.pruned]
    return json.loads(json.dumps({**made, "solver": solver}))


@dataclass(frozen=True)
class Row:
    """A contender at its best learning rate: the runs of all seeds that are there."""

    contender: str
    tried: dict[float, float]  # learning rate -> perplexity, of the first seed
    runs: list[dict[str, Any]]

    @property
    def log_perplexity(self) -> float:
        """Mean over seeds."""
        return sum(math.log(run["perplexity"]) for run in self.runs) / len(self.runs)

    def gap(self, other: "Row", seeds: Iterable[int]) -> float:
        """By how much the log perplexity is larger, the mean over these seeds, of which both have runs."""
        own, others = ({run["seed"]: math.log(run["perplexity"]) for run in row.runs} for row in (self, other))
        gaps = [own[seed] - others[seed] for seed in seeds]
        return sum(gaps) / len(gaps)

    @property
    def seeds(self) -> set[int]:
        """Those that are there."""
        return {run["seed"] for run in self.runs}


def report(pattern: str, rows: list[Row], task: Task, console: Console) -> list[dict[str, Any]]:
    """Print a pattern's table; what is in it, for the file."""
    by_name = {row.contender: row for row in rows}
    dense = by_name.get(DENSE)
    reference = by_name.get("one-shot sparsegpt")
    table = Table(title=f"{pattern}, {task.tokens:,} tokens of {Path(task.text).name}")
    columns = ("perplexity", "seeds", "learning rate", "sparsity", "gap", "gap / SparseGPT's", "s", "events, s")
    table.add_column("contender")
    for column in columns:
        table.add_column(column, justify="right")
    lines = []
    for row in rows:
        best = row.runs[0]
        # no time is kept of a run that was interrupted, or whose machine had other work for a part of it, nor that of
        # the events of early ones
        timed = next((run for run in row.runs if run.get("event_seconds") is not None), best)
        seconds, events = timed["seconds"], timed.get("event_seconds")
        gap = None if dense is None else row.gap(dense, row.seeds & dense.seeds)
        relative = None
        if dense is not None and reference is not None:
            all_have = row.seeds & dense.seeds & reference.seeds
            relative = row.gap(dense, all_have) / reference.gap(dense, all_have)
        table.add_row(
            row.contender,
            f"{math.exp(row.log_perplexity):.2f}",
            " ".join(f"{run['perplexity']:.2f}" for run in row.runs),
            f"{best['rate']:g} of {' '.join(f'{rate:g}' for rate in row.tried)}",
            f"{best['sparsity']:.2%}",
            "" if gap is None else f"{gap:.3f}",
            "" if relative is None else f"{relative:.3f}",
            "" if seconds is None else f"{seconds:.0f}",
            "" if events is None else f"{events:.1f} ({events / seconds:.1%})",
        )
        lines.append(
            {
                "pattern": pattern,
                "contender": row.contender,
                "perplexity": round(math.exp(row.log_perplexity), 4),
                "gap": gap and round(gap, 4),
                "gap_over_sparsegpt": relative and round(relative, 4),
                "tried": row.tried,
                "runs": [{name: run.get(name) for name in _OF_A_RUN} for run in row.runs],
            }
        )
    console.print(table)
    return lines


_OF_A_RUN = ("seed", "rate", "settings", "perplexity", "sparsity", "seconds", "event_seconds", "curve", "hardware")


# What the pictures call a contender, and its colour: Okabe and Ito's, which colour-blind readers can tell apart
IN_PICTURE = {
    LIGHTNING: ("Lightning's ModelPruning", "#E69F00"),
    "one-shot magnitude": ("magnitude, its mask kept", "#CC79A7"),
    "one-shot sparsegpt": ("SparseGPT, its mask kept", "#D55E00"),
    "first step": ("this callback, two options off", "#56B4E9"),
    "defaults": ("this callback", "#0072B2"),
    DENSE: ("dense fine-tuning", "black"),
}


def draw(lines: Iterable[Mapping[str, Any]], task: Task) -> "Figure":
    """Perplexity against tokens, a column for each pattern, of the contenders in IN_PICTURE; baselines are dashed."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, ScalarFormatter

    shown = [line for line in lines if line["contender"] in IN_PICTURE]
    patterns = list(dict.fromkeys(line["pattern"] for line in shown))
    figure = Figure(figsize=(6.9, 3.1 * len(patterns) + 0.3), layout="constrained")
    figure.supylabel("perplexity on held-out text", fontsize=10)
    for axis, pattern in zip(figure.subplots(len(patterns), squeeze=False)[:, 0], patterns, strict=True):
        curves = {line["contender"]: line["runs"][0]["curve"] for line in shown if line["pattern"] == pattern}
        end = max(curve[-1]["tokens"] for curve in curves.values())
        ends = sorted((curve[-1]["perplexity"], name) for name, curve in curves.items())
        lowest, highest = 0.92 * ends[0][0], 4 * ends[0][0]
        axis.set(yscale="log", ylim=(lowest, highest), xlim=(0, 1.55 * end))
        axis.set_title(f"SmolLM2-135M-Instruct at {pattern.replace('%', ' %')}", loc="left", fontsize=11)
        below = 0.0
        for perplexity, name in ends:
            label, color = IN_PICTURE[name]
            points = [(point["tokens"], point["perplexity"]) for point in curves[name]]
            style = "-" if name in OWN or name == DENSE else "--"
            axis.plot(*zip(*points, strict=True), style, color=color, marker="o", markersize=3, linewidth=1.8)
            # a label's height is so much of the axis
            below = max(perplexity, below * (highest / lowest) ** 0.085)
            axis.annotate(f"{label}  {perplexity:.2f}", (1.02 * end, below), color=color, fontsize=9, va="center")
        for which in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            which(ScalarFormatter())  # 30, not 3 x 10^1
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.set_xticks([end * part / 4 for part in range(5)])
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines.bottom.set_bounds(0, end)
        axis.grid(axis="y", alpha=0.25, which="both")
    axis.set_xlabel(f"tokens of {_TEXTS.get(Path(task.text).name, Path(task.text).name)}", loc="left")
    return figure


_TEXTS = {"pydocs": "Python's documentation"}


def draw_time(lines: Iterable[Mapping[str, Any]], task: Task) -> "Figure":
    """Perplexity against time, in steps of the run's own training, of contenders whose times are kept.

    Where no time is kept of a pruning in one shot, it counts as nothing.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    lines = [line for line in lines if any(run["event_seconds"] is not None for run in line["runs"])]
    patterns = list(dict.fromkeys(line["pattern"] for line in lines))
    figure = Figure(figsize=(6 * len(patterns), 5), layout="constrained")
    for axis, pattern in zip(figure.subplots(1, len(patterns), squeeze=False)[0], patterns, strict=True):
        for line in lines:
            if line["pattern"] == pattern:
                style = "-" if line["contender"] in OWN else "--"
                color = {"color": "black"} if line["contender"] == DENSE else {}
                points = timed(line["runs"], task)
                axis.plot(*zip(*points, strict=True), style, label=line["contender"], marker="o", markersize=4, **color)
        axis.set(
            title=pattern, xlabel="time, in steps of 1,024 tokens", ylabel="perplexity", yscale="log", xlim=(0, None)
        )
        for which in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            which(ScalarFormatter())
        axis.grid(alpha=0.3, which="both")
        axis.legend()
    return figure


def timed(runs: Sequence[Mapping[str, Any]], task: Task) -> list[tuple[float, float]]:
    """(Time in training steps, perplexity) of the first run of a contender whose events are all alike in time.

    The time of an event is that of the first run of which it is kept.
    """
    times = next(run for run in runs if run["event_seconds"] is not None)
    step = (times["seconds"] - times["event_seconds"]) / task.steps
    fractions = [0.0] if times["settings"] is None else times["settings"]["schedule"]
    event = times["event_seconds"] / step / len(fractions)
    points = [(point["tokens"] / (task.batch * task.length), point["perplexity"]) for point in runs[0]["curve"]]
    return [(steps + event * sum(one * task.steps <= steps for one in fractions), found) for steps, found in points]


def main() -> None:
    """Train what is missing, print, and write where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="hub name, local folder or smollm2-135m")
    parser.add_argument("--text", default="python-reference", help="as TextData takes it")
    parser.add_argument("--validation-split", help="of a data set; a tenth is held back where it is left out")
    parser.add_argument("--patterns", nargs="+", choices=PATTERNS, default=["2:4", "60%"])
    parser.add_argument("--contenders", nargs="+", help="by default those of the table")
    parser.add_argument("--rates", nargs="+", type=float, default=[1.5e-4, 3e-4, 6e-4], help="learning rates")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2], help="the first one tries all learning rates")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=8, help="sequences of a step")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--calibration", type=int, default=256, help="sequences of the one-shot methods")
    parser.add_argument("--validation", type=int, default=160, help="sequences to validate on")
    parser.add_argument("--every", type=int, default=40, help="steps between points of a curve")
    parser.add_argument(
        "--runs",
        type=Path,
        default=Path(__file__).parent / "results" / "recovery",
        help="folder of the runs that are kept",
    )
    parser.add_argument(
        "--pruned", type=Path, default=Path("runs/pruned"), help="folder of the models pruned in one shot"
    )
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--only-report", action="store_true", help="train nothing, show the runs that are kept")
    parser.add_argument("--output", type=Path, help="folder for a JSON file and a picture, named after the hardware")
    add_device(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.device == "cpu" and multiply_bf16_in_fp32():
        print("This CPU has no instructions for bf16: products of bf16 are computed in fp32, and rounded")
    for contender in arguments.contenders or ():
        if not any(contender in contenders(pattern) for pattern in arguments.patterns):
            known = dict.fromkeys(name for pattern in arguments.patterns for name in contenders(pattern))
            parser.error(f"--contenders {contender!r} is none of {', '.join(map(repr, known))}")
    if arguments.output is not None and not arguments.output.is_dir():
        parser.error(f"--output {arguments.output} is not a folder: make it, or give another one")
    names = ("model", "text", "validation_split", "steps", "batch", "length", "calibration", "validation")
    task = Task(**{name: getattr(arguments, name) for name in names})
    arguments.runs.mkdir(parents=True, exist_ok=True)

    def run(contender: str, pattern: str, rate: float, seed: int) -> dict[str, Any] | None:
        found = finished(arguments.runs, task, contender, pattern, rate, seed)
        if found is None and not arguments.only_report:
            print(f"{contender}, {pattern}, learning rate {rate:g}, seed {seed}", flush=True)
            result = train(
                task, contender, pattern, rate, seed, arguments.pruned, arguments.every, device=arguments.device
            )
            found = {
                "task": task.described(),
                "contender": contender,
                "pattern": pattern,
                "rate": rate,
                "seed": seed,
                "settings": settings(contender),
                **result,
                "hardware": hardware(arguments.device),
            }
            path = arguments.runs / f"{key(contender, pattern, rate, seed)}.json"
            path.write_text(json.dumps(found, indent=1) + "\n")
        return found

    console, lines = Console(width=160), []
    first, *others = arguments.seeds
    for pattern in arguments.patterns:
        rows = []
        for contender in contenders(pattern):
            if contender not in (arguments.contenders or IN_TABLE[pattern]):
                continue
            tried = [found for rate in arguments.rates if (found := run(contender, pattern, rate, first)) is not None]
            if tried:
                best = min(tried, key=lambda found: found["perplexity"])
                repeated = [run(contender, pattern, best["rate"], seed) for seed in others]
                rows.append(
                    Row(
                        contender,
                        {found["rate"]: found["perplexity"] for found in tried},
                        [best, *(found for found in repeated if found is not None)],
                    )
                )
        lines += report(pattern, rows, task, console)
    if arguments.output is not None:
        document = {"task": task.described(), "results": lines}
        path = keep(f"recovery {Path(task.model).name}", arguments.output, document, arguments.device)
        draw(lines, task).savefig(path.with_suffix(".png"), dpi=160)
        draw_time(lines, task).savefig(path.with_name(f"{path.stem}-time.png"), dpi=110)
        print(path)


if __name__ == "__main__":
    main()
