import os
import resource
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from lightning.pytorch.strategies import SingleDeviceStrategy

from thanos_lightning.checkpoints.save import WholeFiles, save_whole
from thanos_lightning.ranks.talk import PruningError

CONTENT = {"weight": torch.ones(10_000)}


def test_a_file_that_does_not_fit_leaves_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    WholeFiles().save_checkpoint({"step": 1}, path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, limits[1]))  # a full disk, for who isn't root
    try:
        with pytest.raises(PruningError, match=r"a[.]ckpt can't be written .*, and nothing was left"):
            WholeFiles().save_checkpoint(CONTENT, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [file.name for file in tmp_path.iterdir()] == ["a.ckpt"]
    assert torch.load(path, weights_only=True) == {"step": 1}


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PruningError, match=r"Not a directory|File exists"):
        WholeFiles().save_checkpoint(CONTENT, tmp_path / "file" / "a.ckpt")


class Killing:
    """Ends the process that saves it."""

    def __reduce__(self) -> tuple[object, ...]:
        os._exit(9)


def test_what_a_killed_save_leaves_goes_with_the_next_one(tmp_path: Path) -> None:
    WholeFiles().save_checkpoint({"step": 1}, tmp_path / "a.ckpt")
    if not (child := os.fork()):
        WholeFiles().save_checkpoint({**CONTENT, "step": Killing()}, tmp_path / "a.ckpt")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert len(list(tmp_path.iterdir())) == 2
    WholeFiles().save_checkpoint({"step": 2}, tmp_path / "b.ckpt")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.ckpt", "b.ckpt"]
    assert torch.load(tmp_path / "a.ckpt", weights_only=True) == {"step": 1}


def test_means_of_ones_own_stay() -> None:
    trainer = Trainer(accelerator="cpu", logger=False)
    assert type(trainer.strategy.checkpoint_io) is TorchCheckpointIO
    save_whole(trainer.strategy)
    assert type(trainer.strategy.checkpoint_io) is WholeFiles
    own = SingleDeviceStrategy(torch.device("cpu"), checkpoint_io=AsyncCheckpointIO(TorchCheckpointIO()))
    save_whole(own)
    assert type(own.checkpoint_io) is AsyncCheckpointIO
