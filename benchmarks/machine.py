"""What the benchmarks run on, and where their results are kept."""

import json
import platform
import re
from pathlib import Path
from typing import Any

import torch


def hardware() -> dict[str, str | int]:
    """What the timings depend on."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (found := re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())):
        cpu = found[1].strip()
    return {"cpu": cpu, "threads": torch.get_num_threads(), "torch": torch.__version__}


def keep(name: str, folder: Path, document: dict[str, Any]) -> Path:
    """Write results to a JSON file that is named after the benchmark and the hardware. Returns the file."""
    machine = hardware()
    text = f"{name} {machine['cpu']} {machine['threads']} threads torch {machine['torch']}"
    path = folder / (re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-").lower() + ".json")
    path.write_text(json.dumps({"hardware": machine, **document}, indent=2) + "\n")
    return path
