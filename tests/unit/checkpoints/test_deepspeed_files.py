"""Which files of a DeepSpeed checkpoint are read and converted, as far as no rank is needed to write them."""

import sys
import types
from pathlib import Path

import pytest
import torch

from thanos_lightning.checkpoints.deepspeed_files import files_of, load_file, require_end, trusting
from thanos_lightning.checkpoints.reshard import _convert, _require_names


class Mine:
    """An object of a user's."""


def test_a_class_that_is_allowed_is_read(tmp_path: Path) -> None:
    file = tmp_path / "states.pt"
    torch.save({"hparams": Mine()}, file)
    with pytest.raises(ValueError, match=r"not plain values \(.*Mine\).*add_safe_globals"):
        load_file(file)
    with torch.serialization.safe_globals([Mine]):
        assert isinstance(load_file(file)["hparams"], Mine)
    with trusting(True):
        assert isinstance(load_file(file)["hparams"], Mine)


def test_a_trusted_class_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("of_another_machine")
    module.Mine = type("Mine", (), {"__module__": "of_another_machine"})
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "of_another_machine", module)
        torch.save(module.Mine(), tmp_path / "states.pt")
    with trusting(True), pytest.raises(ValueError, match=r"whose class is not to be had here .*of_another_machine"):
        load_file(tmp_path / "states.pt")


def test_a_link_to_a_folder_is_refused(tmp_path: Path) -> None:
    """DeepSpeed goes into it."""
    torch.save(Mine(), tmp_path / "fp32.pt")
    (tmp_path / "a.ckpt" / "checkpoint" / "zero").mkdir(parents=True)
    (tmp_path / "a.ckpt" / "checkpoint" / "zero" / "layer.weight").symlink_to(tmp_path)
    with pytest.raises(ValueError, match=r"layer\.weight is a link to a folder: copy"):
        files_of(tmp_path / "a.ckpt")


@pytest.mark.parametrize("file", ["latest", "latest_universal"])
def test_the_folder_that_deepspeed_would_load_is_the_one_that_is_read(tmp_path: Path, file: str) -> None:
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / file).write_text("../elsewhere\n")
    with pytest.raises(ValueError, match=rf"{file} names the folder '../elsewhere', and Lightning writes into `check"):
        require_end(tmp_path)
    (tmp_path / file).write_text("checkpoint\n")
    require_end(tmp_path)


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
