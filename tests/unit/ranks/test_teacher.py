from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from thanos_lightning import CPUDeepSpeed
from thanos_lightning.ranks.choice import sharding_config

CPU = SingleDeviceStrategy(torch.device("cpu"))


def config_of(dtype: torch.dtype = torch.bfloat16, **arguments: Any) -> dict[str, Any] | None:
    return sharding_config(CPUDeepSpeed(**arguments), dtype)


def test_only_stage_3_shards() -> None:
    assert sharding_config(CPU, torch.float32) is None
    assert config_of(stage=2) is None


def test_a_sharded_model_is_fetched_like_the_one_that_is_trained_in_its_own_dtype() -> None:
    strategy = CPUDeepSpeed(stage=3)
    strategy.config["zero_optimization"]["stage3_param_persistence_threshold"] = 7
    config = sharding_config(strategy, torch.bfloat16)
    assert config is not None
    assert config["zero_optimization"]["stage"] == 3
    assert config["zero_optimization"]["stage3_param_persistence_threshold"] == 7
    assert "offload_param" not in config["zero_optimization"]
    assert (config["bf16"]["enabled"], config["fp16"]["enabled"]) == (True, False)
    single = config_of(torch.float32)
    assert single is not None
    assert (single["bf16"]["enabled"], single["fp16"]["enabled"]) == (False, False)


@pytest.mark.parametrize("device", ["cpu", "nvme"])
def test_a_sharded_model_waits_in_the_cpus_memory_where_the_trained_one_is_offloaded(
    device: str, tmp_path: Path
) -> None:
    # DeepSpeed empties the folder on NVMe for each model that it offloads there
    config = config_of(
        offload_parameters=True, offload_optimizer=True, offload_params_device=device, nvme_path=str(tmp_path)
    )
    assert config is not None
    assert config["zero_optimization"]["offload_param"] == {"device": "cpu", "pin_memory": False}
