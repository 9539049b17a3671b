"""Trains a tiny model through pruning events on one of several ranks, which ranks.py starts.

Each line of the file that `main` is given is a `Case`, as JSON. All are trained one after the other in this process.
Each leaves a rank<r>.json with what this rank saw, a state<r>.pt and, at its end, a done<r> in its folder.
"""

from __future__ import annotations

import dataclasses
import errno
import fnmatch
import gc
import hashlib
import json
import os
import pickle
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, DistributedSampler

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_mixtures import tiny_mixture
from toy import ResumableBatches, Sequences, ToyLM, adamw, at, momentum_sgd, tiny_gpt2, tiny_llama, trainer
from transformers import LlamaForCausalLM

import thanos_lightning.event.window
import thanos_lightning.fit.run
import thanos_lightning.ranks.starting
from thanos_lightning import CalibrationOptions, CPUDeepSpeed, SparsitySchedule, ThanosPruningCallback
from thanos_lightning.checkpoints.lazy import part_of, whole_of
from thanos_lightning.lm.causal_lm import add_lora
from thanos_lightning.plan.allocation import Allocation
from thanos_lightning.ranks.masks import LayerMask
from thanos_lightning.ranks.talk import Ranks
from thanos_lightning.ranks.view import whole_shape
from thanos_lightning.solver import HessianAccumulator

PROBED = torch.arange(16).unsqueeze(0)  # tokens
NORMS = 6  # that are compared in a training
COUNTED = "counted"  # what the callback takes for an attention mask, where a case has uncounted ranks
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))  # Lightning deletes it after the first training


class Drifting(Optimizer):
    """Moves all weights, also those whose gradients are 0."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.01})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for parameter in [one for group in self.param_groups for one in group["params"]]:
            if parameter.grad is not None:
                parameter.sub_(parameter.grad + 0.1, alpha=0.01)
        return loss


OPTIMIZERS = {
    "adamw": adamw,
    "sgd": momentum_sgd,
    "still": partial(torch.optim.SGD, lr=0.0, momentum=0.9),
    "drifting": Drifting,
}


@dataclasses.dataclass
class Case:
    """One training."""

    out: str
    strategy: str = "ddp"  # "auto", "ddp", "fsdp", "zero0" … "zero3"
    precision: str = "32-true"
    optimizer: str = "adamw"
    pattern: str = "2:4"
    sparsity: float | None = None
    multiple_of: int = 64
    accumulate: int = 1
    batch_size: int = 4
    max_steps: int = 10
    schedule: tuple[int, int, int] = (0, 7, 3)
    calibration_steps: int = 2
    targets: list[str] = dataclasses.field(default_factory=lambda: ["*"])
    model: str = "llama"
    compiled: str | None = None  # in configure_model: "wrapped" by torch.compile, or "in place"
    direct: bool = False  # the LightningModule has no forward, and calls its model
    lora: bool = False  # train adapters on all layers but the head, and nothing else
    configure_model: bool = False  # build the model there, and not before
    pretrained: str | None = None  # a folder, out of which from_pretrained loads it there
    tells_transformers: bool = False  # of ZeRO-3, when it does
    deepspeed: dict[str, Any] = dataclasses.field(default_factory=dict)  # arguments of the strategy
    zero: dict[str, Any] = dataclasses.field(default_factory=dict)  # entries of its zero_optimization
    config: dict[str, Any] = dataclasses.field(default_factory=dict)  # other entries of its configuration
    distributed: bool = True  # a folder of shards as checkpoint of FSDP, not one file
    fsdp: dict[str, Any] = dataclasses.field(default_factory=dict)  # see `shard`
    monitor: str | None = None
    save: bool | list[int] = False  # after each step, or after these
    resume: str | None = None  # where it has {rank}, another folder for each
    fault: str | None = None
    kill_at: tuple[int, str, int] | None = None  # the batch in which a rank kills itself, the hook, and the rank
    off: list[str] = dataclasses.field(default_factory=list)  # methods of the enforcer that do nothing
    frozen: list[str] = dataclasses.field(default_factory=list)  # parameters that are not trained
    left_out: list[str] = dataclasses.field(default_factory=list)  # parameters that the optimizer doesn't get
    apart: list[str] = dataclasses.field(default_factory=list)  # weights in the second group, beside vectors
    routed: bool = False  # a further layer is called on rank 0 only
    watch: bool = True
    calibration_batches: int | None = None  # of a calibration set, in place of training batches
    sampled: bool = False  # a DistributedSampler shares these
    allocation: dict[str, Any] | None = None
    output_weights: Any = None
    looked: bool = False  # at a first batch of the calibration set, before the training, as both ranks have to
    unlabelled: list[int] = dataclasses.field(default_factory=list)  # the calibration batches without labels
    uncounted: list[int] | None = None  # the ranks of whose batches no token counts
    fewer: int = 0  # batches on rank 1: of its calibration set, or of its training where there is none
    uneven: bool = False  # give rank 1 the first third of each sequence only
    epochs: int = -1  # in place of steps
    overwrites: bool = False  # save under one name
    probed: bool = False  # keep what the model gives at the end, as where it has adapters or experts
    teacher: str | None = None  # train CausalLM with this teacher, as teaching.py does: "start" or a folder
    teacher_dtype: str = "float32"
    as_object: bool = False  # give CausalLM the loaded model
    parts: bool = True  # under FSDP shard the embeddings, the last norm and the head apart from the rest


class Stream:
    """Batches whose number only shows at their end."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


