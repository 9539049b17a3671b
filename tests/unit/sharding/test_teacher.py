from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn

from thanos_lightning import CPUDeepSpeed
from thanos_lightning.sharding.teacher import copy_to_frozen, frozen_state, place_frozen, sharding_config

CPU = SingleDeviceStrategy(torch.device("cpu"))


def make(dtype: torch.dtype = torch.float32) -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    return model.to(dtype).eval().requires_grad_(False)


def test_a_copy_has_the_weights_and_buffers_in_its_own_dtype() -> None:
    own, frozen = make(), make(torch.bfloat16)
    own[1].running_mean.copy_(torch.rand(4))
    assert place_frozen(frozen, CPU, frozen[0]) is frozen
    copy_to_frozen(own, frozen, CPU)
    for name, values in frozen_state(frozen, CPU).items():
        expected = own.state_dict()[name]
        assert torch.equal(values, expected.bfloat16() if expected.is_floating_point() else expected)
    assert frozen[0].weight.dtype == torch.bfloat16


def test_a_parameter_that_is_tied_no_more_is_named() -> None:
    own, frozen = make(), make()
    own.head = nn.Linear(3, 4)
    with pytest.raises(MisconfigurationException, match=r"the teacher has no head\.weight, .*fully_shard on the list"):
        copy_to_frozen(own, frozen, CPU)


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
