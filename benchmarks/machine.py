"""What the benchmarks run on, and where their results are kept. Run with a device, it prints the hardware's name."""

import argparse
import json
import platform
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, library
from torch.nn import functional

_overridden: list[library.Library] = []  # an override ends with the object that made it


def multiply_bf16_in_fp32() -> bool:
    """Multiply bf16 matrices as fp32 ones where the CPU cannot, and round the products to bf16.

    Hardware for bf16 sums in fp32, too, so that results differ in the order of the sum only. Without that hardware
    a training step of 1,024 tokens of SmolLM2-135M took one thread 37 s with PyTorch's own products, with these 10 s.
    Attention is computed in fp32 from rounded queries, keys and values.

    Returns:
        Whether it does; not on CPUs that have the instructions, or that don't say so.
    """
    cpuinfo = Path("/proc/cpuinfo")
    flags = re.search(r"^flags\s*:(.+)", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    if flags is None or {"avx512_bf16", "amx_bf16"} & set(flags[1].split()):
        return False
    override = library.Library("aten", "IMPL")

    def product(name: str) -> None:
        by_out = getattr(torch, name)  # with out= it is another operator, which is not overridden

        def multiply(a: Tensor, b: Tensor) -> Tensor:
            out = torch.empty(*a.shape[:-1], b.shape[-1], dtype=torch.float32 if a.dtype == torch.bfloat16 else a.dtype)
            result: Tensor = by_out(a.to(out.dtype), b.to(out.dtype), out=out)
            return result.to(a.dtype)

        override.impl(name, multiply, "CPU")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that these are overridden
        product("mm")
        product("bmm")
    attend = functional.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
        if not torch.is_autocast_enabled("cpu"):
            return attend(query, key, value, attn_mask, **options)
        dtype = torch.get_autocast_dtype("cpu")
        rounded = (tensor.to(dtype).float() for tensor in (query, key, value))
        if attn_mask is not None and attn_mask.is_floating_point():
            attn_mask = attn_mask.float()
        with torch.autocast("cpu", enabled=False):
            return attend(*rounded, attn_mask, **options).to(dtype)

    functional.scaled_dot_product_attention = attention  # type: ignore[assignment]
    _overridden.append(override)
    return True


def add_device(parser: argparse.ArgumentParser) -> None:
    """Let the user choose what to measure on."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="to measure on")


def hardware(device: str = "cpu") -> dict[str, Any]:
    """What the timings depend on."""
    if device == "cuda":
        return {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (found := re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())):
        cpu = found[1].strip()
    machine: dict[str, Any] = {"cpu": cpu, "threads": torch.get_num_threads(), "torch": torch.__version__}
    return machine | {"bf16": "by fp32"} if _overridden else machine


def named(device: str = "cpu") -> str:
    """The hardware's name in files."""
    machine = hardware(device)
    what = machine["gpu"] if device == "cuda" else f"{machine['cpu']} {machine['threads']} threads"
    return re.sub(r"[^A-Za-z0-9.]+", "-", f"{what} torch {machine['torch']}").strip("-").lower()


def keep(name: str, folder: Path, document: dict[str, Any], device: str = "cpu") -> Path:
    """Write results to a JSON file that is named after the benchmark and the hardware. Returns the file."""
    path = folder / (re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-").lower() + f"-{named(device)}.json")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"hardware": hardware(device), **document}, indent=2) + "\n")
    return path


if __name__ == "__main__":
    print(named(*sys.argv[1:]))
