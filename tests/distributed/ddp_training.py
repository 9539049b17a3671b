"""Started by test_ddp.py as a script, which Lightning starts again for the second rank: trains, prunes, looks.

Each rank writes what it saw to OUT/rank<r>.json, and asserts nothing itself: a failed assertion on one rank would leave
the other one waiting.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as functional
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

sys.path.insert(0, str(Path(__file__).parents[1]))

from toy import ResumableBatches, ToyLM, adamw, momentum_sgd, trainer

from thanos_lightning import SparsitySchedule, ThanosPruningCallback
from thanos_lightning.masks import LayerMask


class Share(ResumableBatches):
    """The batches of one rank: batch k of rank r is batch k·R + r of the data."""

    def __init__(self, batch_size: int) -> None:
        super().__init__(96, batch_size=batch_size)
        if dist.is_initialized():
            self.batches = self.batches[dist.get_rank() :: dist.get_world_size()]


class Watch(Callback):
    """Counts, after every batch, what is not +0 under the masks, by its own means."""

    def __init__(self, callback: ThanosPruningCallback) -> None:
        self.callback = callback
        self.checked = self.violations = 0
        self.losses: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(float(outputs["loss"]))
        parameters = dict(pl_module.named_parameters())
        for name, state in self.callback.state_dict()["masks"].items():
            drop = ~LayerMask.from_state(state).keep
            moments = trainer.optimizers[0].state[parameters[name]].values()
            for tensor in [parameters[name].detach(), *(m for m in moments if m.shape == drop.shape)]:
                self.checked += 1
                self.violations += int((tensor[drop].ne(0) | tensor[drop].signbit()).sum())


class Module(ToyLM):
    data_batch_size = 4

    def train_dataloader(self) -> Share:
        return Share(self.data_batch_size)


class Poison(Callback):
    """Makes the inputs of a layer NaN on one rank, for all who look, while its outputs stay what they were."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 0:
            layer = pl_module.model.model.layers[1].mlp.down_proj
            clean = []
            layer.register_forward_pre_hook(lambda module, args: clean.append(args[0]) or (args[0] * float("nan"),))
            layer.register_forward_hook(lambda module, args, output: functional.linear(clean.pop(), module.weight))


class Exhausted(Callback):
    """Lets the solver of one rank run out of memory."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_rank == 1:
            import thanos_lightning.pruning as room

            def prune(*args: Any, **kwargs: Any) -> Any:
                raise torch.OutOfMemoryError("tried to allocate 1 PiB")

            room.prune = prune


class Refill(Callback):
    """Fills a pruned weight of one rank."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 9:
            with torch.no_grad():
                pl_module.model.model.layers[0].mlp.up_proj.weight += 1


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--fault", choices=["nan", "refill", "memory"])
    options = parser.parse_args()
    torch.set_num_threads(1)

    callback = ThanosPruningCallback(
        options.pattern,
        0.6 if options.pattern == "unstructured" else None,
        schedule=SparsitySchedule(0, 7, 3),
        calibration_steps=2,
        verify_every_n_steps=1,
    )
    watch = Watch(callback)
    callbacks: list[Callback] = [callback, watch]
    if options.fault == "nan":
        callbacks = [Poison(), *callbacks]
    if options.fault == "memory":
        callbacks = [Exhausted(), *callbacks]
    if options.fault == "refill":
        callbacks = [Refill(), *callbacks]
    if options.save:
        callbacks.append(ModelCheckpoint(options.out, filename="{step}", save_top_k=-1, every_n_train_steps=1))
    module = Module(make_optimizer={"adamw": adamw, "sgd": momentum_sgd}[options.optimizer])
    module.data_batch_size = options.batch_size
    fitted = trainer(
        options.out,
        *callbacks,
        max_steps=12 // options.accumulate if options.accumulate > 1 else 12,
        devices=options.ranks,
        strategy="ddp" if options.ranks > 1 else "auto",
        precision=options.precision,
        accumulate_grad_batches=options.accumulate,
        gradient_clip_val=1.0,
        use_distributed_sampler=False,
        enable_checkpointing=options.save,
    )
    error = None
    try:
        fitted.fit(module, ckpt_path=options.resume)
    except RuntimeError as failure:
        error = f"{type(failure).__name__}: {failure}"
    weights = {name: parameter.detach() for name, parameter in module.model.named_parameters()}
    digest = hashlib.sha256(b"".join(w.float().numpy().tobytes() for w in weights.values())).hexdigest()
    result = {
        "error": error,
        "checked": watch.checked,
        "violations": watch.violations,
        "losses": watch.losses,
        "weights": digest,
        "events": [event.step for event in callback.report.events],
        "sparsity": {name: 1 - w.count_nonzero().item() / w.numel() for name, w in weights.items()},
    }
    if error is None:
        torch.save(callback.state_dict()["masks"], options.out / f"masks{fitted.global_rank}.pt")
    (options.out / f"rank{fitted.global_rank}.json").write_text(json.dumps(result))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
