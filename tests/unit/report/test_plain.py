"""Values of a file as the types that they have to be of."""

import math
from dataclasses import dataclass
from typing import Any

import pytest

from thanos_lightning.report.plain import read_as


@dataclass
class Point:
    place: tuple[int, int]
    name: str | None = None


@pytest.mark.parametrize(
    ("kind", "value", "read"),
    [
        (float, 3, 3.0),
        (float, None, pytest.approx(math.nan, nan_ok=True)),  # of which JSON knows nothing
        (float | None, None, None),
        (tuple[int, ...], [1, 2, 3], (1, 2, 3)),
        (list[Point], [{"place": [1, 2]}], [Point((1, 2))]),
        (dict[str, Any], {"a": [None]}, {"a": [None]}),
        (bool, True, True),
    ],
)
def test_what_is_right(kind: Any, value: Any, read: Any) -> None:
    assert read_as(kind, value, "it") == read


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        (int, True, "it is True, not a whole number"),
        (int, 1.0, "it is 1.0, not a whole number"),
        (int, 2**63, "it is 9223372036854775808, not a whole number of at most 63 bits"),
        (float, 10**400, "not a number"),
        (str, "x" * 1001, "it is 'xxx.*', not text of at most 1,000 letters"),
        (list[int], {"a": 1}, "it is {'a': 1}, not a list"),
        (dict[str, int], {1: 1}, "it: a key is 1, not text"),
        (tuple[int, int], [1], r"it is \(1,\), not a list of 2"),
        (Point, {"place": [1, "x"]}, "it: place is 'x', not a whole number"),
        (Point, {}, "it lacks place"),
        (Point, {"place": [1, 2], "more": 1}, "it has 'more', which is not known"),
    ],
)
def test_what_is_wrong(kind: Any, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_as(kind, value, "it")
