"""One rank that takes trainings as they come.

Each line that it reads is a JSON object: the module that trains ("training" or "teaching"), its cases, and the file to
make when they are done. What raises ends the process.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path


def main(tasks: str) -> None:
    with Path(tasks).open() as lines:
        for line in lines:
            task = json.loads(line)
            importlib.import_module(task["module"]).train_all(task["cases"])
            Path(task["done"]).touch()
