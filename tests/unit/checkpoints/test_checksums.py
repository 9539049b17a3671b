"""Bytes that change on a disk are noticed before they are used."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_cases import change_a_byte
from toy import ToyLM, loader, trainer

from thanos_lightning import CalibrationOptions, SparsitySchedule, ThanosPruningCallback
from thanos_lightning.checkpoints.foreign import require_intact
from thanos_lightning.cli import main


@pytest.mark.parametrize("at", [0.3, 0.6, 0.97])
def test_a_changed_byte_anywhere_is_noticed(tmp_path: Path, at: float) -> None:
    file = tmp_path / "a.pt"
    torch.save({"weight": torch.randn(300, 300), "step": 3}, file)
    require_intact(file)

    change_a_byte(file, at)

    with pytest.raises(ValueError, match=r"a\.pt is damaged: some of its bytes are not those that were written"):
        require_intact(file)


def test_a_file_without_checksums_passes(tmp_path: Path) -> None:
    file = tmp_path / "old.pt"
    torch.save(torch.ones(3), file, _use_new_zipfile_serialization=False)
    require_intact(file)


def pruning() -> ThanosPruningCallback:
    return ThanosPruningCallback("2:4", schedule=SparsitySchedule(1, 1, 1), calibration=CalibrationOptions(steps=1))


def test_a_changed_checkpoint_is_neither_verified_nor_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, file = tmp_path / "whole.ckpt", tmp_path / "changed.ckpt"
    fitted = trainer(tmp_path, pruning(), max_steps=2)
    fitted.fit(ToyLM(), loader(8))
    fitted.save_checkpoint(whole)
    shutil.copy(whole, file)
    assert main(["verify", str(whole)]) == 0

    change_a_byte(file)

    torch.load(file, weights_only=True)  # which notices nothing
    for command in (["verify", str(file)], ["export", str(file), str(tmp_path / "out")]):
        assert main(command) == 2
        assert "changed.ckpt is damaged: some of its bytes" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(Exception, match=r"changed\.ckpt is damaged: some of its bytes"):
        trainer(tmp_path, pruning(), max_steps=4).fit(ToyLM(), loader(16), ckpt_path=file)
    trainer(tmp_path, pruning(), max_steps=4).fit(ToyLM(), loader(16), ckpt_path=whole)
