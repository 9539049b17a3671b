import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch.utils.cpp_extension
from torch.utils.file_baton import FileBaton

from thanos_lightning.ranks import starting as extensions
from thanos_lightning.ranks.starting import announce_builds


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, impatient: None) -> Path:
    """Where the extension `one` is built, with nobody patient."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(extensions, "_PATIENCE", 0.0)
    monkeypatch.setattr(extensions, "_BETWEEN_LOOKS", 0.01)
    (tmp_path / "one").mkdir()
    return tmp_path / "one"


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The extensions that torch has been asked for, instead of a minute of compiling."""
    names: list[str] = []

    def load(name: str, *args: Any, **kwargs: Any) -> str:
        names.append(name)
        return "extension"

    monkeypatch.setattr(torch.utils.cpp_extension, "load", load)
    announce_builds()
    announce_builds()  # does nothing more
    return names


def test_a_lock_that_nobody_holds_is_named_with_the_mend(
    folder: Path, built: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lock, said = folder / "lock", []
    lock.touch()

    def follow(advice: str) -> None:
        assert not built
        said.append(advice)
        subprocess.run(advice.rpartition(": ")[2].split(), check=True)

    monkeypatch.setattr(extensions, "rank_zero_warn", follow)
    assert torch.utils.cpp_extension.load("one", []) == "extension"
    assert said[0].startswith(f"{lock} is a lock that no process of this machine holds: ")
    assert len(said) == 1
    assert built == ["one"]
    assert f"Building the extension one in {folder}" in capsys.readouterr().err


def test_a_lock_that_another_process_holds_is_waited_for(
    folder: Path, built: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extensions, "rank_zero_warn", lambda advice: pytest.fail(advice))
    with (folder / "lock").open("w") as lock:
        other = subprocess.Popen(["sleep", "600"], stdin=lock)
    looks: list[bool] = []
    is_held = extensions._is_held

    def look(lock: Path) -> bool:
        looks.append(is_held(lock))
        if len(looks) == 3:
            lock.unlink()  # as at the end of a build
        return looks[-1]

    monkeypatch.setattr(extensions, "_is_held", look)
    try:
        torch.utils.cpp_extension.load("one", [])
    finally:
        other.kill()
        other.wait()
    assert looks == [True] * 3
    assert built == ["one"]


def test_torch_has_its_lock_open_while_it_builds(tmp_path: Path) -> None:
    baton = FileBaton(str(tmp_path / "lock"))
    assert baton.try_acquire()
    assert extensions._is_held(tmp_path / "lock")
    baton.release()
    (tmp_path / "lock").touch()
    assert not extensions._is_held(tmp_path / "lock")
