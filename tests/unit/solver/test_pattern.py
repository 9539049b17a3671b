import pytest
import torch
from cases import PATTERNS

from thanos_lightning.solver import NM, Channels, Experts, Structured, Unstructured, parse_pattern, prune


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
    ("arguments", "message"),
    [
        (("4:4",), "1 <= n < m"),
        (("0:4",), "1 <= n < m"),
        (("-2:4",), "is no pattern"),
        (("rows", 0.5), "is no pattern"),
        (("channels", 0.3, 0.1), "the pattern channels exempts no row"),
        (("unstructured", 0.5, 0.1), "exempts no row"),
        (("experts", 0.5, 0.1), "exempts no row, so leave outlier_fraction out"),
        (("structured", 0.5, 0.5), "every column"),
        (("structured", 0.5, 1.0), "outlier_fraction=1.0"),
        (("2:4", None, -0.1), "outlier_fraction=-0.1"),
        ((Unstructured(0.5), 0.6), "contradicts"),
        ((Structured(0.5), None, 0.2), "one place"),
    ],
)
def test_parse_pattern_says_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        parse_pattern(*arguments)


def test_numbers_of_the_wrong_kind():
    with pytest.raises(ValueError, match="whole numbers"):
        NM(True, 4)


def test_counts():
    assert Unstructured(0.5).num_pruned(3, 3) == 4
    assert NM(4, 8, 0.1).num_pruned(72, 256) == 65 * 128
    assert Structured(0.3, 0.1).num_pruned(72, 160) == 65 * 54
    assert Structured(0.07).num_pruned(1, 100) == 7  # 0.07 * 100 is 7.000000000000001


def test_violations_of_unstructured():
    keep = torch.ones(4, 4, dtype=torch.bool)
    assert Unstructured(0.5).violations(keep) == 8
    keep[:2] = False
    assert Unstructured(0.5).violations(keep) == 0
    keep[2] = False
    assert Unstructured(0.5).violations(keep) == 0


def test_violations_of_nm():
    keep = torch.tensor([[1, 1, 0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 0, 0, 0]]).bool()
    assert NM(2, 4).violations(keep) == 1 + 4
    assert NM(2, 4, outlier_fraction=0.34).violations(keep) == 1
    assert NM(2, 4, outlier_fraction=0.67).violations(keep) == 0


def test_violations_of_structured():
    keep = torch.ones(4, 6, dtype=torch.bool)
    keep[:, [1, 4]] = False
    assert Structured(0.3).violations(keep) == 0
    keep[0] = True
    assert Structured(0.3).violations(keep) == 2
    assert Structured(0.24, outlier_fraction=0.25).violations(keep) == 0
    keep[3, 4] = True
    assert Structured(0.24, outlier_fraction=0.25).violations(keep) == 1
    keep[:] = True
    keep[:3, :2] = False
    keep[3, 2:] = False  # an outlier with more zeros than any other row
    assert Structured(0.24, outlier_fraction=0.25).violations(keep) == 0


@pytest.mark.parametrize("pattern", PATTERNS)
def test_with_sparsity(pattern):
    assert pattern.with_sparsity(pattern.sparsity) is pattern
    half = pattern.with_sparsity(pattern.sparsity / 2)
    assert type(half) is type(pattern)
    assert half.sparsity == pytest.approx(pattern.sparsity / 2)
    for wrong in (0.0, -0.1, pattern.sparsity + 0.01, float("nan")):
        with pytest.raises(ValueError, match="intermediate"):
            pattern.with_sparsity(wrong)


def test_with_sparsity_of_nm_keeps_the_groups_and_rounds_no_row_away():
    intermediate = NM(2, 4).with_sparsity(0.45)
    assert (intermediate.n, intermediate.m) == (2, 4)
    assert intermediate.num_dense_rows(10) == 1


def test_experts_are_counted_in_equal_number_from_groups():
    assert [Experts(0.3).num_experts(*counts) for counts in ((8,), (8, 4), (16, 4))] == [2, 4, 4]
    assert Experts(0.5).with_sparsity(0.25) == Experts(0.25)


def test_no_layer_is_pruned_to_experts():
    with pytest.raises(ValueError, match=r"Experts\(sparsity=0.5\) is for all experts of a mixture together"):
        prune(torch.ones(4, 4), torch.eye(4), Experts(0.5))
