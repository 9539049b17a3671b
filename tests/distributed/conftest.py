"""The ranks that take the trainings of all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import ranks


@pytest.fixture(scope="session", autouse=True)
def pools() -> Iterator[None]:
    yield
    ranks.end_pools()
