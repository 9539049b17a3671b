from pathlib import Path
from typing import Any

import pytest
import torch

from thanos_lightning import CPUDeepSpeed
from thanos_lightning.ranks.choice import sharding_config


def zero_of(**arguments: Any) -> Any:
    config = sharding_config(CPUDeepSpeed(**arguments), torch.bfloat16)
    return config and config["zero_optimization"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_sharded_model_is_fetched_like_the_one_that_is_trained_in_its_own_dtype(dtype: torch.dtype) -> None:
    strategy = CPUDeepSpeed(stage=3)
    strategy.config["zero_optimization"]["stage3_param_persistence_threshold"] = 7
    config: Any = sharding_config(strategy, dtype)
    assert config["zero_optimization"]["stage3_param_persistence_threshold"] == 7
    assert config["bf16"]["enabled"] == (dtype == torch.bfloat16)
    assert config["fp16"]["enabled"] == (dtype == torch.float16)


@pytest.mark.parametrize("device", ["cpu", "nvme"])
def test_a_sharded_model_waits_in_the_cpus_memory_where_the_trained_one_is_offloaded(
    device: str, tmp_path: Path
) -> None:
    # DeepSpeed empties the folder on NVMe for each model that it offloads there
    zero = zero_of(
        offload_parameters=True, offload_optimizer=True, offload_params_device=device, nvme_path=str(tmp_path)
    )
    assert zero["offload_param"] == {"device": "cpu", "pin_memory": False}
