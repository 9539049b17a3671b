"""Resolves `precision: auto` to a precision in which the device trains fast."""

from __future__ import annotations

from typing import Any, Final

import torch

AUTO: Final = "auto"
# torch's own tests of a CPU, which also work without /proc
_CPU_INSTRUCTIONS = {"_is_amx_tile_supported": "AMX", "_is_avx512_bf16_supported": "AVX512-BF16"}


def fast_precision(accelerator: Any) -> tuple[str, str]:
    """Return a `precision` for the Trainer's `accelerator`, and the reason as the end of a sentence.

    The choice depends on the device's features and not on a measurement, so that ranks on machines of one kind agree.
    """
    if accelerator in ("gpu", "cuda", AUTO) and torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        if all(_multiplies_bf16(device) for device in range(torch.cuda.device_count())):
            return "bf16-mixed", f"this GPU multiplies bf16 ({name})"
        return "16-mixed", f"this GPU multiplies fp16, but not bf16 ({name})"
    if accelerator == "cpu" or (accelerator == AUTO and not torch.backends.mps.is_available()):
        known = [name for test, name in _CPU_INSTRUCTIONS.items() if getattr(torch.cpu, test)()]
        if known:
            return "bf16-mixed", f"this CPU multiplies bf16 ({known[0]})"
        return "32-true", f"this CPU has no instructions for bf16 ({' or '.join(_CPU_INSTRUCTIONS.values())})"
    return "32-true", "nothing faster is known to work on this device"


def _multiplies_bf16(device: int) -> bool:
    """Whether a GPU has units for bf16. On older GPUs torch emulates bf16."""
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
