"""Nodes save one folder: on a disk that all of them see, or each on its own."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from ranks import start

from thanos_lightning.checkpoints.save import save_whole


class Nodes:
    """What a save asks of a strategy. Each rank is a node of its own."""

    def __init__(self) -> None:
        self.global_rank, self.world_size, self.local_rank = dist.get_rank(), dist.get_world_size(), 0
        self.is_global_zero = self.global_rank == 0

    def broadcast(self, value: Any) -> Any:
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    def barrier(self) -> None:
        dist.barrier()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Path, storage_options: Any = None) -> None:
        filepath.mkdir(parents=True, exist_ok=True)
        (filepath / f"rank{self.global_rank}").write_text(str(checkpoint["step"]))

    def load_checkpoint(self, checkpoint_path: Path) -> dict[str, Any]:
        return {"step": int((checkpoint_path / f"rank{self.global_rank}").read_text())}


def see_as_over_nfs() -> None:
    """Let every folder that this process has written to seem to stay where it was, as an attribute cache does."""
    seen: set[Path] = set()
    really_exists, really_make = Path.exists, Path.mkdir

    def make(path: Path, *args: Any, **kwargs: Any) -> None:
        seen.add(path)
        really_make(path, *args, **kwargs)

    Path.mkdir = make  # type: ignore[assignment]
    Path.exists = lambda path: path in seen or really_exists(path)  # type: ignore[assignment]


def main(told: str) -> None:
    """Save a folder twice on one rank of several nodes, and note in seen<rank>.json what is on its disk at the end.

    A case has the folder `out`, and `disks`, by rank: ranks with the same number see the same files, and `first` has
    one of them for each disk. Each rank writes a file.
    """
    case = json.loads(Path(told).read_text())
    rank = int(os.environ["RANK"])
    disk = Path(case["out"]) / f"disk{case['disks'][rank]}"
    disk.mkdir(exist_ok=True)
    os.chdir(disk)  # a relative path is another one on another disk
    dist.init_process_group("gloo")
    see_as_over_nfs()
    nodes: Any = Nodes()
    save_whole(nodes, shards=True)
    for step in range(2):
        nodes.save_checkpoint({"step": step}, Path("checkpoints") / "last.ckpt")
    dist.barrier()
    if rank in case["first"]:  # as if it was killed between two renames
        (Path("checkpoints") / "last.ckpt").rename(Path("checkpoints") / ".last.ckpt.old")
    dist.barrier()
    assert nodes.load_checkpoint(Path("checkpoints") / "last.ckpt") == {"step": 1}
    dist.barrier()
    files = {str(file.relative_to(disk)): file.read_text() for file in disk.rglob("*") if file.is_file()}
    (disk.parent / f"seen{rank}.json").write_text(json.dumps(files))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("disks", [[0, 0, 1], pytest.param([0, 1, 1], marks=pytest.mark.rest)])
def test_nodes_save_to_disks_that_they_share_or_have(tmp_path: Path, disks: list[int]) -> None:
    """A node whose cache still has names that are gone does not take a disk that it shares for its own.

    What a killed save has set aside is found.
    """
    out = tmp_path / "out"
    first = [disks.index(disk) for disk in set(disks)]
    ended = start(out, [{"out": str(out), "disks": disks, "first": first}], len(disks), run="test_saving")
    assert ended.codes == [0] * len(disks), "\n".join(text[-3000:] for text in ended.outputs)
    for rank, disk in enumerate(disks):
        there = [other for other, own in enumerate(disks) if own == disk]
        files = json.loads((out / f"seen{rank}.json").read_text())
        assert files == {f"checkpoints/last.ckpt/rank{other}": "1" for other in there}
