import pytest
import torch

from thanos_lightning.cli.training import fast_precision

NO_BF16 = "this CPU has no instructions for bf16 (AMX or AVX512-BF16)"
AVX512 = "this CPU multiplies bf16 (AVX512-BF16)"
GPU, OLD_GPU = "this GPU multiplies bf16 (its name)", "this GPU multiplies fp16, but not bf16 (its name)"
OTHER = "nothing faster is known to work on this device"


@pytest.mark.parametrize(
    ("accelerators", "instructions", "gpus", "others", "precision", "why"),
    [
        (["cpu", "auto"], (), [], {}, "32-true", NO_BF16),
        (["cpu", "auto"], ("AVX512-BF16",), [], {}, "bf16-mixed", AVX512),
        (["cpu", "auto"], ("AMX", "AVX512-BF16"), [], {}, "bf16-mixed", "this CPU multiplies bf16 (AMX)"),
        (["gpu", "cuda", "auto"], (), [(9, 0)], {}, "bf16-mixed", GPU),
        (["gpu"], (), [(8, 0), (8, 9)], {}, "bf16-mixed", GPU),
        (["gpu", "cuda", "auto"], (), [(7, 5)], {}, "16-mixed", OLD_GPU),
        (["gpu"], (), [(9, 0), (7, 0)], {}, "16-mixed", OLD_GPU),
        (["gpu"], (), [(7, 0)], {"hip": "6.2"}, "bf16-mixed", GPU),
        (["cpu"], (), [(9, 0)], {}, "32-true", NO_BF16),
        (["tpu"], ("AMX",), [], {}, "32-true", OTHER),
        (["auto"], ("AMX",), [], {"mps": True}, "32-true", OTHER),
    ],
)
def test_it_is_that_which_the_device_multiplies_fast(
    monkeypatch, accelerators, instructions, gpus, others, precision, why
):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: "AMX" in instructions)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: "AVX512-BF16" in instructions)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "its name")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: gpus[device])
    monkeypatch.setattr(torch.version, "hip", others.get("hip"))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: others.get("mps", False))
    for accelerator in accelerators:
        assert fast_precision(accelerator) == (precision, why)
