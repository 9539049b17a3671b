"""What a pruned layer must look like: the three patterns, their exact counts, and the check that a mask conforms.

Words used here: a keep mask is bool of shape (rows, cols), True = kept; a row is one output, a column one input.
"""

import math
import re
from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Bool
from torch import Tensor

# Two sparsities nearer than this are the same number written twice.
_SAME = 1e-6


def _check_sparsity(value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 < value < 1.0:
        raise ValueError(
            f"sparsity={value!r} is not a number between 0 and 1 (both excluded): give the fraction of weights to "
            "remove, such as 0.5"
        )


def _check_outlier_fraction(value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value < 1.0:
        raise ValueError(
            f"outlier_fraction={value!r} is not a number in [0, 1): give the fraction of rows to keep dense, such as "
            "0.1"
        )


def _check_reachable(intermediate: float, final: float) -> None:
    if not 0.0 < intermediate <= final:
        raise ValueError(
            f"sparsity={intermediate!r} is not in (0, {final:g}]: an intermediate sparsity cannot exceed the final one"
        )


@dataclass(frozen=True)
class Unstructured:
    """Any weights of the layer, as many as the sparsity asks for.

    Args:
        sparsity: Fraction of the layer's weights to remove, in (0, 1).

    Raises:
        ValueError: If ``sparsity`` is out of range.

    Examples:
        >>> from thanos_lightning.solver import Unstructured
        >>> Unstructured(0.5).num_pruned(rows=3, cols=5)
        7
    """

    sparsity: float

    def __post_init__(self) -> None:
        _check_sparsity(self.sparsity)

    @property
    def name(self) -> str:
        """``"unstructured"``."""
        return "unstructured"

    @property
    def outlier_fraction(self) -> float:
        """0.0: no row is exempt."""
        return 0.0

    def check_shape(self, rows: int, cols: int) -> None:
        """Raise where a (rows, cols) layer cannot take this pattern; every layer can take this one."""

    def num_pruned(self, rows: int, cols: int) -> int:
        """Exact number of zeros in a (rows, cols) layer: ``int(sparsity * rows * cols)``."""
        return int(self.sparsity * rows * cols)

    def violations(self, keep: Bool[Tensor, "rows cols"]) -> int:
        """Number of zeros that ``keep`` lacks."""
        return max(0, self.num_pruned(*keep.shape) - int((~keep).sum()))

    def with_sparsity(self, sparsity: float) -> "Unstructured":
        """This pattern at an intermediate sparsity in (0, ``self.sparsity``]."""
        if sparsity == self.sparsity:
            return self
        _check_reachable(sparsity, self.sparsity)
        return Unstructured(sparsity)


@dataclass(frozen=True)
class NM:
    """At most ``n`` nonzeros in every ``m`` consecutive inputs of a row, but for a fraction of dense rows.

    Args:
        n: Weights kept in each group, 1 <= n < m.
        m: Size of a group; has to divide the layer's input width.
        outlier_fraction: Fraction of the rows that stay dense, in [0, 1); ``floor(outlier_fraction * rows)`` rows.

    Raises:
        ValueError: If a number is out of range.

    Examples:
        >>> from thanos_lightning.solver import NM
        >>> NM(2, 4).num_pruned(rows=10, cols=8)
        40
        >>> NM(2, 4, outlier_fraction=0.1).num_pruned(rows=10, cols=8)
        36
    """

    n: int
    m: int
    outlier_fraction: float = 0.0

    def __post_init__(self) -> None:
        for value in (self.n, self.m):
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"n:m = {self.n!r}:{self.m!r} takes whole numbers: write for instance NM(2, 4)")
        if not 1 <= self.n < self.m:
            raise ValueError(
                f"n:m = {self.n}:{self.m} keeps n of every m weights and needs 1 <= n < m: write for instance 2:4"
            )
        _check_outlier_fraction(self.outlier_fraction)

    @property
    def name(self) -> str:
        """Such as ``"2:4"``."""
        return f"{self.n}:{self.m}"

    @property
    def sparsity(self) -> float:
        """Nominal sparsity over all rows: (1 - n/m)(1 - outlier_fraction)."""
        return (1 - self.n / self.m) * (1 - self.outlier_fraction)

    def check_shape(self, rows: int, cols: int) -> None:
        """Raise where a (rows, cols) layer cannot take this pattern.

        Raises:
            ValueError: If ``m`` does not divide ``cols``.
        """
        if cols % self.m:
            raise ValueError(
                f"pattern {self.name} needs an input width divisible by {self.m}, and a ({rows}, {cols}) weight has "
                f"{cols}: leave the layer out, or choose a group size that divides {cols}"
            )

    def num_dense_rows(self, rows: int) -> int:
        """Number of rows that stay dense."""
        return math.floor(self.outlier_fraction * rows)

    def num_pruned(self, rows: int, cols: int) -> int:
        """Exact number of zeros in a (rows, cols) layer."""
        self.check_shape(rows, cols)
        return (rows - self.num_dense_rows(rows)) * (cols // self.m) * (self.m - self.n)

    def violations(self, keep: Bool[Tensor, "rows cols"]) -> int:
        """Number of kept weights beyond ``n`` per group, outside the rows that may be dense."""
        rows, cols = keep.shape
        self.check_shape(rows, cols)
        excess = (keep.view(rows, cols // self.m, self.m).sum(2) - self.n).clamp_(min=0).sum(1)
        return int(excess.sort().values[: rows - self.num_dense_rows(rows)].sum())

    def with_sparsity(self, sparsity: float) -> "NM":
        """This pattern at an intermediate sparsity in (0, ``self.sparsity``]: the same n:m with more dense rows."""
        if sparsity == self.sparsity:
            return self
        _check_reachable(sparsity, self.sparsity)
        # Without the rounding, 1 - 0.45 / 0.5 is a hair below 0.1, and one row in ten fewer would be dense.
        return replace(self, outlier_fraction=round(1 - sparsity / (1 - self.n / self.m), 12))


@dataclass(frozen=True)
class Structured:
    """Whole columns, removed from every row but a fraction of dense ones.

    Args:
        sparsity: Fraction of the layer's weights to remove, in (0, 1).
        outlier_fraction: Fraction of the rows that stay dense, in [0, 1); ``floor(outlier_fraction * rows)`` rows. The
            other rows lose ``ceil(sparsity * cols / (1 - outlier_fraction))`` columns each.

    Raises:
        ValueError: If a number is out of range, or if the rows that are no outliers would lose every column.

    Examples:
        >>> from thanos_lightning.solver import Structured
        >>> Structured(0.3).num_pruned(rows=10, cols=10)
        30
    """

    sparsity: float
    outlier_fraction: float = 0.0

    def __post_init__(self) -> None:
        _check_sparsity(self.sparsity)
        _check_outlier_fraction(self.outlier_fraction)
        if self.sparsity + self.outlier_fraction >= 1.0:
            raise ValueError(
                f"sparsity={self.sparsity!r} with outlier_fraction={self.outlier_fraction!r} would remove every column "
                "of the rows that are no outliers: their sum has to stay below 1"
            )

    @property
    def name(self) -> str:
        """``"structured"``."""
        return "structured"

    def check_shape(self, rows: int, cols: int) -> None:
        """Raise where a (rows, cols) layer cannot take this pattern.

        Raises:
            ValueError: If rounding up would remove every column.
        """
        if self.num_columns(cols) >= cols:
            raise ValueError(
                f"structured sparsity {self.sparsity:g} would remove all {cols} columns of a ({rows}, {cols}) weight: "
                "leave the layer out, or lower the sparsity"
            )

    def num_dense_rows(self, rows: int) -> int:
        """Number of rows that stay dense."""
        return math.floor(self.outlier_fraction * rows)

    def num_columns(self, cols: int) -> int:
        """Number of columns removed from each row that is no outlier."""
        # Without the slack, 0.07 * 100 is a hair above 7, and eight columns would go.
        return math.ceil(self.sparsity * cols / (1 - self.outlier_fraction) - 1e-9)

    def num_pruned(self, rows: int, cols: int) -> int:
        """Exact number of zeros in a (rows, cols) layer."""
        self.check_shape(rows, cols)
        return (rows - self.num_dense_rows(rows)) * self.num_columns(cols)

    def violations(self, keep: Bool[Tensor, "rows cols"]) -> int:
        """Number of kept weights that would have to go for the required columns to be empty in all but the dense rows.

        Which rows are the dense ones is not written in a mask. They are looked for from two starting points, fewest
        zeros and fewest zeros in the emptiest columns; the result is exact where there are no dense rows, and an upper
        bound otherwise.
        """
        rows, cols = keep.shape
        self.check_shape(rows, cols)
        sparse_rows = rows - self.num_dense_rows(rows)
        emptiest = keep.sum(0).argsort()[: self.num_columns(cols)]
        return min(
            int(keep[kept_per_row.argsort()[:sparse_rows]].sum(0).sort().values[: self.num_columns(cols)].sum())
            for kept_per_row in (keep.sum(1), keep[:, emptiest].sum(1))
        )

    def with_sparsity(self, sparsity: float) -> "Structured":
        """This pattern at an intermediate sparsity in (0, ``self.sparsity``], with the same fraction of dense rows."""
        if sparsity == self.sparsity:
            return self
        _check_reachable(sparsity, self.sparsity)
        return replace(self, sparsity=sparsity)


Pattern = Unstructured | NM | Structured


def parse_pattern(
    pattern: str | Pattern | Any, sparsity: float | Any | None = None, outlier_fraction: float | Any | None = None
) -> Pattern:
    """Turn what a user writes in a YAML file into a pattern.

    Args:
        pattern: ``"unstructured"``, ``"structured"`` or n:m such as ``"2:4"``; a pattern object is passed through.
            All else is an error; that of 124 says what YAML makes of an unquoted 2:4.
        sparsity: Fraction of weights to remove. Required for the two names; n:m implies it, so that it may be left
            out, or has to agree.
        outlier_fraction: Fraction of the rows kept dense; None means 0.0, or what the pattern object says.

    Returns:
        The pattern.

    Raises:
        ValueError: If the text is no pattern, or if it contradicts ``sparsity`` or ``outlier_fraction``.

    Examples:
        >>> from thanos_lightning.solver import parse_pattern
        >>> parse_pattern("2:4")
        NM(n=2, m=4, outlier_fraction=0.0)
        >>> parse_pattern("unstructured", sparsity=0.6)
        Unstructured(sparsity=0.6)
    """
    if sparsity is not None:
        _check_sparsity(sparsity)
    if outlier_fraction is not None:
        _check_outlier_fraction(outlier_fraction)
    if isinstance(pattern, Pattern):
        _check_agreement(pattern, sparsity, outlier_fraction)
        return pattern
    if not isinstance(pattern, str):
        n, m = divmod(pattern, 60) if isinstance(pattern, int) else (0, 0)
        if 1 <= n < m:
            raise ValueError(
                f"pattern={pattern!r} is not text. YAML reads an unquoted {n}:{m} as the number {pattern}: quote it as "
                f'"{n}:{m}"'
            )
        raise ValueError(
            f'pattern={pattern!r} is not text: write n:m such as "2:4", or "unstructured" or "structured" with a '
            "sparsity"
        )
    text = pattern.strip().lower()
    if groups := re.fullmatch(r"(\d+):(\d+)", text):
        parsed = NM(int(groups[1]), int(groups[2]), outlier_fraction or 0.0)
        _check_agreement(parsed, sparsity, outlier_fraction)
        return parsed
    if text not in ("unstructured", "structured"):
        raise ValueError(f'pattern={pattern!r} is not known: write "unstructured", "structured", or n:m such as "2:4"')
    if sparsity is None:
        raise ValueError(f"pattern={text!r} needs a sparsity: give the fraction of weights to remove, such as 0.5")
    if text == "structured":
        return Structured(sparsity, outlier_fraction or 0.0)
    unstructured = Unstructured(sparsity)
    _check_agreement(unstructured, None, outlier_fraction)
    return unstructured


def _check_agreement(pattern: Pattern, sparsity: float | None, outlier_fraction: float | None) -> None:
    if outlier_fraction is not None and not abs(outlier_fraction - pattern.outlier_fraction) < _SAME:
        mend = (
            "an unstructured mask exempts no row, so leave outlier_fraction out"
            if isinstance(pattern, Unstructured)
            else "give it in one place only"
        )
        raise ValueError(f"outlier_fraction={outlier_fraction!r} contradicts {pattern!r}: {mend}")
    if sparsity is None:
        return
    # A user who writes 2:4 and 0.5 means the sparse rows; the dense ones lower the total, and either number is right.
    implied = [pattern.sparsity] if not isinstance(pattern, NM) else [pattern.sparsity, 1 - pattern.n / pattern.m]
    if not any(abs(sparsity - value) < _SAME for value in implied):
        raise ValueError(
            f"sparsity={sparsity!r} contradicts pattern {pattern.name}, which means a sparsity of "
            f"{pattern.sparsity:g}: leave sparsity out, or change the pattern"
        )
