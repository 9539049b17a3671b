"""What some tests need of the machine."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest

REQUIRE_ALL = "THANOS_REQUIRE_ALL"  # set in CI


def without(missing: str) -> NoReturn:
    """Skip what can't run on this machine, or fail where nothing may be skipped."""
    if os.environ.get(REQUIRE_ALL) == "1":
        pytest.fail(f"{missing}; {REQUIRE_ALL}=1 says that nothing may be skipped")
    pytest.skip(missing)
