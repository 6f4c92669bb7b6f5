"""Reading and writing YAML: strict about keys, and with the numbers and switches that people mean.

PyYAML reads YAML 1.1, where `5e-6` is text, `no` is false, `010` is eight and `1:30` is ninety. Here the rules of
YAML 1.2 hold: `5e-6` is a number, only `true` and `false` are switches, and the rest is text.

PyYAML's nodes and not ruamel.yaml, which was tried: it reads `2020-01-01` as a date, `1_000` and `0o17` as numbers, and
gives numbers of classes of its own, so that as much code would undo that as the rules below take; and it was slower (60
keys in 66 ms, against 26 ms).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any

import yaml

from tether.errors import ConfigError

KeyPath = tuple[str | int, ...]
# Aliases of aliases unfold to any number of values; no run has nearly so many.
_VALUES, _DIGITS = 100_000, 100
_RESOLVERS = (
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("merge", r"<<", "<"),
)


class _Loader(yaml.SafeLoader):
    """Builds plain values only, never objects."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (yaml fills it per class)


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads back as the same values."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _name, _pattern, _first in _RESOLVERS:
    for _class in (_Loader, _Dumper):
        _letters = ["" if letter == "\0" else letter for letter in _first]
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(rf"^(?:{_pattern})$"), _letters)


def _whole_number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    if len(node.value) > _DIGITS:
        problem = f"expected a whole number of at most {_DIGITS} digits, got one of {len(node.value)}"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
    return int(node.value)  # the integers of 1.1 would read 010 as eight


_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)


def read_document(path: Path) -> tuple[dict[str, Any], dict[KeyPath, int]]:
    """Read a YAML file whose top is a mapping.

    Args:
        path: the file.

    Returns:
        Its values, and the line of every key by its path.

    Raises:
        ConfigError: there is no such file, it is not YAML, a key is given twice or is not text.
    """
    values, lines = parse(read_text(path), str(path))
    if not isinstance(values, dict):
        came = "nothing" if values is None else f"a {type(values).__name__}"
        raise ConfigError(
            f"{path} holds {came}; a run file is a mapping that begins with keys such as `model:` and `data:`."
        )
    return values, lines


def read_text(path: Path, encoding: str = "utf-8") -> str:
    """The text of a run file.

    Raises:
        ConfigError: there is no such file, or it is not UTF-8.
    """
    if not path.is_file():
        raise ConfigError(_missing_file(path))
    try:
        return path.read_text(encoding=encoding)
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}). Save it as UTF-8."
        ) from error


def parse(text: str, name: str) -> tuple[Any, dict[KeyPath, int]]:
    """Parse YAML text.

    Args:
        text: one document.
        name: what to call it in messages.

    Returns:
        The value, and the line of every key by its path.

    Raises:
        ConfigError: it is not YAML, a key is given twice or is not text.
    """
    lines: dict[KeyPath, int] = {}
    return build_with(_Loader, text, name, lambda node: _record_lines(node, (), lines, name, ())), lines


def build_with(kind: type[yaml.SafeLoader], text: str, name: str, look: Callable[[yaml.Node], None]) -> Any:
    """The value of YAML text by a loader's rules; None for none.

    Args:
        kind: the loader.
        text: one document.
        name: what to call it in messages.
        look: sees the document before it is built, and may refuse it.

    Raises:
        ConfigError: it is not YAML.
    """
    loader = kind("")
    try:
        loader = kind(text)
        node = loader.get_single_node()
        if node is None:
            return None
        look(node)
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        raise ConfigError(_syntax_problem(error, name)) from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{name} is not YAML: {' '.join(str(error).split())}.") from error
    finally:
        loader.dispose()


def write_document(values: Any, *, flow: bool = False) -> str:
    """YAML that `parse` reads back as the same values, in their order; `flow` writes all in a line."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100, default_flow_style=flow)


def _record_lines(node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int], name: str, above: tuple[int, ...]) -> None:
    if id(node) in above:
        raise ConfigError(f"{name}, line {node.start_mark.line + 1}: `{dotted(path)}` contains itself.")
    refuse_unfolding(lines, name)
    above = (*above, id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[(*path, index)] = item.start_mark.line + 1
            _record_lines(item, (*path, index), lines, name, above)
    if not isinstance(node, yaml.MappingNode):
        return
    own: set[str] = set()
    for key, value in node.value:
        line = key.start_mark.line + 1
        if key.tag == "tag:yaml.org,2002:merge":
            continue
        if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
            raise ConfigError(
                f"{name}, line {line}: the key `{getattr(key, 'value', '')}` is not text. Put a name in quotes."
            )
        here = (*path, key.value)
        if key.value in own:
            raise ConfigError(
                f"{name}, line {line}: `{dotted(here)}` was given before, on line {lines[here]}. Keep one of the two."
            )
        own.add(key.value)
        lines[here] = line
        _record_lines(value, here, lines, name, above)


def beginning(path: KeyPath, known: Container[KeyPath]) -> KeyPath:
    """The longest beginning of a path that is known; empty where none is."""
    return next((path[:length] for length in range(len(path), 0, -1) if path[:length] in known), ())


def dotted(path: KeyPath) -> str:
    """A key as overrides write it: `train.batch_size`."""
    return ".".join(map(str, path))


def refuse_unfolding(lines: Mapping[KeyPath, int], name: str) -> None:
    """Refuse a file whose aliases unfold without end, while its values are counted.

    Raises:
        ConfigError: there are more values than any file of people has.
    """
    if len(lines) > _VALUES:
        raise ConfigError(
            f"{name} has more than {_VALUES:,} values, as aliases (`*name`) of aliases unfold to. Write out what is "
            "meant."
        )


def _syntax_problem(error: yaml.MarkedYAMLError, name: str) -> str:
    """A sentence about text that is not YAML, with its place."""
    mark = error.problem_mark or error.context_mark
    where = f"{name}, line {mark.line + 1}, column {mark.column + 1}" if mark else name
    problem = error.problem or "cannot be understood"
    if "'\\t'" in problem:
        return f"{where}: there is a tab. YAML is indented with spaces; replace the tab by spaces."
    if "constructor for the tag" in problem:
        return (
            f"{where}: the tag {problem.rpartition(' ')[2]} is not read. Write a plain value: text, a number, a list."
        )
    if "another document" in problem:
        return f"{where}: a second document begins. Keep one in the file."
    context = f" {error.context}" if error.context else ""
    return (
        f"{where}: this is not YAML: {problem}{context}. Check the indentation, the colons and the quotes of that line."
    )


def _missing_file(path: Path) -> str:
    """A sentence about a run file that is not there, with the nearest name that is."""
    if path.is_dir():
        return f"{path} is a folder; give the run file in it, a YAML file."
    if path.exists():
        return f"{path} is not a file that can be read; give a YAML file."
    names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    hint = f" Did you mean '{path.parent / near[0]}'?" if near else ""
    return (
        f"The run file '{path}' does not exist.{hint} Give the path of a YAML file; a relative one starts in "
        f"'{Path.cwd()}'."
    )
