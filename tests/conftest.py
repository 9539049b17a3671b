"""Shape and dtype checks for the solver; one thread, so that rounding doesn't depend on the machine; --rest."""

from __future__ import annotations

import pytest
import torch
from jaxtyping import install_import_hook

torch.set_num_threads(1)
# Has to come before the first import of the solver; without the hook its annotations cost nothing.
install_import_hook("thanos_lightning.solver", "beartype.beartype")

LEFT_OUT = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rest", action="store_true", help="run the tests that are left out without it, and no others")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run what is marked `rest` with --rest alone; what is named (FILE::TEST) runs in any case."""
    rest = config.getoption("rest")
    chosen, left_out = [], []
    for item in items:
        in_turn = (item.get_closest_marker("rest") is not None) == rest
        (chosen if in_turn or any("::" in name for name in config.args) else left_out).append(item)
    if left_out:
        items[:] = chosen
        config.hook.pytest_deselected(items=left_out)
        config.stash[LEFT_OUT] = len(left_out)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    number = config.stash.get(LEFT_OUT, 0)
    if number and not config.getoption("rest"):
        terminalreporter.write_line(f"{number} tests are left out here, and run by: pytest --rest")
