"""Shape and dtype checks for the solver; one thread, for the same rounding on each machine; no deadlines; --rest."""

from __future__ import annotations

import gc
import os
import sys

import psutil
import pytest
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

# Has to come before the first import of the solver; without the hook its annotations cost nothing.
install_import_hook("thanos_lightning.solver", "beartype.beartype")

# A busy machine takes its time, for examples as well as for drawing them
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

LONGEST = ("test_zero.py", "test_zero_checkpoints.py")  # of --rest
MEMORY_EACH = 4 * 2**30  # bytes for a process with the ranks that its tests start


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("dist", "no") == "no":  # the process that hands out tests to others need not import it
        import torch

        torch.set_num_threads(1)


def pytest_xdist_auto_num_workers() -> int:
    """As many processes as there are cores and memory for."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, min(cores, psutil.virtual_memory().available // MEMORY_EACH))


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
        items[:] = sorted(chosen, key=lambda item: item.path.name not in LONGEST)
        config.hook.pytest_deselected(items=left_out)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Keep what is imported by now out of the garbage collector's rounds, which take a second with it."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if not config.getoption("rest"):
        terminalreporter.write_line(
            "tests that are marked rest are left out here: the same command with --rest runs them"
        )
