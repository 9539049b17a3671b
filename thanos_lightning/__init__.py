"""Prune language models with the Thanos solver while they are fine-tuned with Lightning."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thanos_lightning.callback import ThanosPruningCallback
    from thanos_lightning.checkpoints.export import export_checkpoint
    from thanos_lightning.checkpoints.verify import verify_checkpoint
    from thanos_lightning.layers.feedforward import FeedForward
    from thanos_lightning.layers.lora import mask_adapters
    from thanos_lightning.plan.allocation import Allocation
    from thanos_lightning.plan.options import CalibrationOptions, TargetOverride
    from thanos_lightning.plan.schedule import SparsitySchedule
    from thanos_lightning.ranks.cpu_deepspeed import CPUDeepSpeed
    from thanos_lightning.solver.layer import SolverOptions

_ROOMS = {
    "Allocation": "plan.allocation",
    "CPUDeepSpeed": "ranks.cpu_deepspeed",
    "CalibrationOptions": "plan.options",
    "FeedForward": "layers.feedforward",
    "SolverOptions": "solver.layer",
    "SparsitySchedule": "plan.schedule",
    "TargetOverride": "plan.options",
    "ThanosPruningCallback": "callback",
    "export_checkpoint": "checkpoints.export",
    "mask_adapters": "layers.lora",
    "verify_checkpoint": "checkpoints.verify",
}

__all__ = [
    "Allocation",
    "CPUDeepSpeed",
    "CalibrationOptions",
    "FeedForward",
    "SolverOptions",
    "SparsitySchedule",
    "TargetOverride",
    "ThanosPruningCallback",
    "export_checkpoint",
    "mask_adapters",
    "verify_checkpoint",
]


def __getattr__(name: str) -> Any:
    # the callback imports Lightning, which takes seconds; `thanos-lightning verify` and the solver need none of it
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_ROOMS[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_ROOMS]
