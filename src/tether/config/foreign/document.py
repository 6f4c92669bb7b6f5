"""Reading YAML as the tools do that a file was written for: YAML 1.1 with `5e-6` as a number, the last of two keys.

TRL and Axolotl read with PyYAML and turn text into the type of an option, LLaMA-Factory reads with OmegaConf; in all of
them `5e-6` and `500_000` are numbers and `yes` is true. Called by `convert`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tether.config.document import KeyPath, build_with, read_text, refuse_unfolding
from tether.errors import ConfigError

_FLOAT = re.compile(r"^[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)$")


class _Loader(yaml.SafeLoader):
    """Builds plain values only, never objects."""


# A date stays the text that it is; every option that looks like one is a name.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if tag != "tag:yaml.org,2002:timestamp"]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


@dataclass
class Document:
    """A file of another tool as it reads it.

    Args:
        path: the file.
        values: its mapping.
        lines: line of each key, by its path.
        doubled: top-level keys that are given twice, with the lines that do not count.
    """

    path: Path
    values: dict[str, Any]
    lines: dict[KeyPath, int] = field(default_factory=dict)
    doubled: dict[str, list[int]] = field(default_factory=dict)


def read_foreign(path: Path) -> Document:
    """Read a file by the rules of the tools.

    Raises:
        ConfigError: there is no such file, or it is not a YAML mapping with names as keys.
    """
    document = Document(path, {})
    document.values = parse_foreign(read_text(path, "utf-8-sig"), str(path), document.lines, document.doubled)
    if not isinstance(document.values, dict):
        raise ConfigError(f"{path} holds no mapping; a configuration begins with keys such as `model_name_or_path:`.")
    return document


def parse_foreign(text: str, name: str, lines: dict[KeyPath, int] | None = None, doubled: Any = None) -> Any:
    """The value of YAML text.

    Args:
        text: one document.
        name: what to call it in messages.
        lines: gets the line of each key, by its path.
        doubled: gets the lines of top-level keys that are given again further down.

    Raises:
        ConfigError: it is not YAML.
    """
    found, again = {} if lines is None else lines, {} if doubled is None else doubled
    return build_with(_Loader, text, name, lambda node: _look(node, (), found, again, name, ()))


def _look(
    node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int], doubled: Any, name: str, above: tuple[int, ...]
) -> None:
    if id(node) in above:
        raise ConfigError(f"{name}, line {node.start_mark.line + 1}: the value contains itself.")
    refuse_unfolding(lines, name)
    above = (*above, id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[(*path, index)] = item.start_mark.line + 1
            _look(item, (*path, index), lines, doubled, name, above)
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        line = key.start_mark.line + 1
        if key.tag == "tag:yaml.org,2002:merge":
            continue
        if not isinstance(key, yaml.ScalarNode) or (not path and key.tag != "tag:yaml.org,2002:str"):
            raise ConfigError(f"{name}, line {line}: a key must be a name. Put it in quotes.")
        here = (*path, key.value)
        if here in lines and not path:
            doubled.setdefault(key.value, []).append(lines[here])
        lines[here] = line
        _look(value, here, lines, doubled, name, above)
