"""Finds recipes, reads YAML in which 2:4 is text, and says the errors of jsonargparse in one line in place of forty."""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from thanos_lightning.checkpoints.folders import bring_back
from thanos_lightning.cli.mistakes import PROGRAM, Mistake, did_you_mean

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
# Lines after which the message is about one key, or about a class
_LEADS_TO = re.compile(r"""(?:Parser key "(.+?)"|Problem with given class_path '(.+)'):$""")
_GIVEN = "Given value: "  # begins the last line about a union of types
_NESTED = re.compile(r"NestedArg\(key='(.+?)', val=(.*)\)")  # of --model.learning_rate fast, say
_NO_GROUP = re.compile(  # a text in place of a group's options
    r"(?:Unable to load config|Expected a path but|Expected a dot import path string:) '?(.+?)'?(?: either not .*)?$"
)
SPECIAL = ("best", "last", "hpc")  # checkpoints that the Trainer finds itself
_CONFIG = ("-c", "--config")
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
# Of YAML
_MOST = 100_000  # values of a configuration
_TEXT = re.compile(r"^(?:[-+]?[0-9][0-9_]*:[0-9:._]+|[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}.*)$")  # base 60, and dates
_NUMBER = re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*[eE][-+]?[0-9]+|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?)$")
_OURS = [("tag:yaml.org,2002:str", _TEXT), ("tag:yaml.org,2002:float", _NUMBER)]


def one_line(message: str, options: Sequence[str], command: str) -> str:
    r"""Reduce a message of jsonargparse to what is wrong, where, and what would be right.

    `options` are those of the command, without dashes, such as "trainer.max_steps".

    Examples:
        >>> one_line('Parser key "trainer.max_steps":\n  Expected a <class \'int\'>. Got value: many', [], "fit")
        "trainer.max_steps is 'many': give a whole number"
    """
    # Keys and classes lead to the first line that says what is wrong, or to a union of types, none of which fits
    lines = [line for line in re.sub(r'(Parser key ".+?":) *', r"\1\n", message).splitlines() if line.strip()]
    nested = _NESTED.fullmatch(lines[-1].strip().removeprefix(_GIVEN))
    path: tuple[str, ...] = ()  # the keys and classes that lead to a line
    types: list[str] = []  # those of a union
    is_first = True  # of the lines about the end of the path
    for number, line in enumerate(lines):
        text = line.strip().removeprefix("- ")
        is_of_union = line.lstrip().startswith("- ")
        if found := _LEADS_TO.match(text):
            path, types, is_first = (*path, found[1] or found[2]), [], True
            continue
        if nested and path[:1] == ("trainer.callbacks",) and text.endswith("is not accepted"):
            return (
                f"--trainer.callbacks.{nested[1]} is an option of the last callback, which has none of this name: "
                f"give the number of one, from 0, such as --trainer.callbacks.0.{nested[1]}"
            )
        if (said := _what_is_wrong(text, path, options, command)) is not None:
            return said
        if text.startswith(_GIVEN):  # no line about the union's types has said more
            return _wrong_type(path, text.removeprefix(_GIVEN), types)
        if found := re.match(r"Expected a (.+?)(?:\. Got value: (.*))?$", text):
            types.append(found[1])
            if not is_of_union:
                return _wrong_type(path, found[2] or "", types)
        elif is_first and not is_of_union and not text.startswith("Does not validate against any of the Union"):
            return (f"{_where(path)}: " if path else "") + _joined(lines[number:])
        is_first = False
    return _joined(lines)


