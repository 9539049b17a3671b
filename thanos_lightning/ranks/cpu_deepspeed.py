"""A strategy to rehearse DeepSpeed training on a machine without GPUs."""

from __future__ import annotations

from typing import Any

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.strategies.parallel import ParallelStrategy
from typing_extensions import override

from thanos_lightning.ranks.starting import announce_builds


class CPUDeepSpeed(DeepSpeedStrategy):
    """DeepSpeed ZeRO on CPUs, over gloo: to try a recipe on a laptop before the cluster.

    Lightning's own strategy refuses CPUs, although DeepSpeed trains on them. The partitions, the fp32 masters and the
    checkpoints are the same as on GPUs; training is only slower. DeepSpeed builds a small C++ extension at the first
    use, so a compiler is needed.

    Args:
        stage: ZeRO 0 (nothing is sharded), 1 (optimizer state), 2 (gradients too) or 3 (parameters too).
        **kwargs: As for Lightning's `DeepSpeedStrategy`.

    Examples:
        >>> from lightning.pytorch import Trainer
        >>> from thanos_lightning import CPUDeepSpeed
        >>> trainer = Trainer(accelerator="cpu", devices=2, strategy=CPUDeepSpeed(stage=3))  # doctest: +SKIP
    """

    def __init__(self, stage: int = 3, **kwargs: Any) -> None:
        super().__init__(stage=stage, process_group_backend=kwargs.pop("process_group_backend", "gloo"), **kwargs)

    @property
    @override
    def root_device(self) -> torch.device:
        return torch.device("cpu", 0)  # DeepSpeed asks for an index

    @override
    def setup_environment(self) -> None:
        # DeepSpeedStrategy's own method is skipped: it only adds the refusal of CPUs.
        super(DeepSpeedStrategy, self).setup_environment()

    @override
    def setup_distributed(self) -> None:
        assert isinstance(self, ParallelStrategy)
        reset_seed()
        self.set_world_ranks()
        announce_builds()
        self._init_deepspeed_distributed()
