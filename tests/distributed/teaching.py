"""Trains CausalLM with a teacher on one of several ranks, as training.py does.

Each case leaves a rank<r>.json and, unless it was refused, a state<r>.pt with what this rank saw in its folder.
"""

from __future__ import annotations

import dataclasses
import gc
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import training
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from toy import ResumableBatches, grouped, trainer
from training import Share, make_strategy, whole_parameters

import thanos_lightning.lm.distillation
from thanos_lightning import SparsitySchedule, ThanosPruningCallback
from thanos_lightning.lm import CausalLM, Distillation
from thanos_lightning.lm.pretrained import load_pretrained

FIRST_EVENT = 3


@dataclasses.dataclass
class Case:
    """One training."""

    out: str
    model: str  # folder of the weights to start from
    strategy: str = "ddp"
    precision: str = "32-true"
    teacher: str = "start"
    dtype: str = "float32"  # of the teacher
    as_object: bool = False  # give the loaded model to CausalLM
    parts: bool = True  # under FSDP shard the embeddings, the last norm and the head apart from the rest
    uneven: bool = False  # give rank 1 a third of the tokens
    calibrated: bool = False  # prune half of the weights anywhere, on a calibration set
    save: bool = False
    resume: str | None = None
    deepspeed: dict[str, Any] = dataclasses.field(default_factory=dict)
    zero: dict[str, Any] = dataclasses.field(default_factory=dict)


class Sharded(CausalLM):
    """As a user's own module under FSDP2."""

    case: Case

    def configure_model(self) -> None:
        super().configure_model()
        assert self.model is not None
        mesh = self.device_mesh["data_parallel"]  # type: ignore[index]
        for layer in self.model.model.layers:
            fully_shard(layer, mesh=mesh)
        if self.case.parts:
            fully_shard([self.model.model.embed_tokens, self.model.model.norm, self.model.lm_head], mesh=mesh)
        fully_shard(self.model, mesh=mesh)


class Uneven(Share):
    """Of which rank 1 gets the first third of each sequence only, which are fewer chunks of tokens."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch in super().__iter__():
            length = batch["input_ids"].shape[1]
            yield {name: values[:, : length if dist.get_rank() == 0 else length // 3] for name, values in batch.items()}


class Watch(Callback):
    """Takes what the test wants to know of the teacher."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.found: dict[str, Any] = {}
        self.state: dict[str, Any] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        logged = trainer.callback_metrics
        self.steps.append({name: float(value) for name, value in logged.items() if name.startswith("train/")})

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        teacher, optimizer = pl_module._teacher.model, trainer.optimizers[0]
        inner = getattr(optimizer, "optimizer", optimizer)
        self.found = {
            # name -> entries that are there outside of the forward, those of this rank's part, and of all parts
            "shards": {
                name: (parameter.numel(), parameter.ds_tensor.numel(), parameter.ds_numel)
                for name, parameter in teacher.named_parameters()
                if hasattr(parameter, "ds_tensor")
            },
            "own_shards": sum(p.ds_tensor.numel() for p in pl_module.parameters() if hasattr(p, "ds_tensor")),
            "moments": sum(state["exp_avg"].numel() for state in inner.state.values()),
            "shared": len({id(p) for p in teacher.parameters()} & {id(p) for p in pl_module.parameters()}),
            "trained": [name for name, parameter in teacher.named_parameters() if parameter.requires_grad],
            "traces": traces(teacher),
        }
        self.state = {
            "teacher": whole_parameters(SimpleNamespace(model=teacher)),
            "weights": whole_parameters(pl_module),
        }


def traces(model: Any) -> list[bool]:
    """For each of DeepSpeed's engines of a model, whether it knows the order in which modules are called."""
    if not any(hasattr(parameter, "ds_tensor") for parameter in model.parameters()):
        return []
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload

    of_all = [one for one in gc.get_objects() if type(one) is DeepSpeedZeRoOffload]
    return [one.get_param_coordinator().is_complete_trace() for one in of_all if one.module is model]


def make_module(case: Case) -> CausalLM:
    kind = Sharded if case.strategy == "fsdp" else CausalLM
    lm = kind(
        load_pretrained(case.model) if case.as_object else case.model,
        learning_rate=1e-2,
        lr_schedule="constant",
        distillation=Distillation(case.teacher, dtype=case.dtype),
    )
    if isinstance(lm, Sharded):
        lm.case = case
    # once the ranks know each other
    lm.train_dataloader = lambda: Uneven(4, None) if case.uneven else Share(4, None)  # type: ignore[method-assign]
    return lm


def train(case: Case) -> None:
    out = Path(case.out)
    out.mkdir(parents=True, exist_ok=True)
    pattern: dict[str, Any] = {"pattern": "2:4", "steps": 2}
    if case.calibrated:
        batches = ResumableBatches(20, batch_size=4).batches
        for batch in batches:
            del batch["labels"]  # so that there are none but those that the model draws
        pattern = {"pattern": "unstructured", "sparsity": 0.5, "batches": batches}
    pruning = ThanosPruningCallback(**grouped(**pattern), schedule=SparsitySchedule(FIRST_EVENT, FIRST_EVENT, 1))
    thanos_lightning.lm.distillation.TOKENS_PER_CHUNK = 24  # of the 64 in a batch
    watch = Watch()
    callbacks: list[Callback] = [watch, pruning]
    if case.save:
        callbacks.append(ModelCheckpoint(out, filename="{step}", save_top_k=-1, every_n_train_steps=2))
    fitted = trainer(
        out,
        *callbacks,
        max_steps=6,
        devices=training.WORLD_SIZE,
        strategy=make_strategy(
            training.Case(case.out, case.strategy, case.precision, deepspeed=case.deepspeed, zero=case.zero)
        ),
        precision=case.precision,
        use_distributed_sampler=False,
        enable_checkpointing=case.save,
    )
    error = None
    try:
        fitted.fit(make_module(case), ckpt_path=case.resume)
    except MisconfigurationException as failure:
        error = str(failure)
    rank = fitted.global_rank
    (out / f"rank{rank}.json").write_text(json.dumps({"error": error, "steps": watch.steps, **watch.found}))
    if error is None:
        torch.save(watch.state, out / f"state{rank}.pt")


def train_all(cases: list[dict[str, Any]]) -> None:
    for case in cases:
        train(Case(**case))
        gc.collect()
