"""How our command line reads YAML."""

from __future__ import annotations

import re
from typing import Any

import yaml  # type: ignore[import-untyped]

_MOST = 100_000  # values of a configuration
_TEXT = re.compile(r"^(?:[-+]?[0-9][0-9_]*:[0-9:._]+|[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}.*)$")  # base 60, and dates
_NUMBER = re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*[eE][-+]?[0-9]+|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?)$")
_OURS = [("tag:yaml.org,2002:str", _TEXT), ("tag:yaml.org,2002:float", _NUMBER)]


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Reads 1e-4 as a number, and no base-60 numbers or dates."""

    yaml_implicit_resolvers = {  # noqa: RUF012  # an attribute of PyYAML's, whose first that matches counts
        first: [*_OURS, *theirs] for first, theirs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def _size(node: Any, known: dict[int, int]) -> int:
    """How many values a node of YAML has if each is written out wherever an alias stands for it. Reads each once."""
    if not isinstance(getattr(node, "value", None), list):
        return 1
    if id(node) not in known:
        known[id(node)] = _MOST + 1  # if it is met again before it is counted, it contains itself
        parts = (part for entry in node.value for part in (entry if isinstance(entry, tuple) else (entry,)))
        known[id(node)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(node)]


def load_yaml(text: str) -> Any:
    """Read a configuration, in which 2:4 is text and 1e-4 a number. YAML 1.1 reads 2:4 as 124, and 1e-4 as text.

    Raises YAMLError if it is no YAML, nested too deeply, or has too many values.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if _size(node, {}) > _MOST:
            raise yaml.YAMLError(f"with its aliases (*) written out it has more than {_MOST:,} values")
        return None if node is None else loader.construct_document(node)
    except RecursionError as error:
        raise yaml.YAMLError("its brackets are nested too deeply") from error
    finally:
        loader.dispose()
