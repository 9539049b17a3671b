"""The ranks that take the trainings of all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def pools() -> Iterator[None]:
    yield
    import ranks  # here, since pytest-xdist's own process reads this file, too

    ranks.end_pools()
