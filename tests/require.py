"""What some tests need of the machine, and which of them run without --rest."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NoReturn

import pytest

REQUIRE_ALL = "THANOS_REQUIRE_ALL"  # set in CI


def without(missing: str) -> NoReturn:
    """Skip what can't run on this machine, or fail where nothing may be skipped."""
    if os.environ.get(REQUIRE_ALL) == "1":
        pytest.fail(f"{missing}; {REQUIRE_ALL}=1 says that nothing may be skipped")
    pytest.skip(missing)


def only(chosen: Collection[Any], cases: Iterable[Any] | Mapping[str, Any]) -> list[Any]:
    """The cases (of a table the values, by name) as parameters of a test; all but the chosen are left to --rest."""
    named = cases.items() if isinstance(cases, Mapping) else ((case, case) for case in cases)
    return [
        pytest.param(case, id=name if case is not name else None, marks=() if name in chosen else pytest.mark.rest)
        for name, case in named
    ]
