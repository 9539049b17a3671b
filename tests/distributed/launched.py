"""What the tests of launch/ let `thanos-lightning fit` train, and how they read what each process saw."""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from toy import ToyLM, loader
from training import whole_parameters

LAUNCH = Path(__file__).parents[2] / "launch"
RECIPE = """
seed_everything: 1
model: launched.Launched
trainer:
  accelerator: cpu
  precision: bf16-mixed
  strategy: {class_path: thanos_lightning.CPUDeepSpeed, init_args: {stage: 3}}
  max_steps: 4
  max_epochs: -1
  logger: false
  enable_checkpointing: false
  enable_model_summary: false
  callbacks:
    - class_path: thanos_lightning.ThanosPruningCallback
      init_args:
        pattern: "2:4"
        schedule:
          class_path: thanos_lightning.SparsitySchedule
          init_args: {start_step: 0, end_step: 2, every_n_steps: 2}
"""


class Launched(ToyLM):
    """Notes, in a file of each process, who this process is and which weights it ended with."""

    def train_dataloader(self) -> Any:
        return loader(64)

    def on_train_end(self) -> None:
        values = {name: weight.float().numpy() for name, weight in whole_parameters(self).items()}
        noted = {
            "rank": self.trainer.global_rank,
            "local_rank": self.trainer.local_rank,
            "node_rank": self.trainer.node_rank,
            "world_size": self.trainer.world_size,
            "environment": type(self.trainer.strategy.cluster_environment).__name__,
            "zeros": float((values["model.layers.1.mlp.up_proj.weight"] == 0).mean()),
            "digest": hashlib.sha256(b"".join(value.tobytes() for value in values.values())).hexdigest(),
        }
        file = Path(self.trainer.default_root_dir) / f"pid{os.getpid()}-rank{self.trainer.global_rank}.json"
        atexit.register(lambda: file.write_text(json.dumps({**noted, "left": not dist.is_initialized()})))


def prepare(folder: Path) -> tuple[list[str], dict[str, str]]:
    """A recipe in the folder: the arguments that the scripts take, and the environment that they run in."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE)
    tests = Path(__file__).parents[1]
    env = {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join(map(str, (tests, tests / "distributed"))),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PROCESSES": "2",
    }
    return [str(recipe), "--trainer.default_root_dir", str(folder)], env


def check_ranks(folder: Path, places: list[tuple[int, int, int]], environment: str) -> None:
    """Hold what the processes noted, one for each rank, against (rank, local rank, node rank) of two ranks."""
    files = folder.glob("pid*.json")  # of a process that was started twice over there are two
    ranks = sorted((json.loads(file.read_text()) for file in files), key=lambda one: (one["rank"], one["node_rank"]))
    assert [(rank["rank"], rank["local_rank"], rank["node_rank"]) for rank in ranks] == places
    for rank in ranks:
        assert rank["world_size"] == 2
        assert rank["environment"] == environment
        assert rank["zeros"] == 0.5
        assert rank["digest"] == ranks[0]["digest"]
        assert rank["left"]  # the process group: a thread of it may abort a process that ends inside one
