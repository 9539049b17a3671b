import sys
from typing import Any
from unittest.mock import Mock

import pytest
from lightning.pytorch.utilities.exceptions import SIGTERMException

from thanos_lightning.cli import main
from thanos_lightning.report.progress import Terminated


@pytest.mark.parametrize(
    ("error", "before", "status", "said"),
    [
        (SystemExit(1), KeyboardInterrupt(), 130, "interrupted"),  # as Lightning does
        (KeyboardInterrupt(), None, 130, "interrupted"),
        (SIGTERMException(), None, 143, "ended by SIGTERM"),
        (Terminated(), None, 143, "ended by SIGTERM"),
    ],
)
def test_signals_have_the_status_that_shells_know(
    error: BaseException, before: BaseException | None, status: int, said: str, monkeypatch: Any, capsys: Any
) -> None:
    error.__context__ = before
    monkeypatch.setattr("thanos_lightning.cli.training.train", Mock(side_effect=error))
    assert main(["fit"]) == status
    assert capsys.readouterr().err == f"thanos-lightning: {said}\n"


def test_other_ends_keep_their_status(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thanos_lightning.cli.training.train", lambda arguments: sys.exit(3))
    with pytest.raises(SystemExit) as ended:
        main(["fit"])
    assert ended.value.code == 3
