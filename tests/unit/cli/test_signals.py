from __future__ import annotations

import sys

import pytest
from lightning.pytorch.utilities.exceptions import SIGTERMException

from thanos_lightning.cli import main
from thanos_lightning.report.progress import Terminated


def _interrupted_as_lightning_does() -> None:
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        sys.exit(1)


def _raise(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("fit", "status"),
    [
        (_interrupted_as_lightning_does, 130),
        (lambda: _raise(KeyboardInterrupt()), 130),
        (lambda: _raise(SIGTERMException()), 143),
    ],
)
def test_signals_have_the_status_that_shells_know(
    fit: object, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("thanos_lightning.cli.training.train", lambda arguments: fit())  # type: ignore[operator]
    assert main(["fit"]) == status
    assert capsys.readouterr().err == ("thanos-lightning: interrupted\n" if status == 130 else "")


def test_sigterm_in_a_phase_exits_with_its_status(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thanos_lightning.cli.training.train", lambda arguments: _raise(Terminated()))
    with pytest.raises(SystemExit) as ended:
        main(["fit"])
    assert ended.value.code == 143
