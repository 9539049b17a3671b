"""One rank that takes trainings as they come: python waiting.py, with RANK and WORLD_SIZE set.

Each line of the standard input is a JSON object: the module that trains ("training" or "teaching"), its cases, and the
file to make when they are done. What raises ends the process.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import torch


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        task = json.loads(line)
        importlib.import_module(task["module"]).train_all(task["cases"])
        Path(task["done"]).touch()


if __name__ == "__main__":
    main()
