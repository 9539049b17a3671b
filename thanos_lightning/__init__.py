"""Prune language models with the Thanos solver while they are fine-tuned with Lightning."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thanos_lightning.callback import ThanosPruningCallback
    from thanos_lightning.schedule import SparsitySchedule
    from thanos_lightning.strategies import CPUDeepSpeed
    from thanos_lightning.targets import TargetOverride

_ROOMS = {
    "CPUDeepSpeed": "strategies",
    "SparsitySchedule": "schedule",
    "TargetOverride": "targets",
    "ThanosPruningCallback": "callback",
}

__all__ = ["CPUDeepSpeed", "SparsitySchedule", "TargetOverride", "ThanosPruningCallback"]


def __getattr__(name: str) -> Any:
    # the callback imports Lightning, which takes seconds; `thanos-lightning verify` and the solver need none of it
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_ROOMS[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_ROOMS]