class Share(ResumableBatches):
    """The batches of one rank: batch k of rank r is batch k·R + r of the data."""

    def __init__(self, case: Case) -> None:
        super().__init__(216, batch_size=case.batch_size)
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.batches = self.batches[rank::ranks]
        if rank == 1 and case.calibration_batches is None:
            self.batches = self.batches[: len(self.batches) - case.fewer]
        if rank == 1 and case.uneven:
            self.batches = [{name: values[:, :5] for name, values in batch.items()} for batch in self.batches]
        if case.uncounted is not None:
            for batch in self.batches:
                batch[COUNTED] = torch.full_like(batch["input_ids"], int(rank not in case.uncounted))


MODELS: dict[str, Callable[[], Any]] = {
    "llama": tiny_llama,
    "gpt2": tiny_gpt2,
    # has a layer of four rows, of which the last of three ranks gets none, and others that don't divide by three
    "narrow": partial(tiny_llama, num_attention_heads=8, num_key_value_heads=1),
    # has weights of the MiB a rank from which DeepSpeed swaps to disk, also in bf16: those of its MLP
    "wide": partial(tiny_llama, hidden_size=512, intermediate_size=2048, num_hidden_layers=1),
    "mixtral": tiny_mixture,
    "gpt-oss": partial(tiny_mixture, "gpt-oss"),
    "olmoe": partial(tiny_mixture, "olmoe", number=64),  # of which a rank's batch reaches some
}


