import os
import socket
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from thanos_lightning.checkpoints import folders
from thanos_lightning.checkpoints.folders import bring_back, clear, first_free, partial_beside, put_in_place, remove

CHANGES = ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "open", "shutil.rmtree")
KILLED = 9


def forked(work: Callable[[], object]) -> int:
    """The exit code of a child that does this."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        work()
        code = 0
    finally:
        os._exit(code)


def killed_at(number: int, work: Callable[[], object]) -> bool:
    """Whether a process that does this is killed before its system call of that number, from 1, that changes files."""

    def work_until_killed() -> None:
        left = number

        def before(event: str, _: object) -> None:
            nonlocal left
            left -= event in CHANGES
            if left == 0:
                os._exit(KILLED)

        sys.addaudithook(before)
        work()

    code = forked(work_until_killed)
    assert code in (0, KILLED)
    return code == KILLED


def write(folder: Path, text: str) -> None:
    folder.mkdir()
    (folder / "one").write_text(text)
    (folder / "other").write_text(text)


def read(folder: Path) -> set[str]:
    assert len(list(folder.iterdir())) == 2
    return {file.read_text() for file in folder.iterdir()}


def save(path: Path, text: str) -> None:
    """As a strategy does."""
    clear(path)
    partial = partial_beside(path)
    write(partial, text)
    put_in_place(partial, path)


@pytest.fixture(params=["exchanged in one step", "renamed twice"])
def renamed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where the system can exchange two names, and where it can't, as on NFS."""
    (tmp_path / "a").touch()
    (tmp_path / "b").touch()
    if request.param == "renamed twice":
        monkeypatch.setattr(folders, "_exchange", lambda one, other: False)
    elif not folders._exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system exchanges no names")
    (tmp_path / "a").unlink()
    (tmp_path / "b").unlink()


@pytest.mark.usefixtures("renamed")
def test_a_kill_at_any_point_leaves_the_old_folder_or_the_new_one(tmp_path: Path) -> None:
    found, number, killed = [], 0, True
    while killed:
        number += 1
        path = tmp_path / str(number) / "last.ckpt"
        path.parent.mkdir()
        save(path, "old")
        killed = killed_at(number, lambda path=path: save(path, "new"))
        bring_back(path)
        (text,) = read(path)
        found.append(text)
        save(path, "newer")
        assert read(path) == {"newer"}
        assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]
    assert found[0] == "old"
    assert found == sorted(found, reverse=True)  # once it is new, it stays new
    assert found.count("old") > 5
    assert found.count("new") > 2


@pytest.mark.usefixtures("renamed")
def test_the_first_free_name(tmp_path: Path) -> None:
    path = tmp_path / "exported"
    assert first_free(path) == path
    path.mkdir()
    assert first_free(path) == path
    (path / "model").touch()
    (tmp_path / "exported-2").touch()
    assert first_free(path) == tmp_path / "exported-3"


def test_a_folder_takes_a_new_name_or_that_of_a_file(tmp_path: Path) -> None:
    save(tmp_path / "a", "new")
    (tmp_path / "b").write_text("old")
    save(tmp_path / "b", "new")
    assert read(tmp_path / "a") == read(tmp_path / "b") == {"new"}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.usefixtures("renamed")
def test_a_folder_that_can_not_be_renamed_leaves_the_old_one(tmp_path: Path) -> None:
    save(tmp_path / "a", "old")
    with pytest.raises(FileNotFoundError):
        put_in_place(tmp_path / "missing", tmp_path / "a")
    assert read(tmp_path / "a") == {"old"}
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def partials(folder: Path) -> list[str]:
    return [file.name for file in folder.iterdir() if file.name.endswith(".partial")]


def test_what_dead_processes_have_left_is_removed(tmp_path: Path) -> None:
    """Not what living ones write, nor those of other hosts, whose numbers mean nothing here."""

    def leave() -> None:
        partial_beside(tmp_path / "file").write_text("half")
        write(partial_beside(tmp_path / "other.ckpt"), "half")

    assert forked(leave) == 0
    left = partials(tmp_path)
    assert len(left) == 2
    host, unique = socket.gethostname(), uuid.uuid4().hex[:8]
    dead = left[0].split(".")[-3]
    stay = {
        f".file.elsewhere.{dead}.{unique}.partial",  # another host's
        f".file.not{host}.{dead}.{unique}.partial",
        f".file.{host}.{os.getpid()}.{unique}.partial",  # this process writes it
        f".file.{host}.1.{unique}.partial",  # lives, and may be another user's
        ".file.partial",  # somebody else's
    }
    for name in stay:
        (tmp_path / name).touch()
    partial = partial_beside(tmp_path / "step=3.ckpt")
    assert set(partials(tmp_path)) == stay
    assert partial not in (partial_beside(tmp_path / "step=3.ckpt"), tmp_path / "step=3.ckpt")
    clear(tmp_path / "file")  # nobody else may write this folder now
    assert partials(tmp_path) == [".file.partial"]


def test_remove_takes_files_folders_and_what_is_missing(tmp_path: Path) -> None:
    write(tmp_path / "folder", "a")
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    for name in ("link", "file", "missing"):
        remove(tmp_path / name)
    assert read(tmp_path / "folder") == {"a"}
    remove(tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []
