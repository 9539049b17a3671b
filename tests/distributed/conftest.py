"""The ranks that take the trainings of all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def pools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    import ranks  # here, since pytest-xdist's own process reads this file, too

    ranks.FOLDER = tmp_path_factory.mktemp("trained")
    yield
    ranks.end_pools()
