"""Nodes save one folder: on a disk that all of them see, or each on its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ranks import start


@pytest.mark.parametrize("disks", [[0, 0, 1], pytest.param([0, 1, 1], marks=pytest.mark.rest)])
def test_nodes_save_to_disks_that_they_share_or_have(tmp_path: Path, disks: list[int]) -> None:
    """A node whose cache still has names that are gone does not take a disk that it shares for its own.

    What a killed save has set aside is found.
    """
    out = tmp_path / "out"
    first = [disks.index(disk) for disk in set(disks)]
    ended = start(out, [{"out": str(out), "disks": disks, "first": first}], len(disks), run="saving")
    assert ended.codes == [0] * len(disks), "\n".join(text[-3000:] for text in ended.outputs)
    for rank, disk in enumerate(disks):
        there = [other for other, own in enumerate(disks) if own == disk]
        files = json.loads((out / f"seen{rank}.json").read_text())
        assert files == {f"checkpoints/last.ckpt/rank{other}": "1" for other in there}
