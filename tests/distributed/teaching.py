"""What training.py trains where a case has a teacher: CausalLM, as a user's own module under FSDP2."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import training
from lightning.pytorch import Trainer
from torch.distributed.fsdp import fully_shard
from training import Case, Share, whole_parameters

import thanos_lightning.lm.distillation
from thanos_lightning.lm import CausalLM, Distillation
from thanos_lightning.lm.pretrained import load_pretrained


class Taught(CausalLM):
    case: Case

    def configure_model(self) -> None:
        super().configure_model()
        if self.case.strategy != "fsdp":
            return
        assert self.model is not None
        mesh = self.device_mesh["data_parallel"]  # type: ignore[index]
        for layer in self.model.model.layers:
            fully_shard(layer, mesh=mesh)
        if self.case.parts:
            fully_shard([self.model.model.embed_tokens, self.model.model.norm, self.model.lm_head], mesh=mesh)
        fully_shard(self.model, mesh=mesh)

    def train_dataloader(self) -> Share:
        return Share(self.case)


class Results(training.Results):
    """Takes what the test wants to know of the teacher, too."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        logged = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("train/")}
        self.found.setdefault("logged", []).append(logged)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        teacher, optimizer = pl_module._teacher.model, trainer.optimizers[0]
        inner = getattr(optimizer, "optimizer", optimizer)
        self.found |= {
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
        super().on_train_end(trainer, pl_module)
        self.state["teacher"] = whole_parameters(SimpleNamespace(model=teacher))


def traces(model: Any) -> list[bool]:
    """For each of DeepSpeed's engines of a model, whether it knows the order in which modules are called."""
    if not any(hasattr(parameter, "ds_tensor") for parameter in model.parameters()):
        return []
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload

    of_all = [one for one in gc.get_objects() if type(one) is DeepSpeedZeRoOffload]
    return [one.get_param_coordinator().is_complete_trace() for one in of_all if one.module is model]


def make_module(case: Case) -> Taught:
    thanos_lightning.lm.distillation.TOKENS_PER_CHUNK = 24  # of the 64 in a batch
    module = Taught(
        load_pretrained(case.model) if case.as_object else case.model,
        learning_rate=1e-2,
        lr_schedule="constant",
        distillation=Distillation(case.teacher, dtype=case.teacher_dtype),
    )
    module.case = case
    return module
