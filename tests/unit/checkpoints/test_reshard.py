from pathlib import Path

import pytest
import torch

from thanos_lightning.checkpoints.reshard import _convert, _require_names

FULL = "[enforce fail at inline_container.cc:672] . unexpected pos 538062784 vs 538062672"  # of a real full disk


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError(FULL), r"can't be written \(.*unexpected pos.*make room"),
        (OSError(28, "No space left on device"), r"can't be written \(.*No space.*make room"),
        (KeyError("exp_avg"), r"could not convert .*knows the moments of Adam"),
    ],
)
def test_a_full_disk_is_told_from_what_can_not_be_converted(
    error: Exception, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converter = pytest.importorskip("deepspeed.checkpoint.ds_to_universal")

    def fail(_: object) -> None:
        raise error

    monkeypatch.setattr(converter, "main", fail)
    with pytest.raises(ValueError, match=message):
        _convert(tmp_path, tmp_path / "universal", processes=1)


@pytest.mark.parametrize(
    "content",
    [
        {"param_shapes": [{"../../escaped": (2, 2)}]},
        {"optimizer_state_dict": {"param_slice_mappings": [{"up.weight": 1}, {"/escaped": 2}]}},
    ],
)
def test_the_name_of_a_parameter_is_no_path(content: dict[str, object], tmp_path: Path) -> None:
    """DeepSpeed makes a folder of it."""
    torch.save(content, tmp_path / "states.pt")
    with pytest.raises(ValueError, match=r"states.pt has the name '.*escaped', which would be a path"):
        _require_names(tmp_path / "states.pt")
