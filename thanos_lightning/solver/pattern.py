"""What a pruned layer must look like: the patterns, their exact counts, and the check that a mask conforms.

A keep mask is bool of shape (rows, cols), True = kept. A row is one output, and a column is one input. A new pattern is
a class and a name here; `saliency.py`, `thanos.py` and `sparsegpt.py` choose its masks.
"""

import math
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, cast

from jaxtyping import Bool
from torch import Tensor

# Two sparsities nearer than this are the same number written twice.
_SAME = 1e-6
# Added to a count that is stored as a fraction, since the count that is computed back from it is rounded down.
_ROUNDED_DOWN = 0.25


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


class _Base(ABC):
    """What a pattern has to say: to the solver, to the plan, and to the check of a mask."""

    if TYPE_CHECKING:  # a pattern has each of these as a field, a class attribute or a property

        @property
        def name(self) -> str:
            """What a user writes: ``"unstructured"``, ``"structured"``, ``"channels"``, ``"experts"``, or n:m."""

        @property
        def sparsity(self) -> float:
            """Nominal fraction of the layer's weights that are zero."""

        @property
        def outlier_fraction(self) -> float:
            """Fraction of the rows that stay dense."""

        @property
        def rows_compete(self) -> bool:
            """Whether errors of different rows are compared, in the choice of weights, of columns or of dense rows."""

    def check_shape(self, rows: int, cols: int) -> None:  # noqa: B027 (most patterns fit any layer)
        """Raise a ValueError where the columns of a (rows, cols) layer cannot take this pattern."""

    def num_dense_rows(self, rows: int) -> int:
        """Number of rows that stay dense."""
        return math.floor(self.outlier_fraction * rows)

    @abstractmethod
    def num_pruned(self, rows: int, cols: int) -> int:
        """Exact number of zeros in a (rows, cols) layer."""

    @abstractmethod
    def violations(self, keep: Bool[Tensor, "rows cols"]) -> int:
        """Number of kept weights that must still be pruned."""

    def with_sparsity(self, sparsity: float) -> "Pattern":
        """This pattern at an intermediate sparsity in (0, ``self.sparsity``]; n:m gets there by more dense rows."""
        if sparsity == self.sparsity:
            return cast("Pattern", self)
        if not 0.0 < sparsity <= self.sparsity:
            raise ValueError(
                f"sparsity={sparsity!r} is not in (0, {self.sparsity:g}]: an intermediate sparsity cannot exceed the "
                "final one"
            )
        return self._at(sparsity)

    def _at(self, sparsity: float) -> "Pattern":
        pattern: Pattern = replace(cast("Any", self), sparsity=sparsity)
        return pattern

    def sparsest(self, most: float) -> "Pattern":
        """This kind of pattern at its sparsest: ``most`` in rows that are not dense; n:m without dense rows."""
        return self._at(most * (1 - self.outlier_fraction))

    @abstractmethod
    def units(self, rows: int, cols: int) -> tuple[int, int]:
        """How many weights are pruned together in a (rows, cols) layer, and how many such units may go."""

    @abstractmethod
    def with_units(self, count: int, rows: int, cols: int) -> "Pattern":
        """The same kind of pattern with ``count`` > 0 of its units pruned."""

    @abstractmethod
    def group_width(self, cols: int) -> int:
        """Width of the groups in a row within which ADMM may exchange kept weights. 0 if the chosen mask stays."""


