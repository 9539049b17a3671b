"""Assigns a pattern to each layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from thanos_lightning.models.targets import Layer, check_expressions, did_you_mean, examples, matches, to_add
from thanos_lightning.solver import Pattern, parse_pattern


@dataclass(frozen=True)
class TargetOverride:
    """Another pattern for some of the targets.

    Args:
        targets: Globs or `re:` expressions of module names, as for the callback's targets.
        pattern: "2:4" (any N:M), "unstructured", "structured", "channels" or "experts".
        sparsity: Final sparsity, for all but N:M.
        outlier_fraction: Fraction of the rows that stay dense.

    Examples:
        >>> TargetOverride(targets=["*.down_proj"], pattern="unstructured", sparsity=0.5).parsed()
        Unstructured(sparsity=0.5)
    """

    targets: str | Sequence[str]
    pattern: str
    sparsity: float | None = None
    outlier_fraction: float | None = None

    def parsed(self) -> Pattern:
        """The pattern as an object, or the ValueError of `parse_pattern`."""
        return parse_pattern(self.pattern, self.sparsity, self.outlier_fraction)


def check_overrides(overrides: Sequence[TargetOverride]) -> tuple[TargetOverride, ...]:
    """Return the overrides, or raise a ValueError if one can't be right, as far as this shows without a model."""
    mend = "give a list of TargetOverride(targets, pattern)"
    if not isinstance(overrides, Sequence) or isinstance(overrides, str):
        raise ValueError(f"overrides is {overrides!r}: {mend}")
    for override in overrides:
        if not isinstance(override, TargetOverride):
            raise ValueError(f"overrides holds {override!r}: {mend}")
        check_expressions("an override's targets", override.targets)
        override.parsed()
    return tuple(overrides)


def assign_patterns(
    layers: Mapping[str, Layer], pattern: Pattern, overrides: Sequence[TargetOverride] = ()
) -> dict[str, Pattern]:
    """The final pattern of each layer. If several overrides match a layer, the last one counts.

    Raises:
        ValueError: If an override matches no target, or if a pattern does not fit the shape of a layer.
    """
    patterns = dict.fromkeys(layers, pattern)
    for override in overrides:
        for expression in check_expressions("an override's targets", override.targets):
            matched = [name for name in layers if matches(name, expression)]
            if not matched:
                raise ValueError(
                    f"override target {expression!r} matches none of the layers to prune"
                    f"{did_you_mean(expression, layers)}: {examples(layers)}"
                )
            patterns.update(dict.fromkeys(matched, override.parsed()))
    misfits: dict[str, ValueError] = {}
    for name, layer in layers.items():
        try:
            patterns[name].check_shape(layer.rows, layer.cols)
        except ValueError as error:
            misfits[name] = error
    if misfits:
        first, why = next(iter(misfits.items()))
        raise ValueError(
            f"{len(misfits)} of {len(layers)} layers can't take their pattern ({examples(misfits)}). Layer {first}: "
            f"{why}. Or add {to_add(misfits)} to ignore, or override the pattern"
        )
    return patterns
