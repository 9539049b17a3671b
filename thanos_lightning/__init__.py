"""Prune language models with the Thanos solver while they are fine-tuned with Lightning."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thanos_lightning.allocation import Allocation
    from thanos_lightning.arguments import CalibrationOptions
    from thanos_lightning.callback import ThanosPruningCallback
    from thanos_lightning.export import export_checkpoint
    from thanos_lightning.permutation import permute_channels
    from thanos_lightning.schedule import SparsitySchedule
    from thanos_lightning.solver.layer import SolverOptions
    from thanos_lightning.strategies import CPUDeepSpeed
    from thanos_lightning.targets import TargetOverride
    from thanos_lightning.verification import verify_checkpoint

_ROOMS = {
    "Allocation": "allocation",
    "CPUDeepSpeed": "strategies",
    "CalibrationOptions": "arguments",
    "SolverOptions": "solver.layer",
    "SparsitySchedule": "schedule",
    "TargetOverride": "targets",
    "ThanosPruningCallback": "callback",
    "export_checkpoint": "export",
    "permute_channels": "permutation",
    "verify_checkpoint": "verification",
}

__all__ = [
    "Allocation",
    "CPUDeepSpeed",
    "CalibrationOptions",
    "SolverOptions",
    "SparsitySchedule",
    "TargetOverride",
    "ThanosPruningCallback",
    "export_checkpoint",
    "permute_channels",
    "verify_checkpoint",
]


def __getattr__(name: str) -> Any:
    # the callback imports Lightning, which takes seconds; `thanos-lightning verify` and the solver need none of it
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_ROOMS[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_ROOMS]
