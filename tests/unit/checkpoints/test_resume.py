"""No code of a stranger's runs when a checkpoint is loaded, whatever reads it."""

import os
import pickle
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpoint_cases import change_a_byte
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy
from toy import Stranger

from thanos_lightning.checkpoints.foreign import check_shards
from thanos_lightning.checkpoints.resume import guard_resume


class _Shards(SingleDeviceStrategy):
    """Loads a folder as ModelParallelStrategy does, on one rank."""

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        state: dict[str, Any] = {"weight": torch.zeros(3), "rate": 0.0}
        dcp.load(state, checkpoint_id=checkpoint_path, no_dist=True)
        return state


pytestmark = [  # torch's, of one process
    pytest.mark.filterwarnings(f"ignore:{message}") for message in ("torch.distributed is dis", "Detected an existing")
]


def save(state: dict[str, Any], folder: Path) -> None:
    """Without copies from a device, which torch would look for where another test pretends to have one."""
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder, per_thread_copy_ahead=0), no_dist=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """As FSDP2 writes it: a tensor, and a number as bytes."""
    save({"weight": torch.ones(3), "rate": 0.5}, tmp_path / "a.ckpt")
    return tmp_path / "a.ckpt"


def guarded(strategy: Strategy) -> Strategy:
    guard_resume(strategy)
    guard_resume(strategy)
    return strategy


@pytest.mark.parametrize("name", [".metadata", "__0.metadata"])
def test_what_torch_unpickles_of_shards(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / name).write_bytes(pickle.dumps(Stranger(tmp_path / "made")))
    with pytest.raises(
        (ValueError, MisconfigurationException), match=rf"{name} holds objects that are not plain .*pathlib"
    ):
        guarded(_Shards()).load_checkpoint(folder)
    assert not (tmp_path / "made").exists()


def test_what_torch_unpickles_of_a_shard(folder: Path, tmp_path: Path) -> None:
    loaded = guarded(_Shards()).load_checkpoint(folder)
    assert (loaded["weight"].tolist(), loaded["rate"]) == ([1.0] * 3, 0.5)
    save({"weight": torch.ones(3), "rate": Stranger(tmp_path / "made")}, folder)
    with pytest.raises(MisconfigurationException, match=r"a.ckpt holds objects that are not plain .*weights_only fal"):
        guarded(_Shards()).load_checkpoint(folder)
    assert not (tmp_path / "made").exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
    guarded(_Shards()).load_checkpoint(folder, weights_only=False)
    assert (tmp_path / "made").exists()


@pytest.mark.parametrize("weights_only", [None, False])
def test_a_changed_byte(tmp_path: Path, weights_only: bool | None) -> None:
    file = tmp_path / "a.ckpt"
    torch.save({"weight": torch.ones(100)}, file)
    strategy = guarded(SingleDeviceStrategy(torch.device("cpu")))
    assert strategy.load_checkpoint(file, weights_only=weights_only)["weight"].sum() == 100
    change_a_byte(file)
    with pytest.raises(ValueError, match=r"a\.ckpt is damaged: some of its bytes are not those"):
        strategy.load_checkpoint(file, weights_only=weights_only)


@pytest.mark.parametrize("name", ["../a.distcp", "/dev/zero", "", "pipe"])
def test_shards_lie_in_the_folder(folder: Path, name: str) -> None:
    os.mkfifo(folder / "pipe")
    content = pickle.loads((folder / ".metadata").read_bytes())
    for stored in content.storage_data.values():
        stored.relative_path = name
    (folder / ".metadata").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=r"which would be a path|no regular file"):
        check_shards(folder)


@pytest.mark.parametrize("content", [b"", b"\x80garbage", pickle.dumps({}), pickle.dumps([1] * 9)])
def test_damaged_metadata(folder: Path, content: bytes) -> None:
    (folder / ".metadata").write_bytes(content)
    with pytest.raises(ValueError, match=r"\.metadata is damaged: take another"):
        guarded(_Shards()).load_checkpoint(folder)


def test_a_url_runs_no_code_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning would say weights_only=False for it."""
    torch.save(Stranger(tmp_path / "made"), tmp_path / "a.ckpt")

    def downloaded(url: str, weights_only: bool, **_: Any) -> Any:
        assert not weights_only
        return torch.load(tmp_path / "a.ckpt", weights_only=weights_only)

    there = types.SimpleNamespace(exists=lambda _: True)
    monkeypatch.setattr("lightning.fabric.plugins.io.torch_io.get_filesystem", lambda _: there)
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", downloaded)
    with pytest.raises(MisconfigurationException, match=r"holds objects that are not plain values"):
        guarded(SingleDeviceStrategy()).load_checkpoint("https://example.com/a.ckpt")
    assert not (tmp_path / "made").exists()


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"a.ckpt is no regular file"):
        guarded(SingleDeviceStrategy()).load_checkpoint(tmp_path / "a.ckpt")
