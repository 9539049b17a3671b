"""What is read of DeepSpeed beside its documents: a name that moved in a new version is a failure here."""

import importlib
import inspect
import re
from types import ModuleType

import pytest

deepspeed = pytest.importorskip("deepspeed")

from deepspeed.runtime import bf16_optimizer, engine  # noqa: E402
from deepspeed.runtime.fp16 import fused_optimizer, unfused_optimizer  # noqa: E402
from deepspeed.runtime.zero import parameter_offload, partition_parameters, stage3, stage_1_and_2  # noqa: E402
from deepspeed.utils import mixed_precision_linkage  # noqa: E402

fragments = importlib.import_module("deepspeed.utils.tensor_fragment")  # its package has a class of that name

NAMES: dict[type | ModuleType, str] = {
    fused_optimizer.FP16_Optimizer: "fp16_groups param_groups optimizer loss_scale",
    unfused_optimizer.FP16_UnfusedOptimizer: "fp16_groups param_groups optimizer",
    bf16_optimizer.BF16_Optimizer: "bf16_groups fp32_groups_flat_partition fp32_groups_gradient_dict optimizer",
    stage_1_and_2.DeepSpeedZeroOptimizer: """single_partition_of_fp32_groups cpu_offload _wait_for_offload_copies
        norm_for_param_grads get_param_id zenflow refresh_fp32_params optimizer""",
    stage3.DeepSpeedZeroOptimizer_Stage3: """fp16_groups fp32_partitioned_groups_flat grad_position get_param_id
        averaged_gradients _swappable_optimizer_subgroup offload_optimizer parameter_offload persistent_parameters
        leaf_parameters partial_offload zenflow refresh_fp32_params optimizer""",
    parameter_offload.DeepSpeedZeRoOffload: "partition_all_parameters fwd_pre_hook get_param_coordinator",
    engine.DeepSpeedEngine: """has_moe_layers autotp_size is_gradient_accumulation_boundary checkpoint_engine _config
        zero_optimization_stage zero_nvme_offload_optimizer optimizer""",
    partition_parameters: "ds_tensor ds_status ds_numel ds_shape partition_numel all_gather",
    fragments: "lp_fragment_address hp_fragment_address param_group_index get_lp_grad_fragment _hp_mapping",
    mixed_precision_linkage: "_index_in_param_group",
    bf16_optimizer: "_index_in_param_group",
}


@pytest.mark.parametrize("where", NAMES, ids=lambda where: where.__name__)
def test_names(where):
    places = where.__mro__[:-1] if inspect.isclass(where) else [where]
    source = "\n".join(inspect.getsource(place) for place in places)
    missing = [name for name in NAMES[where].split() if not re.search(rf"(\.|def |    ){name}\b", source)]
    assert not missing, f"deepspeed {deepspeed.__version__}: {where.__name__} has no {', '.join(missing)}"
