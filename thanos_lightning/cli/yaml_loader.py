"""How our command line reads YAML."""

from __future__ import annotations

import re
from typing import Any


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
        return yaml.load(text, Loader)  # a SafeLoader

    return load, yaml.YAMLError