def shard(
    model: Any,
    device_mesh: Any,
    *,
    how: str = "layers",
    replicas: int = 1,
    columns: list[str] | None = None,
    bf16: bool = False,
    **arguments: Any,
) -> None:
    """Shard a model in `configure_model`.

    Args:
        model: Llama or GPT-2.
        device_mesh: Lightning's.
        how: "layers" (each decoder layer and the rest, as in Lightning's documentation), "root" (all as one), "first"
            (the first decoder layer alone), "linears" (each Linear in them), "tensor" (tensor parallel) or "both" (that
            and by layers).
        replicas: So many groups of ranks share one copy each.
        columns: Parameters that are sharded on dimension 1.
        bf16: Gather parameters in bf16.
        **arguments: For `fully_shard`.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = device_mesh["data_parallel"]
    if replicas > 1:
        mesh = init_device_mesh("cpu", (replicas, mesh.size() // replicas), mesh_dim_names=("replica", "shard"))
    if bf16:
        arguments["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if columns is not None:
        by_columns = {id(p) for name, p in model.named_parameters() if name in columns}
        arguments["shard_placement_fn"] = lambda p: Shard(1) if id(p) in by_columns else None
    blocks = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    if how in ("tensor", "both"):
        for block in blocks:
            plan = {"mlp.up_proj": ColwiseParallel(), "mlp.down_proj": RowwiseParallel()}
            parallelize_module(block, device_mesh["tensor_parallel"], plan)
    linears = [part for block in blocks for part in block.modules() if isinstance(part, torch.nn.Linear)]
    by_layers = [*blocks, model]
    parts = {"layers": by_layers, "both": by_layers, "root": [model], "first": blocks[:1], "linears": linears}
    for part in parts.get(how, []):
        fully_shard(part, mesh=mesh, **arguments)


class Module(ToyLM):
    def __init__(self, case: Case) -> None:
        build = MODELS[case.model]
        self.build = build
        super().__init__(None if case.configure_model else adapted(build(), case), make_optimizer=self._make)
        if case.configure_model:
            self.model = None  # type: ignore[assignment]
        self.case = case
        self.register_buffer("batches_seen", torch.zeros((), dtype=torch.int64))
        if case.routed:
            self.expert = torch.nn.Linear(32, 32, bias=False)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.batches_seen += 1
        loss = super().training_step({key: value for key, value in batch.items() if key != COUNTED}, batch_idx)
        if self.case.routed and self.global_rank == 0:
            loss = loss + self.expert(self.model.model.embed_tokens(batch["input_ids"])).square().mean()
        return loss

    def configure_model(self) -> None:
        if self.model is None and self.case.pretrained is not None:
            from transformers.integrations import HfDeepSpeedConfig

            known = HfDeepSpeedConfig(self.trainer.strategy.config) if self.case.tells_transformers else None
            self.model = adapted(LlamaForCausalLM.from_pretrained(self.case.pretrained), self.case)
            del known
        if self.model is None:
            self.model = adapted(self.build(), self.case)
        for name, parameter in self.named_parameters():
            if matches(name, self.case.frozen):
                parameter.requires_grad = False
        if self.case.strategy == "fsdp":
            shard(self.model, self.device_mesh, **self.case.fsdp)
        if self.case.compiled == "in place":
            self.model.compile(backend="eager")
        elif self.case.compiled == "wrapped":
            self.model = torch.compile(self.model, backend="eager")  # type: ignore[assignment]

    def _make(self, parameters: Any) -> Optimizer:
        parameters = [p for name, p in self.named_parameters() if not matches(name, self.case.left_out)]
        if self.case.lora:
            parameters = [parameter for parameter in parameters if parameter.requires_grad]
        if self.case.optimizer in ("cpu_adam", "fused_adam"):
            from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

            kind = {"cpu_adam": DeepSpeedCPUAdam, "fused_adam": FusedAdam}[self.case.optimizer]
            return kind(parameters, lr=3e-3, weight_decay=0.1)
        if self.case.pattern == "channels":  # biases are looked at, and DeepSpeed doesn't tell of a second group
            return OPTIMIZERS[self.case.optimizer](parameters)
        apart = {id(p) for name, p in self.named_parameters() if matches(name, self.case.apart)}
        groups: list[list[Any]] = [[], []]
        for p in parameters:
            groups[len(getattr(p, "ds_shape", p.shape)) == 1 or id(p) in apart].append(p)
        return OPTIMIZERS[self.case.optimizer]([{"params": groups[0]}, {"params": groups[1], "weight_decay": 0.0}])

    def train_dataloader(self) -> Share:
        return Share(self.case)


class Direct(Module):
    forward = LightningModule.forward

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        return loss

    def calibration_step(self, batch: dict[str, Tensor]) -> Any:
        return self.model(**batch).loss


def adapted(model: Any, case: Case) -> Any:
    if case.lora:
        torch.manual_seed(2)
        add_lora(model, {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"})
    return model


def matches(name: str, globs: list[str]) -> bool:
    return any(fnmatch.fnmatch(name, glob) for glob in globs)


@torch.no_grad()
def probe(trainer: Trainer, pl_module: Any) -> None:
    """Keep what the model gives at the end, called by itself and not by its LightningModule."""
    logits = pl_module.model(input_ids=PROBED).logits
    torch.save(logits, Path(trainer.default_root_dir) / f"logits{trainer.global_rank}.pt")


class CountCollectives(TorchDispatchMode):
    def __init__(self, at_each: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.largest_total = 0  # in bytes, of what each rank got the sum of
        self.at_each = at_each

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self.calls.append(str(func))
            self.at_each()
            if func is torch.ops.c10d.allreduce_.default:
                self.largest_total = max(self.largest_total, *(one.nbytes for one in args[0]))
        return func(*args, **(kwargs or {}))


def masks_of(pruning: ThanosPruningCallback) -> dict[str, LayerMask]:
    """Parameter name -> its mask, on every rank."""
    assert pruning._run is not None
    enforcer, patterns = pruning._run.enforcer, pruning._past.patterns
    masks = {}
    for name in enforcer.masked:
        layer, keep = pruning._run.masked[name], enforcer.keep_mask(name)
        assert keep is not None
        masks[layer.parameter_name] = LayerMask.of(keep, patterns[name], layer.transposed)
    return masks


def as_stored(masks: dict[str, LayerMask], parameters: dict[str, Any]) -> dict[str, Tensor]:
    """Parameter -> its keep mask in its own layout: of all experts that it has, if these have masks."""
    stored: dict[str, Tensor] = {}
    for name, mask in masks.items():
        keep = mask.keep.T if mask.transposed else mask.keep
        whole = whole_of(name)
        if whole == name:
            stored[name] = keep.squeeze(1) if name.endswith(".bias") else keep
            continue
        if whole not in stored:
            stored[whole] = torch.ones(whole_shape(parameters[whole]), dtype=torch.bool)
        part_of(stored[whole], name).copy_(keep)
    return stored


def sparse_norm(module: Any, masks: dict[str, Tensor], gradient_of: Callable[[Any], Tensor]) -> float:
    """The norm of all gradients, as if those under the masks were 0."""
    total = 0.0
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            gradient = gradient_of(parameter) * masks.get(name, 1)
            total += float(gradient.double().square().sum())
    return total**0.5


class Watch(Callback):
    """Looks, after every step, at what is under the masks: by DeepSpeed's public functions or torch alone."""

    def __init__(self, pruning: ThanosPruningCallback, strategy: str) -> None:
        self.pruning, self.strategy = pruning, strategy
        self.losses: list[float] = []
        self.checked: dict[str, int] = {}
        self.violations: list[str] = []
        self.collectives: list[str] = []
        self.control = 0
        self.enforced = 0
        self.norms: list[tuple[float, float]] = []  # of the sparse gradients, and the one that these are clipped by
        self.event_calls: set[str] = set()  # collectives of the last event
        self.event_total = 0  # the bytes of its largest total
        self.told = 0  # the bytes of the largest Python object that this rank told all others
        self.device_copies = 0  # of gradients, for which DeepSpeed asks where the accelerator is
        self.gathered_at_once = 0  # weights of layers that DeepSpeed had gathered at the same time in it
        self.sums: list[int] = []  # how many different ones a window had on this rank
        self.tokens: list[int] = []  # of all layers of a window on this rank
        self._sparse_norm = 0.0
        self._masks: dict[str, Tensor] = {}
        self._events = -1

    def masks(self, pl_module: Any) -> dict[str, Tensor]:
        """The keep masks of the last event, by parameter, as it is stored."""
        events = len(self.pruning.report.events)
        if events != self._events:
            self._masks = as_stored(masks_of(self.pruning), dict(pl_module.named_parameters()))
            self._events = events
        return self._masks

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        assert self.pruning._run is not None
        enforcer = self.pruning._run.enforcer
        enforce, mask_gradients = enforcer.enforce, enforcer.mask_gradients

        def counted(method: Any, *args: Any) -> None:
            with CountCollectives() as mode, self._counting_copies():
                method(*args)
            self.collectives += mode.calls
            self.enforced += method is enforce

        enforcer.enforce = partial(counted, enforce)  # type: ignore[method-assign]
        enforcer.mask_gradients = partial(counted, mask_gradients)  # type: ignore[method-assign]
        thanos_lightning.fit.run.prune_window = self._watched_event

    @contextmanager
    def _counting_copies(self) -> Iterator[None]:
        if not self.strategy.startswith("zero"):
            yield
            return
        from deepspeed.accelerator import get_accelerator

        with mock.patch.object(get_accelerator(), "current_device_name", return_value="cpu") as asked:
            yield
        self.device_copies += asked.call_count

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Under FSDP it is torch that clips."""
        clip = torch.nn.utils.clip_grad_norm_

        def recorded(*args: Any, **kwargs: Any) -> Tensor:
            masks = self.masks(pl_module)
            if not masks or len(self.norms) >= NORMS:
                return clip(*args, **kwargs)
            sparse = sparse_norm(pl_module, masks, lambda parameter: parameter.grad.full_tensor())
            norm: Any = clip(*args, **kwargs)
            self.norms.append((sparse, float(norm.full_tensor())))
            return norm

        if self.strategy == "fsdp":
            torch.nn.utils.clip_grad_norm_ = recorded

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Measure what this rank tells all others. Of what they tell by `union`, each layer is told of by one rank."""
        gather, union = Ranks.gather, Ranks.union

        def measured(ranks: Ranks, value: Any) -> Any:
            self.told = max(self.told, len(pickle.dumps(value)))
            return gather(ranks, value)

        def joined(ranks: Ranks, own: Any) -> Any:
            with mock.patch.object(Ranks, "gather", gather):
                return union(ranks, own)

        with mock.patch.multiple(Ranks, gather=measured, union=joined):
            yield

    def _watched_event(self, window: Any, targets: Any, moments: Any, *args: Any, **arguments: Any) -> Any:
        accumulators = moments.accumulators
        self.sums.append(len({id(accumulator) for accumulator in accumulators.values()}))
        self.tokens.append(sum(accumulator.num_tokens for accumulator in accumulators.values()))
        # of the last event, which has the masks of others to tell, too: to look at each operation takes a while
        is_last = window is self.pruning._run.windows[-1]
        with (
            CountCollectives(self._count_gathered([targets.layers[name] for name in window.patterns]))
            if is_last
            else nullcontext() as mode
        ):
            result = thanos_lightning.event.window.prune_window(window, targets, moments, *args, **arguments)
        if mode is not None:
            self.event_calls, self.event_total = set(mode.calls), mode.largest_total
        return result

    def _count_gathered(self, layers: Any) -> Callable[[], None]:
        def count() -> None:
            status = [getattr(layer.parameter, "ds_status", None) for layer in layers]
            available = sum(getattr(one, "name", "") == "AVAILABLE" for one in status)
            self.gathered_at_once = max(self.gathered_at_once, available)

        return count

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Optimizer) -> None:
        engine = getattr(trainer.strategy, "deepspeed_engine", None)
        if not hasattr(engine, "is_gradient_accumulation_boundary") or not engine.is_gradient_accumulation_boundary():
            return
        from deepspeed.utils import safe_get_full_grad

        masks = self.masks(pl_module)
        self._sparse_norm = 0.0
        if not masks or len(self.norms) >= NORMS:
            return
        # gradients in fp16 are scaled; in others some of DeepSpeed's optimizers have None there
        scale = getattr(engine.optimizer, "loss_scale", 1.0) or 1.0
        self._sparse_norm = sparse_norm(pl_module, masks, safe_get_full_grad) / scale

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        engine = getattr(trainer.strategy, "deepspeed_engine", None)
        if self._sparse_norm and engine is not None and not trainer.fit_loop.epoch_loop._should_accumulate():
            clipped_by = engine.get_global_grad_norm()
            if clipped_by is not None:  # stage 0 in fp32 doesn't tell
                self.norms.append((self._sparse_norm, float(clipped_by)))
            self._sparse_norm = 0.0
        self.losses.append(float(outputs["loss"]))
        if not trainer.fit_loop.epoch_loop._should_accumulate():
            self.look(trainer, pl_module)

    def look(self, trainer: Trainer, pl_module: Any) -> None:
        parameters = dict(pl_module.named_parameters())
        if dist.is_initialized() and not self.control:
            with CountCollectives() as mode:
                dist.all_reduce(torch.ones(1))
                dist.broadcast(torch.ones(1), src=0)
                dist.all_gather_object([None] * dist.get_world_size(), "")
            self.control += len(mode.calls) >= 3
        masks = self.masks(pl_module)
        weights = held_weights([parameters[name] for name in masks])
        with together():
            states = {name: list(held_states(trainer, parameters[name])) for name in masks}
        for (name, keep), weight in zip(masks.items(), weights, strict=True):
            drop = held_like(parameters[name], ~keep)
            for what, held in [("weight", weight), *states[name]]:
                self.checked[what] = self.checked.get(what, 0) + 1
                values = held.reshape(drop.shape)[drop]
                count = int((values.ne(0) | values.signbit()).sum())
                if count:
                    self.violations.append(f"step {trainer.global_step}: {count} of {name} ({what})")


