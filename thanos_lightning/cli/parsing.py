"""Reduces an error of jsonargparse, which has some forty lines, to the one line that helps."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterable, Sequence
from typing import Any

from thanos_lightning.cli.mistakes import PROGRAM, did_you_mean

_HINTS = {  # advice for a value of the wrong type
    "pattern": 'give text in quotes, such as "2:4" (YAML 1.1 reads an unquoted 2:4 as 124)',
    "calibration.batches": "give datamodule, or null to collect from the training batches",
    "at": "give a list of times, such as [0.1, 0.2]",
}
GROUPS = {  # what to give where an option of ThanosPruningCallback holds others
    "schedule": "give times, such as {at: [0.1, 0.2]}",
    "overrides": 'give a list, such as [{targets: ["*.mlp.*"], pattern: "4:8"}]',
    "solver": "give its options, such as {method: thanos}",
    "calibration": "give its options, such as {batches: datamodule}",
    "allocation": "give {by: loss} or {by: uniform}",
}
# Among the errors of several attempts, one that begins like these tells most.
_TELLING = (
    "- Problem with given",
    "- Parser key",
    "- Expected a dot import path",
    "- Import path",
    "- Not a valid subclass of Callback. Got value",
)
_NESTED = re.compile(r"NestedArg\(key='(.+?)', val=(.*)\)")  # of --model.learning_rate fast, say
_PACKAGES = ("thanos_lightning", "thanos_lightning.lm", "lightning.pytorch.callbacks")  # their classes need no path
_TYPES = {
    "float": "a number",
    "int": "a whole number",
    "str": "text",
    "bool": "true or false",
    "NoneType": "null",
    "list": "a list",
    "dict": "keys and values",
}


def one_line(message: str, options: Sequence[str], command: str) -> str:
    r"""Reduce a message of jsonargparse to what is wrong, where, and what would be right.

    `options` are those of the command, without dashes, such as "trainer.max_steps".

    Examples:
        >>> one_line('Parser key "trainer.max_steps":\n  Expected a <class \'int\'>. Got value: many', [], "fit")
        "trainer.max_steps is 'many': give a whole number"
    """
    return _explain([line for line in message.splitlines() if line.strip()], (), options, command)


def _explain(lines: Sequence[str], path: tuple[str, ...], options: Sequence[str], command: str) -> str:
    """Go down to the innermost part that says what is wrong. `path` has the keys and classes that lead to `lines`."""
    text, rest = lines[0].strip().removeprefix("- "), lines[1:]
    if is_ours(path[-2:-1]) and path[-1] in GROUPS and (value := _no_group(lines)) is not None:
        return f"{_where(path)} is {_shown(value)}: {GROUPS[path[-1]]}"
    if found := re.match(r'Parser key "(.+?)": ?(.*)', text):
        return _explain([found[2], *rest] if found[2] else rest, (*path, found[1]), options, command)
    if (found := re.match(r"Problem with given class_path '(.+)':$", text)) and rest:
        return _explain(rest, (*path, found[1]), options, command)
    if text.startswith("Does not validate against any of the Union subtypes"):
        causes = _bullets(rest)
        value = next((line.partition(": ")[2] for line in rest if line.strip().startswith("Given value:")), "")
        inner = next((cause for cause in causes if cause[0].startswith(_TELLING)), None)
        if inner is None:
            return _wrong_type(path, value, [cause[0].partition("Expected a ")[2] for cause in causes])
        nested = _NESTED.fullmatch(value)
        if nested and path[-1] == "trainer.callbacks" and "is not accepted" in inner[-1]:
            return (
                f"--trainer.callbacks.{nested[1]} is an option of the last callback, which has none of this name: "
                f"give the number of one, from 0, such as --trainer.callbacks.0.{nested[1]}"
            )
        return _explain(inner, path, options, command)
    if found := re.match("Expected a dot import path string: (.+)", text):
        meant = did_you_mean(found[1], [name for package in _PACKAGES for name in _classes(package)])
        whole = f"package.module.{found[1]}"
        return f"class_path is '{found[1]}': {meant}A class of your own is given with its module, such as {whole}"
    if found := re.match("Import path (.+) does not correspond to a subclass of (.+)", text):
        return f"{path[-1]}: {found[1]} is no {found[2]}: give a class that is one"
    if found := re.match("Not a valid subclass of (.+?). Got value: (.+)", text):
        return f"{path[-1]}: {_shown(found[2])} is no {found[1]}: give class_path and init_args, as the recipes do"
    if found := re.match(r"Expected a (.+?)(?:\. Got value: (.*))?$", text):
        return _wrong_type(path, found[2] or "", [found[1]])
    unknown = re.match(r"(?:Option|(?:Subcommand|Group) '.*' does not accept option) '(.+?)'", text)
    if found := unknown or re.match(r"unrecognized arguments: --?([^ =]+)", text):
        return _unknown(found[1], path, options, command)
    if found := re.match(r"module '(.+)' has no attribute '(.+)'", text):
        meant = did_you_mean(found[2], _classes(found[1]), before=f"{found[1]}.")
        return f"class_path is '{path[-1]}': {meant or f'{found[1]} has no {found[2]}'}".rstrip()
    if text.startswith("No module named"):
        return f"class_path is '{path[-1]}': {text[0].lower()}{text[1:]}: install it, or mend the path"
    if found := re.match(r"the following arguments are required: (?:\w+\.)?model", text):
        return f"no model is given: {PROGRAM} {command} --config RECIPE.yaml (`{PROGRAM} recipes` lists some)"
    where = f"{_where(path)}: " if path else ""
    return where + " ".join(line.strip() for line in [text, *rest])


def why_not_made(message: str) -> str | None:
    r"""Reduce a message of jsonargparse to why a class can't be made; None if it is about something else.

    Examples:
        >>> why_not_made(
        ...     "Does not validate against any of the Union subtypes\nErrors:\n"
        ...     "  - Expected a <class 'str'>\n  - no such device\nGiven value: Namespace(class_path='a.B')"
        ... )
        'a.B: no such device'
    """
    first, *lines = message.splitlines() or [""]
    made = re.search(r"class_path='(.+?)'", message)
    told = [part for part in _bullets(lines) if not part[0].startswith("- Expected a")]
    if not first.startswith("Does not validate against any of the Union subtypes") or made is None or not told:
        return None
    return f"{made[1]}: {' '.join(line.strip() for line in told[-1]).removeprefix('- ')}"


def is_ours(class_paths: Sequence[str]) -> bool:
    """Whether the options of ``GROUPS`` are meant: other classes may have options of these names."""
    return any(class_path.rpartition(".")[2] == "ThanosPruningCallback" for class_path in class_paths)


def _no_group(lines: Sequence[str]) -> str | None:
    """The value that is no keys and values where such are wanted; None if the message is of what is inside of it."""
    found = re.match(
        r"(?:- )?(?:Unable to load config '(.+)'|Expected a path but (.+) either not accessible or invalid"
        r"|Expected a dot import path string: (.+)|Expected a .*Sequence.*Got value: (.+))",
        lines[0].strip(),
    )
    if found:
        return next(value for value in found.groups() if value is not None)
    given = [line.strip().removeprefix("Given value") for line in lines if line.strip().startswith("Given value")]
    if lines[0].strip().startswith("Does not validate") and len(given) > 1 and not given[-2].endswith("'dict'>"):
        return given[-1].removeprefix(": ")
    return None


def _bullets(lines: Sequence[str]) -> list[list[str]]:
    """Split a list of errors into its parts."""
    start = next((number for number, line in enumerate(lines) if line.strip() == "Errors:"), len(lines)) + 1
    indent = len(lines[start]) - len(lines[start].lstrip()) if start < len(lines) else 0
    parts: list[list[str]] = []
    for line in lines[start:]:
        if len(line) - len(line.lstrip()) < indent:
            break
        if line[indent:].startswith("- "):
            parts.append([line.strip()])
        elif parts:
            parts[-1].append(line)
    return parts


def _where(path: tuple[str, ...]) -> str:
    """Name the last key and the class that it belongs to."""
    classes = [name for name in path[:-1] if name[name.rfind(".") + 1].isupper()]
    return f"{path[-1]} of {classes[-1].rpartition('.')[2]}" if classes else path[-1]


def _wrong_type(path: tuple[str, ...], value: str, types: Iterable[str]) -> str:
    known = [type_ for type_ in types if type_]
    choices: list[Any] = []
    for type_ in known:
        if found := re.search(r"Literal(\[.+\])", type_):
            choices += ast.literal_eval(found[1])
    if hint := _HINTS.get(path[-1]) if len(path) > 1 else None:
        mend = hint
    elif choices:
        mend = f"choose one of {', '.join(dict.fromkeys(map(str, choices)))}"
    else:
        mend = f"give {' or '.join(dict.fromkeys(map(_type_in_words, known))) or 'another value'}"
    if nested := _NESTED.fullmatch(value):
        return f"{path[-1]}.{nested[1]} is {nested[2]}: {mend}"
    return f"{_where(path)} is {_shown(value)}: {mend}"


def _type_in_words(type_: str) -> str:
    name = re.sub(r"<class '(.+)'>", r"\1", type_).partition("[")[0].rpartition(".")[2]
    return _TYPES.get(name, name)


def _shown(value: str) -> str:
    """Quote text, and leave other values as they are."""
    try:
        ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return value if value in ("true", "false", "null") else repr(value)
    return value


def _unknown(option: str, path: tuple[str, ...], options: Sequence[str], command: str) -> str:
    """Report an unknown option, and suggest a similar one."""
    if len(path) < 2:
        whole = option.removeprefix(f"{command}.")
        head, dot, tail = whole.partition(".")
        heads = {known.partition(".")[0] for known in options}
        meant = did_you_mean(whole, options)
        if not meant and head not in heads:
            meant = did_you_mean(head, heads, after=f"{dot}{tail}")
        return f"{command} has no option {whole}: {meant}`{PROGRAM} {command} --help` lists all"
    module, _, name = path[-1].rpartition(".")
    arguments = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    # --help lists nothing for a class inside a class
    listed = f"`{PROGRAM} {command} --{path[0]}.help={name}` lists all" if len(path) == 2 else ""
    return f"{name} has no option {option}: {did_you_mean(option, arguments)}{listed}".rstrip(": ")


def _classes(module: str) -> list[str]:
    return [name for name in dir(importlib.import_module(module)) if name[0].isupper()]
