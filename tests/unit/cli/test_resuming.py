from pathlib import Path

import pytest
import torch

from thanos_lightning.cli.training import content_of


def test_a_checkpoint_that_a_killed_save_has_set_aside_is_found(tmp_path: Path) -> None:
    content = {"state_dict": {}, "global_step": 3, "pytorch-lightning_version": "2.6.0"}
    torch.save(content, tmp_path / ".last.ckpt.old")
    assert content_of(str(tmp_path / "last.ckpt"))["global_step"] == 3
    (tmp_path / ".sharded.ckpt.old").mkdir()
    (tmp_path / ".sharded.ckpt.old" / ".metadata").touch()
    assert content_of(str(tmp_path / "sharded.ckpt")) == {}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "sharded.ckpt"]
    with pytest.raises(FileNotFoundError, match=r"other\.ckpt does not exist"):
        content_of(str(tmp_path / "other.ckpt"))