def _what_is_wrong(text: str, path: tuple[str, ...], options: Sequence[str], command: str) -> str | None:
    """Explain a line that says by itself what is wrong; None for other lines."""
    if _is_group(path) and (found := _NO_GROUP.match(text)):
        return _wrong_type(path, found[1], [])
    if found := re.match("Expected a dot import path string: (.+)", text):
        meant = did_you_mean(found[1], [name for package in _PACKAGES for name in _classes(package)])
        whole = f"package.module.{found[1]}"
        return f"class_path is '{found[1]}': {meant}A class of your own is given with its module, such as {whole}"
    if found := re.match("Import path (.+) does not correspond to a subclass of (.+)", text):
        return f"{path[-1]}: {found[1]} is no {found[2]}: give a class that is one"
    if found := re.match("Not a valid subclass of (.+?). Got value: (.+)", text):
        return f"{path[-1]}: {_shown(found[2])} is no {found[1]}: give class_path and init_args, as the recipes do"
    unknown = re.match(r"(?:Option|(?:Subcommand|Group) '.*' does not accept option) '(.+?)'", text)
    if found := unknown or re.match(r"unrecognized arguments: --?([^ =]+)", text):
        return _unknown(found[1], path, options, command)
    if found := re.match(r"module '(.+)' has no attribute '(.+)'", text):
        meant = did_you_mean(found[2], _classes(found[1]), before=f"{found[1]}.")
        return f"class_path is '{path[-1]}': {meant or f'{found[1]} has no {found[2]}'}".rstrip()
    if text.startswith("No module named"):
        return f"class_path is '{path[-1]}': {text[0].lower()}{text[1:]}: install it, or mend the path"
    if re.match(r"the following arguments are required: (?:\w+\.)?model", text):
        return f"no model is given: {PROGRAM} {command} --config RECIPE.yaml (`{PROGRAM} recipes` lists some)"
    return None


def why_not_made(message: str) -> str | None:
    r"""Reduce a message of jsonargparse to why a class can't be made; None if it is about something else.

    Examples:
        >>> why_not_made(
        ...     "Does not validate against any of the Union subtypes\nErrors:\n"
        ...     "  - Expected a <class 'str'>\n  - no such device\nGiven value: Namespace(class_path='a.B')"
        ... )
        'a.B: no such device'
    """
    made = re.search(r"class_path='(.+?)'", message)
    attempts = message.partition("Given value")[0].split("\n  - ")[1:]
    told = [attempt for attempt in attempts if not attempt.startswith("Expected a")]
    if not message.startswith("Does not validate against any of the Union subtypes") or made is None or not told:
        return None
    return f"{made[1]}: {' '.join(told[-1].split())}"


def is_ours(class_paths: Sequence[str]) -> bool:
    """Whether the options of ``GROUPS`` are meant: other classes may have options of these names."""
    return any(class_path.rpartition(".")[2] == "ThanosPruningCallback" for class_path in class_paths)


def _is_group(path: tuple[str, ...]) -> bool:
    return is_ours(path[-2:-1]) and path[-1] in GROUPS


def _joined(lines: Sequence[str]) -> str:
    """Join the first line and those after it that are indented at least as far."""
    indent = lines[0][: -len(lines[0].lstrip())]
    return " ".join(line.strip() for line in itertools.takewhile(lambda line: line.startswith(indent), lines))


def _where(path: tuple[str, ...]) -> str:
    """Name the last key and the class that it belongs to."""
    classes = [name for name in path[:-1] if name[name.rfind(".") + 1].isupper()]
    return f"{path[-1]} of {classes[-1].rpartition('.')[2]}" if classes else path[-1]


def _wrong_type(path: tuple[str, ...], value: str, types: Iterable[str]) -> str:
    choices: list[Any] = []
    for type_ in types:
        if found := re.search(r"Literal(\[.+\])", type_):
            choices += ast.literal_eval(found[1])
    if _is_group(path):
        mend = GROUPS[path[-1]]
    elif len(path) > 1 and path[-1] in _HINTS:
        mend = _HINTS[path[-1]]
    elif choices:
        mend = f"choose one of {', '.join(dict.fromkeys(map(str, choices)))}"
    else:
        mend = f"give {' or '.join(dict.fromkeys(map(_type_in_words, types))) or 'another value'}"
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


