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
    ("fit", "status", "said"),
    [
        (_interrupted_as_lightning_does, 130, "interrupted"),
        (lambda: _raise(KeyboardInterrupt()), 130, "interrupted"),
        (lambda: _raise(SIGTERMException()), 143, "ended by SIGTERM"),
        (lambda: _raise(Terminated()), 143, "ended by SIGTERM"),
    ],
)
def test_signals_have_the_status_that_shells_know(
    fit: object, status: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("thanos_lightning.cli.training.train", lambda arguments: fit())  # type: ignore[operator]
    assert main(["fit"]) == status
    assert capsys.readouterr().err == f"thanos-lightning: {said}\n"


def test_other_ends_keep_their_status(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thanos_lightning.cli.training.train", lambda arguments: sys.exit(3))
    with pytest.raises(SystemExit) as ended:
        main(["fit"])
    assert ended.value.code == 3