@contextmanager
def together() -> Iterator[None]:
    """Sends in one message what DeepSpeed sends for each tensor: gloo takes about a millisecond for any.

    What it gives inside the block are views of buffers that are filled at its end.
    """
    from deepspeed import comm

    reduced: list[Tensor] = []
    gathered: list[tuple[Tensor, Tensor]] = []
    before = comm.all_reduce, comm.all_gather_into_tensor
    comm.all_reduce = lambda buffer, **_: reduced.append(buffer)
    comm.all_gather_into_tensor = lambda whole, part, **_: gathered.append((whole, part))
    try:
        yield
    finally:
        comm.all_reduce, comm.all_gather_into_tensor = before
    if reduced:
        sums = torch.cat(reduced)
        dist.all_reduce(sums)
        for buffer, total in zip(reduced, sums.split([len(buffer) for buffer in reduced]), strict=True):
            buffer.copy_(total)
    if gathered:
        sizes = [len(part) for _, part in gathered]
        parts = torch.empty(dist.get_world_size(), sum(sizes))
        dist.all_gather_single(parts.flatten(), torch.cat([part for _, part in gathered]))
        for (whole, _), part in zip(gathered, parts.split(sizes, dim=1), strict=True):
            whole.copy_(part.flatten())


def held_like(parameter: Any, whole: Tensor) -> Tensor:
    """Of a whole tensor what FSDP has put on this rank of the parameter."""
    if not hasattr(parameter, "to_local"):
        return whole
    from torch.distributed.tensor import distribute_tensor

    part = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return part.to_local()


