"""How our command line reads YAML."""

from __future__ import annotations

import re
from typing import Any

_MOST = 100_000  # values of a configuration


def _size(node: Any, known: dict[int, int]) -> int:
    """How many values a node of YAML has if each is written out wherever an alias stands for it. Reads each once."""
    if not isinstance(getattr(node, "value", None), list):
        return 1
    if id(node) not in known:
        known[id(node)] = _MOST + 1  # if it is met again before it is counted, it contains itself
        inner = (one for entry in node.value for one in (entry if isinstance(entry, tuple) else (entry,)))
        known[id(node)] = 1 + sum(_size(one, known) for one in inner)
    return known[id(node)]


def yaml_loader() -> tuple[Any, type[Exception]]:
    """Return a loader that reads 2:4 as text, and the exception that it raises.

    YAML 1.1 reads an unquoted 2:4 as 124, a number to the base of 60, and 1e-4 as text. This loader has no such base
    and reads 1e-4 as a number.
    """
    import yaml  # type: ignore[import-untyped]

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """Reads 1e-4 as a number, and no base-60 numbers or dates."""

        yaml_implicit_resolvers = {  # noqa: RUF012  # an attribute of PyYAML's
            first: [
                (tag, expression)
                for tag, expression in resolvers
                if tag.rpartition(":")[2] not in ("int", "float", "timestamp")
            ]
            for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

    integer = r"[-+]?(?:0b[01_]+|0[0-7_]+|0x[0-9a-fA-F_]+|0|[1-9][0-9_]*)"
    floating = (
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+"
        r"|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)"
    )
    for tag, expression in (("float", floating), ("int", integer)):
        Loader.add_implicit_resolver(
            f"tag:yaml.org,2002:{tag}", re.compile(f"^(?:{expression})$"), list("-+0123456789.")
        )

    def load(text: str) -> Any:
        loader = Loader(text)
        try:
            node = loader.get_single_node()
            if _size(node, {}) > _MOST:
                raise yaml.YAMLError(f"with its aliases (*) written out it has more than {_MOST:,} values")
            return None if node is None else loader.construct_document(node)
        except RecursionError as error:
            raise yaml.YAMLError("its brackets are nested too deeply") from error
        finally:
            loader.dispose()

    return load, yaml.YAMLError
