import pytest
import torch
from cases import PATTERNS

from thanos_lightning.solver import NM, Channels, Experts, Structured, Unstructured, parse_pattern


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("2:4",), NM(2, 4)),
        ((" 4:8 ", 0.5, 0.1), NM(4, 8, 0.1)),
        (("2:4", 0.45, 0.1), NM(2, 4, 0.1)),
        (("1:4", 0.75), NM(1, 4)),
        (("Unstructured", 0.6), Unstructured(0.6)),
        (("unstructured", 0.6, 0.0), Unstructured(0.6)),
        (("structured", 0.3, 0.1), Structured(0.3, 0.1)),
        (("channels", 0.3, 0.0), Channels(0.3)),
        (("Experts", 0.3), Experts(0.3)),
        ((NM(2, 4, 0.1), 0.45, 0.1), NM(2, 4, 0.1)),
        ((Unstructured(0.5),), Unstructured(0.5)),
    ],
)
def test_parse_pattern(arguments, expected):
    assert parse_pattern(*arguments) == expected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NM(True, 4), "whole numbers"),
        (lambda: parse_pattern("4:4"), "1 <= n < m"),
        (lambda: parse_pattern("0:4"), "1 <= n < m"),
        (lambda: parse_pattern("-2:4"), "is no pattern"),
        (lambda: parse_pattern("channels", 0.3, 0.1), "the pattern channels exempts no row"),
        (lambda: parse_pattern("unstructured", 0.5, 0.1), "exempts no row"),
        (lambda: parse_pattern("experts", 0.5, 0.1), "exempts no row, so leave outlier_fraction out"),
        (lambda: parse_pattern("structured", 0.5, 0.5), "every column"),
        (lambda: parse_pattern("structured", 0.5, 1.0), "outlier_fraction=1.0"),
        (lambda: parse_pattern("2:4", None, -0.1), "outlier_fraction=-0.1"),
        (lambda: parse_pattern(Unstructured(0.5), 0.6), "contradicts"),
        (lambda: parse_pattern(Structured(0.5), None, 0.2), "one place"),
    ],
)
def test_a_wrong_pattern_is_an_error_that_says_what_is_wrong(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_counts_and_intermediate_sparsities_are_exact():
    assert Unstructured(0.5).num_pruned(3, 3) == 4
    assert NM(4, 8, 0.1).num_pruned(72, 256) == 65 * 128
    assert Structured(0.3, 0.1).num_pruned(72, 160) == 65 * 54
    assert Structured(0.07).num_pruned(1, 100) == 7  # 0.07 * 100 is 7.000000000000001
    assert [Experts(0.3).num_experts(*counts) for counts in ((8,), (8, 4), (16, 4))] == [2, 4, 4]  # equal in groups
    assert NM(2, 4).with_sparsity(0.45) == NM(2, 4, 0.1)  # so that one of ten rows is dense
    assert Experts(0.5).with_sparsity(0.25) == Experts(0.25)


FEW = "11001110 11111111 00001000"
OUTLIERS = Structured(0.24, outlier_fraction=0.25)


@pytest.mark.parametrize(
    ("pattern", "rows", "expected"),
    [
        (Unstructured(0.5), "1111 1111 1111 1111", 8),
        (Unstructured(0.5), "0000 0000 1111 1111", 0),
        (Unstructured(0.5), "0000 0000 0000 1111", 0),
        (NM(2, 4), FEW, 1 + 4),
        (NM(2, 4, outlier_fraction=0.34), FEW, 1),
        (NM(2, 4, outlier_fraction=0.67), FEW, 0),
        (Structured(0.3), "101101 101101 101101 101101", 0),
        (Structured(0.3), "111111 101101 101101 101101", 2),
        (OUTLIERS, "111111 101101 101101 101101", 0),
        (OUTLIERS, "111111 101101 101101 101111", 1),
        (OUTLIERS, "001111 001111 001111 110000", 0),  # an outlier with more zeros than any other row
        (Channels(0.3), "101101 101101 101101", 0),
        (Channels(0.3), "101101 101111 101101", 1),
    ],
)
def test_violations_are_the_kept_weights_that_must_go(pattern, rows, expected):
    keep = torch.tensor([[entry == "1" for entry in row] for row in rows.split()])
    assert pattern.violations(keep) == expected
    if isinstance(pattern, Channels):
        assert Channels(0.3, dim=0).violations(keep.T) == expected


@pytest.mark.parametrize("pattern", PATTERNS)
def test_with_sparsity(pattern):
    assert pattern.with_sparsity(pattern.sparsity) is pattern
    half = pattern.with_sparsity(pattern.sparsity / 2)
    assert type(half) is type(pattern)
    assert half.sparsity == pytest.approx(pattern.sparsity / 2)
    for wrong in (0.0, -0.1, pattern.sparsity + 0.01, float("nan")):
        with pytest.raises(ValueError, match="intermediate"):
            pattern.with_sparsity(wrong)
