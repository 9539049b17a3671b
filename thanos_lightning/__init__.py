"""Prune language models with the Thanos solver while they are fine-tuned with Lightning."""

from thanos_lightning.callback import ThanosPruningCallback
from thanos_lightning.schedule import SparsitySchedule
from thanos_lightning.targets import TargetOverride

__all__ = ["SparsitySchedule", "TargetOverride", "ThanosPruningCallback"]