def held_weights(parameters: list[Any]) -> list[Tensor]:
    """The weights: under FSDP this rank's part, which torch names, elsewhere the whole."""
    if any(hasattr(parameter, "ds_id") for parameter in parameters):
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters(parameters):
            return [parameter.detach().clone() for parameter in parameters]
    return [(p.to_local() if hasattr(p, "to_local") else p).detach() for p in parameters]


def held_states(trainer: Trainer, parameter: Any) -> Iterator[tuple[str, Tensor]]:
    """What the optimizer has for a parameter: its master, if there is one, and its moments."""
    engine = getattr(trainer.strategy, "deepspeed_engine", None)
    if engine is None or not hasattr(engine, "optimizer"):
        # a parameter that is gathered at the moment has none
        for name, moment in trainer.optimizers[0].state.get(parameter, {}).items():
            if moment.shape == parameter.shape:
                yield name, moment.to_local() if hasattr(moment, "to_local") else moment
        return
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if not parameter.requires_grad:
        return
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    others = {"SGD": ["momentum_buffer"], "Drifting": []}
    names = others.get(type(inner).__name__, ["exp_avg", "exp_avg_sq"])
    if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
        yield "master", safe_get_full_fp32_param(parameter)
        for name in names:
            yield name, safe_get_full_optimizer_state(parameter, name)
        return
    key = parameter
    if hasattr(engine.optimizer, "fp32_groups_flat"):
        for flat, group in zip(engine.optimizer.fp32_groups_flat, engine.optimizer.fp16_groups, strict=True):
            numbers, sizes = {id(model): number for number, model in enumerate(group)}, [one.numel() for one in group]
            if id(parameter) in numbers:
                for name, held in [("master", flat.detach()), *((name, inner.state[flat][name]) for name in names)]:
                    yield name, held.split(sizes)[numbers[id(parameter)]].view_as(parameter)
        return
    if hasattr(engine.optimizer, "fp32_groups"):
        models = [p for group in engine.optimizer.fp16_groups for p in group]
        masters = [p for group in engine.optimizer.fp32_groups for p in group]
        key = masters[[id(p) for p in models].index(id(parameter))]
        yield "master", key.detach()
    for name in names:
        yield name, inner.state[key][name]