@dataclass(frozen=True)
class Unstructured(_Base):
    """Zeros anywhere in the layer, as many as the sparsity asks for.

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
    name = "unstructured"
    outlier_fraction = 0.0
    rows_compete = True

    def __post_init__(self) -> None:
        _check_sparsity(self.sparsity)

    def num_pruned(self, rows: int, cols: int) -> int:
        return int(self.sparsity * rows * cols)

    def violations(self, keep: Bool[Tensor, "rows cols"]) -> int:
        return max(0, self.num_pruned(*keep.shape) - int((~keep).sum()))

    def units(self, rows: int, cols: int) -> tuple[int, int]:
        return 1, rows * cols

    def with_units(self, count: int, rows: int, cols: int) -> "Unstructured":
        return Unstructured((count + _ROUNDED_DOWN) / (rows * cols))

    def group_width(self, cols: int) -> int:
        return cols


@dataclass(frozen=True)
class NM(_Base):
    """At most ``n`` nonzeros in every ``m`` consecutive inputs of a row, except in a fraction of dense rows.

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
        return f"{self.n}:{self.m}"

    @property
    def sparsity(self) -> float:
        return (1 - self.n / self.m) * (1 - self.outlier_fraction)

    def check_shape(self, rows: int, cols: int) -> None:
        if cols % self.m:
            raise ValueError(
                f"pattern {self.name} needs an input width divisible by {self.m}, and a ({rows}, {cols}) weight has "
                f"{cols}: leave the layer out, or choose a group size that divides {cols}"
            )

    def num_pruned(self, rows: int, cols: int) -> int:
        self.check_shape(rows, cols)
        return (rows - self.num_dense_rows(rows)) * (cols // self.m) * (self.m - self.n)

    def violations(self, keep: Bool[Tensor, "rows cols"]) -> int:
        rows, cols = keep.shape
        self.check_shape(rows, cols)
        excess = (keep.view(rows, cols // self.m, self.m).sum(2) - self.n).clamp_(min=0).sum(1)
        return int(excess.sort().values[: rows - self.num_dense_rows(rows)].sum())

    def _at(self, sparsity: float) -> "NM":
        # Without the rounding, 1 - 0.45 / 0.5 is slightly below 0.1, and none of ten rows would be dense.
        return replace(self, outlier_fraction=round(1 - sparsity / (1 - self.n / self.m), 12))

    @property
    def rows_compete(self) -> bool:
        return self.outlier_fraction > 0

    def sparsest(self, most: float) -> "NM":
        return replace(self, outlier_fraction=0.0)

    def units(self, rows: int, cols: int) -> tuple[int, int]:
        return cols // self.m * (self.m - self.n), rows

    def with_units(self, count: int, rows: int, cols: int) -> "NM":
        dense = rows - count
        return replace(self, outlier_fraction=(dense + _ROUNDED_DOWN) / rows if dense else 0.0)

    def group_width(self, cols: int) -> int:
        return self.m


@dataclass(frozen=True)
class Structured(_Base):
    """Whole columns are removed from all rows except a fraction of dense rows.

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
    name = "structured"
    rows_compete = True

    def __post_init__(self) -> None:
        _check_sparsity(self.sparsity)
        _check_outlier_fraction(self.outlier_fraction)
        if self.sparsity + self.outlier_fraction >= 1.0:
            raise ValueError(
                f"sparsity={self.sparsity!r} with outlier_fraction={self.outlier_fraction!r} would remove every column "
                "of the rows that are no outliers: their sum has to stay below 1"
            )

    def check_shape(self, rows: int, cols: int) -> None:
        if self.num_columns(cols) >= cols:
            raise ValueError(
                f"structured sparsity {self.sparsity:g} would remove all {cols} columns of a ({rows}, {cols}) weight: "
                "leave the layer out, or lower the sparsity"
            )

    def num_columns(self, cols: int) -> int:
        """Number of columns removed from each row that is no outlier."""
        # Without the slack, 0.07 * 100 is slightly above 7, and eight columns would be removed.
        return math.ceil(self.sparsity * cols / (1 - self.outlier_fraction) - 1e-9)

    def num_pruned(self, rows: int, cols: int) -> int:
        self.check_shape(rows, cols)
        return (rows - self.num_dense_rows(rows)) * self.num_columns(cols)

    def violations(self, keep: Bool[Tensor, "rows cols"]) -> int:
        # A mask does not say which rows are dense. Two guesses are tried: the rows with the fewest zeros, and the rows
        # with the fewest zeros in the emptiest columns. The result is exact without dense rows, else an upper bound.
        rows, cols = keep.shape
        self.check_shape(rows, cols)
        sparse_rows = rows - self.num_dense_rows(rows)
        emptiest = keep.sum(0).argsort()[: self.num_columns(cols)]
        return min(
            int(keep[kept_per_row.argsort()[:sparse_rows]].sum(0).sort().values[: self.num_columns(cols)].sum())
            for kept_per_row in (keep.sum(1), keep[:, emptiest].sum(1))
        )

    def units(self, rows: int, cols: int) -> tuple[int, int]:
        return rows - self.num_dense_rows(rows), cols - 1

    def with_units(self, count: int, rows: int, cols: int) -> "Structured":
        return replace(self, sparsity=count * (1 - self.outlier_fraction) / cols)

    def group_width(self, cols: int) -> int:
        return 0


@dataclass(frozen=True)
class Channels(Structured):
    """Whole columns are removed from all rows, chosen together: the inputs of a layer that can be taken out of a model.

    A model is smaller then, not sparser: what computes such an input can be taken out, too.

    Args:
        sparsity: Fraction of the columns to remove, in (0, 1), rounded to whole columns.
        dim: 1: channels are columns. 0: they are rows, in the mask of a layer that computes these inputs. The solver
            prunes columns only.

    Raises:
        ValueError: If ``sparsity`` is out of range.

    Examples:
        >>> from thanos_lightning.solver import Channels
        >>> Channels(0.3).num_pruned(rows=10, cols=8)
        20
    """

    outlier_fraction: float = field(default=0.0, init=False, repr=False)
    dim: Literal[0, 1] = field(default=1, repr=False)
    name = "channels"

    def check_shape(self, rows: int, cols: int) -> None:
        pass

    def num_columns(self, cols: int) -> int:
        """Number of columns removed from each row."""
        return round(self.sparsity * cols)

    def violations(self, keep: Bool[Tensor, "rows cols"]) -> int:
        kept = keep.sum(1 - self.dim).sort().values
        return int(kept[: self.num_columns(len(kept))].sum())


@dataclass(frozen=True)
class Experts(_Base):
    """Whole experts of mixtures of experts, which can be taken out of a model. The solver does not choose them.

    Args:
        sparsity: Fraction of the experts of each mixture to remove, in (0, 1), rounded to whole experts.

    Raises:
        ValueError: If ``sparsity`` is out of range.

    Examples:
        >>> from thanos_lightning.solver import Experts
        >>> Experts(0.3).num_experts(8)
        2
    """

    sparsity: float
    name = "experts"
    outlier_fraction = 0.0
    rows_compete = False

    def __post_init__(self) -> None:
        _check_sparsity(self.sparsity)

    def num_experts(self, experts: int, groups: int = 1) -> int:
        """Number of experts removed of so many, the same from each of the groups."""
        return round(self.sparsity * experts / groups) * groups

    # A layer with this pattern is a matrix of an expert that goes

    def num_pruned(self, rows: int, cols: int) -> int:
        return rows * cols

    def violations(self, keep: Bool[Tensor, "rows cols"]) -> int:
        return int(keep.sum())

    def units(self, rows: int, cols: int) -> tuple[int, int]:
        return rows * cols, 1

    def with_units(self, count: int, rows: int, cols: int) -> "Experts":
        return self

    def group_width(self, cols: int) -> int:
        return 0


Solvable = Unstructured | NM | Structured
Pattern = Solvable | Experts


def parse_pattern(
    pattern: str | Pattern | Any, sparsity: float | Any | None = None, outlier_fraction: float | Any | None = None
) -> Pattern:
    """Turn what a user writes in a YAML file into a pattern.

    Args:
        pattern: ``"unstructured"``, ``"structured"``, ``"channels"``, ``"experts"`` or n:m such as ``"2:4"``; a pattern
            object is passed through. Anything else is an error. The error for 124 explains that YAML reads an unquoted
            2:4 as 124.
        sparsity: Fraction of weights to remove. The names require it. n:m implies it: leave it out, or give a number
            that agrees.
        outlier_fraction: Fraction of the rows kept dense; None means 0.0, or the fraction of the pattern object.

    Returns:
        The pattern.

    Raises:
        ValueError: If ``pattern`` is no pattern, or if it contradicts ``sparsity`` or ``outlier_fraction``.

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
    n, m = divmod(pattern, 60) if isinstance(pattern, int) else (0, 0)
    if 1 <= n < m:
        raise ValueError(
            f"pattern={pattern!r} is not text. YAML reads an unquoted {n}:{m} as the number {pattern}: quote it as "
            f'"{n}:{m}"'
        )
    kinds = {kind.name: kind for kind in (Unstructured, Structured, Channels, Experts)}
    text = pattern.strip().lower() if isinstance(pattern, str) else ""
    parsed: Pattern
    if isinstance(pattern, Pattern):
        parsed = pattern
    elif groups := re.fullmatch(r"(\d+):(\d+)", text):
        parsed = NM(int(groups[1]), int(groups[2]), outlier_fraction or 0.0)
    elif text not in kinds:
        raise ValueError(
            f'pattern={pattern!r} is no pattern: write n:m such as "2:4", or "unstructured", "structured", "channels" '
            'or "experts" with a sparsity'
        )
    elif sparsity is None:
        raise ValueError(f"pattern={text!r} needs a sparsity: give the fraction of weights to remove, such as 0.5")
    elif text == "structured":
        parsed = Structured(sparsity, outlier_fraction or 0.0)
    else:
        parsed = kinds[text](sparsity)
    _check_agreement(parsed, sparsity, outlier_fraction)
    return parsed


def _check_agreement(pattern: Pattern, sparsity: float | None, outlier_fraction: float | None) -> None:
    if outlier_fraction is not None and not abs(outlier_fraction - pattern.outlier_fraction) < _SAME:
        mend = (
            f"the pattern {pattern.name} exempts no row, so leave outlier_fraction out"
            if isinstance(pattern, (Unstructured, Channels, Experts))
            else "give it in one place only"
        )
        raise ValueError(f"outlier_fraction={outlier_fraction!r} contradicts {pattern!r}: {mend}")
    if sparsity is None:
        return
    # Dense rows lower the total sparsity. A user may give that total, or the sparsity of the sparse rows (0.5 for 2:4).
    implied = [pattern.sparsity] if not isinstance(pattern, NM) else [pattern.sparsity, 1 - pattern.n / pattern.m]
    if not any(abs(sparsity - value) < _SAME for value in implied):
        raise ValueError(
            f"sparsity={sparsity!r} contradicts pattern {pattern.name}, which means a sparsity of "
            f"{pattern.sparsity:g}: leave sparsity out, or change the pattern"
        )
