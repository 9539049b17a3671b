"""How adapters are written beside what is exported."""

from pathlib import Path

import pytest
import torch

from thanos_lightning.checkpoints.adapters import write_adapters


@pytest.mark.parametrize("name", ["../../escaped", "/escaped", "..", "", "a/b", "x" * 300])
def test_the_name_of_an_adapter_is_no_path(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "deep" / "out"
    folder.mkdir(parents=True)
    weights = {f"up.{part}.{name}.weight": torch.ones(2, 2) for part in ("lora_A", "lora_B")}
    note = {"layers": {"up": {"transposed": False, "scales": {name: 1.0}}}, "configs": {}, "saved": {}}
    with pytest.raises(ValueError, match=r"a\.ckpt has the name '.*', which would be a path"):
        write_adapters(folder, weights, note, Path("a.ckpt"))
    assert [file.name for file in tmp_path.rglob("*")] == ["deep", "out"]


def test_an_adapter_that_a_checkpoint_lacks_is_named(tmp_path: Path) -> None:
    note = {"layers": {"up": {"transposed": False, "scales": {"own": 1.0}}}, "configs": {}, "saved": {}}
    with pytest.raises(ValueError, match=r"the checkpoint lacks up\.lora_A\.own\.weight"):
        write_adapters(tmp_path, {}, note, Path("a.ckpt"))