# Faults


def poison(trainer: Trainer, *_: Any) -> None:
    """Make the statistics of a layer NaN on one rank, as an activation that overflows does."""
    (pruning,) = (other for other in trainer.callbacks if isinstance(other, ThanosPruningCallback))
    collector = pruning._run.collector
    if trainer.global_rank == 1 and collector.statistics is not None:
        collector.statistics.accumulators["model.model.layers.1.mlp.down_proj"].triangle[3, 5] = float("nan")


class Failing(Callback):
    """Lets a function fail on the last rank, when it has been called so often: by an error, or by a kill."""

    def __init__(self, place: Any, name: str, error: Exception | None = None, spared: int = 0) -> None:
        self.place, self.name, self.error, self.spared = place, name, error, spared

    def rank(self, trainer: Trainer) -> int:
        return trainer.world_size - 1

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.global_rank == self.rank(trainer):
            setattr(self.place, self.name, self.fail)

    def fail(self, *args: Any, **kwargs: Any) -> None:
        self.spared -= 1
        if self.spared < 0:
            if self.error is None:
                os.kill(os.getpid(), signal.SIGKILL)
            else:
                raise type(self.error)(*self.error.args)


class FullDisk(Failing):
    """Leaves no room for what the last rank writes, or the first, where it writes for all."""

    def rank(self, trainer: Trainer) -> int:
        writes_alone = isinstance(trainer.strategy, DDPStrategy) and not hasattr(trainer.strategy, "deepspeed_engine")
        return 0 if writes_alone else super().rank(trainer)


def fill_mask(trainer: Trainer, pl_module: Any, batch: Any, *_: Any) -> None:
    """Give the batches of one rank a mask that is none."""
    if trainer.global_rank == 1:
        batch[COUNTED].fill_(-1)


def refill(what: str, trainer: Trainer, pl_module: Any, *_: Any) -> None:
    """Fill pruned entries of one rank, of "weight" (the model's copy), "master" or a moment."""
    if trainer.global_rank != 1 or trainer.global_step != 9:
        return
    weight = pl_module.model.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        if what == "weight":
            getattr(weight, "ds_tensor", weight).data += 1
        elif not hasattr(trainer.strategy, "deepspeed_engine"):
            trainer.optimizers[0].state[weight][what].data += 1
        else:
            from deepspeed import utils

            held = "local" if hasattr(weight, "ds_tensor") else "full"
            ones = torch.ones_like(getattr(weight, "ds_tensor", weight), dtype=torch.float32)
            if what == "master":
                getattr(utils, f"safe_set_{held}_fp32_param")(weight, ones)
            else:
                getattr(utils, f"safe_set_{held}_optimizer_state")(weight, ones, what)


class SavedAt(ModelCheckpoint):
    """Saves after these steps."""

    def __init__(self, out: Path, steps: list[int]) -> None:
        super().__init__(out, filename="{step}", save_top_k=-1, every_n_train_steps=1)
        self.steps = steps

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step in self.steps:
            super().on_train_batch_end(trainer, *args)


class Killed(Callback):
    """Kills a rank in a batch, in a hook, as a machine that fails does."""

    def __init__(self, batch: int, hook: str, rank: int) -> None:
        self.left, self.rank = batch, rank
        setattr(self, hook, self.reached)

    def reached(self, trainer: Trainer, *_: Any) -> None:
        self.left -= 1
        if self.left == 0 and trainer.global_rank == self.rank:
            os.kill(os.getpid(), signal.SIGKILL)


def kill_in_a_save(trainer: Trainer, *_: Any) -> None:
    """Kill the last rank in the save at step 6, when it has written what Lightning keeps, and the others more."""
    if trainer.global_step == 6 and trainer.global_rank == trainer.world_size - 1:
        engine = trainer.strategy.deepspeed_engine
        engine._save_zero_checkpoint = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)


def terminate(ranks: Sequence[int], trainer: Trainer, *_: Any) -> None:
    """Send SIGTERM to some ranks, in the batch before an event, between two messages of a backward."""
    if trainer.global_rank in ranks and trainer.global_step == 1:
        os.kill(os.getpid(), signal.SIGTERM)


def end_when_locked() -> Callback:
    """End the training when it is said that a lock keeps it waiting, which is before any hook."""
    thanos_lightning.ranks.starting._PATIENCE = 0.0
    warnings.filterwarnings("error", message=".* is a lock")
    return Callback()


