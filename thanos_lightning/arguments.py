"""What a user asks of the callback: what can't be right, what changes nothing, and what is no longer as it was."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from thanos_lightning.solver import Pattern
from thanos_lightning.solver.layer import SolverOptions


def check_whole(name: str, value: Any, least: int) -> None:
    """Refuse what is no number of optimizer steps.

    Raises:
        ValueError: Naming the argument.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} is {value!r}: give a whole number of optimizer steps ≥ {least}")


def check_choice(name: str, value: Any, choices: Sequence[str | None]) -> None:
    """Refuse what is none of the choices, None being last where it is one.

    Raises:
        ValueError: Naming them.
    """
    if value not in choices:
        *others, last = map(repr, choices)
        raise ValueError(f"{name} is {value!r}: choose {', '.join(others)} or {last}")


def check_name(name: str, value: Any, example: str) -> None:
    """Refuse what is neither text nor None.

    Raises:
        ValueError: With an example.
    """
    if value is not None and (not isinstance(value, str) or not value):
        raise ValueError(f"{name} is {value!r}: give a name, such as {example!r}, or None")


def check_memory(name: str, value: Any) -> None:
    """Refuse what is neither a size nor None.

    Raises:
        ValueError: Naming the argument.
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value is not None and not (is_number and 0 < value < math.inf):
        raise ValueError(f"{name} is {value!r}: give a number of GiB > 0, such as 4, or None to hold all at once")


def check_batches(name: str, value: Any) -> None:
    """Refuse what gives no batches, as far as that can be told without asking for one.

    Raises:
        ValueError: Naming the argument.
    """
    if value is None or value == "datamodule":
        return
    mend = "give a DataLoader, a list of batches, or 'datamodule'"
    if isinstance(value, Iterator):
        raise ValueError(f"{name} is an iterator, which the first event would use up: {mend}")
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise ValueError(f"{name} is {_shortened(value)}: {mend}")
    if number_of_batches(value) == 0:
        raise ValueError(f"{name} has no batch ({described(value)}): {mend}")
    if isinstance(value, Sequence) and isinstance(value[0], (str, bytes)):
        raise ValueError(f"{name} holds text ({_shortened(value[0])}), not batches: {mend}")


def refuse_unused(
    given: Mapping[str, Any],
    defaults: Mapping[str, Any],
    options: SolverOptions,
    patterns: Sequence[Pattern],
) -> None:
    """Refuse arguments that change nothing beside the others: who gives one expects that it does.

    Args:
        given: Of the callback, by name.
        defaults: What they are where the user says nothing.
        options: What the method is.
        patterns: All that are used.

    Raises:
        ValueError: Naming the first one and why.
    """
    of_all = [options.unused(pattern) for pattern in patterns]
    reasons = {name: reason for name, reason in of_all[0].items() if all(name in unused for unused in of_all)}
    if given["calibration_dataloader"] is not None:
        reasons["calibration_steps"] = "layers are pruned on a calibration_dataloader, not on training batches"
    if not options.needs_statistics:
        why = f"method {options.method!r} looks at no batches"
        asked = ("output_weights", "calibration_dataloader", "calibration_steps", "attention_mask_key")
        reasons |= dict.fromkeys((*asked, "hessian_memory_gib"), why)
    for name, reason in reasons.items():
        if given[name] != defaults[name] and given[name] != "uniform":
            raise ValueError(f"{name} is {described(given[name])}, but {reason}: leave it out")


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> dict[str, str]:
    """The arguments that are not as they were, each as a sentence.

    Args:
        before: Name -> description.
        now: Likewise. One that has no counterpart is not compared.

    Example:
        >>> differences({"damping": "0.01", "monitor": "None"}, {"damping": "0.1", "monitor": "None"})
        {'damping': 'damping was 0.01 and is 0.1'}
    """
    return {
        name: f"{name} was {before[name]} and is {value}"
        for name, value in now.items()
        if name in before and before[name] != value
    }


def described(value: Any) -> str:
    """One line that says what an argument is, the same in another process.

    Example:
        >>> described([{"input_ids": None}]), described(("*", "lm_head")), described("2:4")
        ('list of 1 batch(es)', "['*', 'lm_head']", "'2:4'")
    """
    if isinstance(value, Iterable) and not isinstance(value, str):
        if isinstance(value, Sequence) and all(isinstance(item, str) for item in value):
            return repr(list(value))
        length = number_of_batches(value)
        return type(value).__name__ + ("" if length is None else f" of {length} batch(es)")
    return f"{value:g}" if isinstance(value, float) and value.is_integer() else repr(value)


def number_of_batches(batches: Iterable[Any]) -> int | None:
    """How many there are, where that is known before.

    Example:
        >>> number_of_batches([1, 2]), number_of_batches(iter([]))
        (2, None)
    """
    try:
        return len(batches)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):  # of an iterable data set's loader, too
        return None


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