def recipes() -> dict[str, Path]:
    """Map each name that `fit --config` takes to its file, the smallest model first."""

    def size(file: Path) -> tuple[float, str]:  # a quickstart names none
        found = re.search(r"-([0-9.]+)([mb])-", file.stem)
        return (float(found[1]) * {"m": 1e6, "b": 1e9}[found[2]] if found else 0, file.stem)

    return {file.stem: file for file in sorted(_folder("recipes").glob("*.yaml"), key=size)}


def launch_files() -> dict[str, Path]:
    """Map file names to the files that start a training on several machines."""
    return {file.name: file for file in sorted(_folder("launch").iterdir())}


def _folder(name: str) -> Path:
    """Find a folder inside the package (installed from a wheel) or beside it (in a clone)."""
    package = Path(__file__).parents[1]
    return package / name if (package / name).is_dir() else package.parent / name


def headline(file: Path) -> str:
    """Return the first sentence of the comment at the head of a file."""
    lines = (line for line in file.read_text(encoding="utf-8").splitlines() if not line.startswith("#!"))
    head = itertools.takewhile(lambda line: line.startswith("# "), lines)
    sentence, *_ = " ".join(line.removeprefix("# ") for line in head).split(". ")
    return sentence.rstrip(".:")


def find(name: str, among: Mapping[str, Path]) -> Path:
    """Return the file of a name. Raises ValueError if no file has it."""
    if name not in among:
        meant = did_you_mean(name, among)
        raise ValueError(f"{name!r} is no recipe or launch file: {meant}`thanos-lightning recipes` lists all")
    return among[name]


def with_recipes(argv: list[str]) -> list[str]:
    """Replace a recipe's name after --config by the recipe's file, unless there is a file of that name."""
    known = recipes()

    def file_of(name: str) -> str:
        if name in known and not Path(name).exists():
            return str(known[name])
        _require_configuration(name, known)
        return name

    split = _split(argv, _CONFIG)
    if split and split[-1] in _CONFIG:
        raise Mistake(f"{split[-1]} has no value: give a recipe's name, such as quickstart, or a YAML file")
    return [
        file_of(argument) if before in _CONFIG else argument
        for before, argument in zip(["", *split], split, strict=False)
    ]


def require_checkpoint(argv: Sequence[str]) -> None:
    """Refuse a --ckpt_path that is not there."""
    split = _split(argv, ("--ckpt_path",))
    for option, name in pairwise(split):
        path = Path(name)
        if option == "--ckpt_path" and name not in ("null", *SPECIAL) and "://" not in name:
            bring_back(path)
            if not path.exists():
                raise Mistake(f"{name} does not exist: give a file that does")


def _split(argv: Iterable[str], options: tuple[str, ...]) -> list[str]:
    """Part these options from their values where both are one argument."""
    split: list[str] = []
    for argument in argv:
        option, equals, value = argument.partition("=")
        split += [option, value] if equals and option in options else [argument]
    return split


def _require_configuration(name: str, known: Iterable[str]) -> None:
    """Refuse a --config that jsonargparse couldn't read."""
    path = Path(name)
    if "://" in name or name.lstrip().startswith("{"):  # fsspec's URLs, and configurations as text
        return
    if path.is_dir():
        raise Mistake(f"--config {name} is a folder: give a YAML file, or a recipe's name")
    if path.exists() and not path.is_file():
        from thanos_lightning.checkpoints.foreign import require_regular  # imports torch

        require_regular(path)
    if not path.exists():
        raise Mistake(
            f"--config {name}: there is no such file (in {Path.cwd()}), and no recipe is called so: "
            f"{did_you_mean(path.stem, known)}"
            "`thanos-lightning recipes` lists them"
        )
    try:
        content = load_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where, why = ("", error) if mark is None else (f" in line {mark.line + 1}", getattr(error, "problem", error))
        raise Mistake(f"--config {name} is no YAML: {why}{where}") from error
    if not isinstance(content, dict):
        what = "is empty" if content is None else "holds no keys"
        raise Mistake(f"--config {name} {what}: give a YAML file as `thanos-lightning recipes quickstart` prints one")


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