EXHAUSTED = torch.OutOfMemoryError("tried to allocate 1 PiB")
FAULTS: dict[str, Callable[[], Callback]] = {
    "nan": partial(at, "on_train_batch_end", poison),
    "memory": partial(Failing, thanos_lightning.event.window, "prune_layer", EXHAUSTED),
    "memory for messages": partial(Failing, Ranks, "reserve", EXHAUSTED),
    "memory for weights": partial(Failing, Ranks, "reserve", EXHAUSTED, spared=1),
    "memory inside a forward": partial(Failing, HessianAccumulator, "update", EXHAUSTED),  # in the hook on inputs
    "disk": partial(FullDisk, torch, "save", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
    "mask": partial(at, "on_train_batch_start", fill_mask),
    **{
        f"refill {what}": partial(at, "on_train_batch_end", partial(refill, what))
        for what in ("weight", "master", "exp_avg", "exp_avg_sq")
    },
    # while others wait for its results
    "killed_inside": partial(Failing, thanos_lightning.event.window, "prune_layer"),
    "killed in a save": partial(at, "on_save_checkpoint", kill_in_a_save),
    "locked": end_when_locked,
    **{
        name: partial(at, "on_before_backward", partial(terminate, ranks))
        for name, ranks in {"SIGTERM": [0, 1], "SIGTERM on the first": [0], "SIGTERM on the last": [1]}.items()
    },
}


def whole_parameters(module: Any) -> dict[str, Tensor]:
    """Copies of all parameters of a module's model on this rank. All ranks must call it."""
    parameters = dict(module.model.named_parameters())
    if any(hasattr(p, "ds_id") for p in parameters.values()):
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters(list(parameters.values())):
            return {name: p.detach().clone() for name, p in parameters.items()}
    return {n: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for n, p in parameters.items()}


class Results(Callback):
    """Takes what the test wants to know while the strategy still holds its parameters."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}
        self.state: dict[str, dict[str, Tensor]] = {"weights": {}}

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.state["weights"] = {name: parameter.float() for name, parameter in whole_parameters(pl_module).items()}


def make_strategy(case: Case) -> Any:
    if not case.strategy.startswith("zero"):
        if case.strategy == "fsdp":
            from lightning.pytorch.strategies import ModelParallelStrategy

            is_tensor_parallel = case.fsdp.get("how") in ("tensor", "both")
            return ModelParallelStrategy(
                data_parallel_size=1 if is_tensor_parallel else WORLD_SIZE,
                tensor_parallel_size=WORLD_SIZE if is_tensor_parallel else 1,
                save_distributed_checkpoint=case.distributed,
            )
        return case.strategy
    if case.precision == "16-mixed":
        from deepspeed.accelerator import get_accelerator

        # it asks for instructions that many CPUs lack; torch does without them, slowly
        get_accelerator().is_fp16_supported = lambda: True
    strategy = CPUDeepSpeed(stage=int(case.strategy[-1]), **case.deepspeed)
    zero = strategy.config["zero_optimization"]
    zero |= {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 1000, **case.zero}
    strategy.config |= {"zero_force_ds_cpu_optimizer": False, **case.config}
    return strategy


@contextmanager
def counting_opened() -> Iterator[list[str]]:
    """The files with tensors that Python opens inside the block, one entry each time."""
    opened: list[str] = []
    is_counting = [True]

    def hook(event: str, arguments: Any) -> None:
        if is_counting and event == "open" and str(arguments[0]).endswith(".pt"):
            opened.append(str(arguments[0]))

    sys.addaudithook(hook)  # which stays
    try:
        yield opened
    finally:
        is_counting.clear()


def note_orders() -> list[str]:
    """Note the down layers whose channels get another order, as it happens."""
    ordered: list[str] = []
    order_channels = thanos_lightning.event.window.order_channels

    def order(*args: Any) -> dict[str, Tensor]:
        orders = order_channels(*args)
        ordered.extend(orders)
        return orders

    thanos_lightning.event.window.order_channels = order
    return ordered


def train(case: Case) -> None:
    out = Path(case.out)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    number = case.calibration_batches
    calibration = None if number is None else ResumableBatches(number * 4, batch_size=4).batches
    for batch in case.unlabelled:
        assert calibration is not None
        del calibration[batch]["labels"]
    if case.sampled:
        data = Sequences(number * 4)
        ranks = DistributedSampler(data, WORLD_SIZE, int(os.environ["RANK"]), shuffle=False)
        calibration = DataLoader(data, batch_size=4, sampler=ranks)
    elif calibration is not None and not case.looked and os.environ.get("RANK") == "1":
        calibration = Stream(calibration[: len(calibration) - case.fewer])  # whose length nobody knows before
    ordered = note_orders()
    pruning = ThanosPruningCallback(
        case.pattern,
        case.sparsity,
        schedule=SparsitySchedule(*case.schedule),
        targets=case.targets,
        multiple_of=case.multiple_of,
        calibration=CalibrationOptions(
            batches=calibration,
            **({"steps": case.calibration_steps} if calibration is None else {}),
            attention_mask_key="attention_mask" if case.uncounted is None else COUNTED,
            output_weights=case.output_weights,
        ),
        verify_every_n_steps=1,
        monitor=case.monitor,
        allocation=None if case.allocation is None else Allocation(**case.allocation),
    )
    if case.teacher is None:
        module, results = Direct(case) if case.direct else Module(case), Results()
    else:
        import teaching

        module, results = teaching.make_module(case), teaching.Results()
    watch = Watch(pruning, case.strategy)

    def switch_off(*_: Any) -> None:
        for method in case.off:
            setattr(pruning._run.enforcer, method, lambda *_: None)

    callbacks: list[Callback] = [results, pruning, at("on_train_start", switch_off)]
    if case.watch:
        callbacks.append(watch)
    if case.lora or case.probed or case.model in ("mixtral", "gpt-oss", "olmoe"):
        callbacks.append(at("on_train_end", probe))
    if case.fault is not None:
        callbacks.insert(0, FAULTS[case.fault]())
    if case.kill_at is not None:
        callbacks.insert(0, Killed(*case.kill_at))
    if case.overwrites:
        over = {"filename": "last-one", "enable_version_counter": False, "every_n_train_steps": 2}
        callbacks.append(ModelCheckpoint(out, **over))
    elif case.save:
        callbacks.append(SavedAt(out, list(range(1, case.max_steps + 1)) if case.save is True else case.save))
    fitted = trainer(
        out,
        *callbacks,
        max_steps=case.max_steps if case.epochs == -1 else -1,
        max_epochs=case.epochs,
        devices=WORLD_SIZE // int(os.environ.get("TEST_NODES", "1")),
        num_nodes=int(os.environ.get("TEST_NODES", "1")),
        strategy=make_strategy(case),
        precision=case.precision,
        accumulate_grad_batches=case.accumulate,
        gradient_clip_val=1.0,
        use_distributed_sampler=False,
        enable_checkpointing=bool(case.save),
    )
    error = None
    try:
        validation = Share(case) if case.monitor is not None else None
        resume = None if case.resume is None else case.resume.replace("{rank}", os.environ.get("RANK", "0"))
        with watch.measuring(), nullcontext([]) if resume is None else counting_opened() as opened:
            fitted.fit(module, val_dataloaders=validation, ckpt_path=resume)
    except (RuntimeError, ValueError, OSError, MisconfigurationException, SIGTERMException) as failure:
        error = f"{type(failure).__name__}: {failure}"
    weights, drops = results.state["weights"], {} if pruning._run is None else pruning._run.enforcer._drops
    report = {
        **results.found,
        "error": error,
        "checked": watch.checked,
        "violations": watch.violations,
        "collectives": watch.collectives,
        "enforced": watch.enforced,
        "event_calls": sorted(watch.event_calls),
        "event_total": watch.event_total,
        "told": watch.told,
        "opened": len(opened),
        "device_copies": watch.device_copies,
        "gathered_at_once": watch.gathered_at_once,
        "sums": watch.sums,
        "tokens": watch.tokens,
        "control": watch.control,
        "norms": watch.norms,
        "losses": watch.losses,
        "steps": pruning._past.optimizer_steps,
        "batches_seen": int(getattr(module, "batches_seen", 0)),
        "held": {name: drop.numel() for name, drop in drops.items()},  # of each mask, on this rank
        "digest": hashlib.sha256(b"".join(w.numpy().tobytes() for w in weights.values())).hexdigest(),
        "events": [event.step for event in pruning.report.events],
        "blocks": {block.name: block.error for event in pruning.report.events for block in event.blocks},
        "ordered": ordered,
        "scanned": len(pruning._past.sensitivities),
        "sparsity": {name: 1 - w.count_nonzero().item() / w.numel() for name, w in weights.items()},
    }
    if error is None:
        masks = {name: mask.state() for name, mask in masks_of(pruning).items()}
        torch.save({**results.state, "masks": masks}, out / f"state{fitted.global_rank}.pt")
    (out / f"rank{fitted.global_rank}.json").write_text(json.dumps(report))


REPLACED = [
    (thanos_lightning.fit.run, "prune_window"),
    (thanos_lightning.event.window, "prune_layer"),
    (thanos_lightning.event.window, "order_channels"),
    (Ranks, "reserve"),
    (HessianAccumulator, "update"),
    (torch, "save"),
    (torch.nn.utils, "clip_grad_norm_"),
]


def main(cases: str) -> None:
    """Train the cases of a file, or of a pipe into which they are written one by one."""
    torch.set_num_threads(1)
    with Path(cases).open() as lines:
        for line in lines:
            case = Case(**json.loads(line))
            with ExitStack() as put_back:  # what callbacks replace for one training
                for place, name in REPLACED:
                    put_back.enter_context(mock.patch.object(place, name, getattr(place, name)))
                train(case)
            gc.collect()
            (Path(case.out) / f"done{os.environ['RANK']}").touch()
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
