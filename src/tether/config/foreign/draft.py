"""What a conversion works on: the foreign file as read, and the run file that it becomes, with the fate of each key."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from tether.config.document import KeyPath, beginning
from tether.config.foreign.document import Document
from tether.config.foreign.table import Mark
from tether.config.problems import dotted, wrong_value
from tether.errors import ConfigError

# In a foreign file, keys of the run file that the tool has no word for.
OWN = "tether"
_NUMBER_WORDS = "a number"


@dataclass
class Fate:
    """What became of one key.

    Args:
        key: as the file has it.
        value: what was given.
        mark: see `Row`.
        became: keys of the run file with their values, or words.
        reason: why.
        there: what the tool itself does with the key, where that is nothing.
    """

    key: str
    value: Any
    mark: Mark
    became: list[str] = field(default_factory=list)
    reason: str = ""
    there: str = ""


class Source:
    """A foreign file with the overrides that were given in its own words."""

    def __init__(self, tool: str, document: Document, given: Mapping[KeyPath, str] | None = None) -> None:
        self.tool, self.values, self.path = tool, document.values, document.path
        self.lines, self.given = document.lines, dict(given or {})
        self.command = ""  # TRL's: which trainer it is
        self.looked_up: dict[str, Any] = {}  # what rules have read from elsewhere, so that it is read once

    def place(self, *path: str | int) -> str:
        """Where a key was given, for messages."""
        known = beginning(path, {**self.lines, **self.given})
        if known in self.given:
            return f"argument '{self.given[known]}'"
        return f"{self.path}, line {self.lines[known]}" if known else str(self.path)

    def refuse(self, path: str | KeyPath, problem: str) -> NoReturn:
        """Stop at a key.

        Raises:
            ConfigError: always.
        """
        path = (path,) if isinstance(path, str) else path
        named = "" if f"`{path[0]}" in problem else f"`{dotted(path)}`: "
        raise ConfigError(f"{self.place(*path)}: {named}{problem}")

    def wrong(self, path: str | KeyPath, value: Any, allowed: str) -> NoReturn:
        """Stop at a value; `allowed` completes "allowed is".

        Raises:
            ConfigError: always.
        """
        path = (path,) if isinstance(path, str) else path
        self.refuse(path, wrong_value(path, value, allowed))

    def has(self, key: str) -> bool:
        """Whether a key is given, and not empty."""
        return self.values.get(key) is not None

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key; an empty one is none."""
        return self.values[key] if self.has(key) else default

    def number(self, key: str, default: float | None = None) -> Any:
        """A number, also in quotes."""
        value = self.get(key, default)
        made = as_number(value)
        if value is not None and (made is None or not math.isfinite(made)):
            self.wrong(key, value, _NUMBER_WORDS)
        return made

    def flag(self, key: str, default: bool = False) -> bool:
        """A switch."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            self.wrong(key, value, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> Any:
        """Text."""
        value = self.get(key, default)
        if value is not None and not isinstance(value, str):
            self.wrong(key, value, "text")
        return value

    def names(self, key: str) -> list[str] | None:
        """A list of names, also as one text with commas."""
        return self.listed(key, self.get(key))

    def listed(self, path: str | KeyPath, value: Any) -> list[str] | None:
        """A value as a list of names; see `names`."""
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",") if part.strip()]
        if value is not None and not (isinstance(value, list) and all(isinstance(one, str) for one in value)):
            self.wrong(path, value, "a list of names")
        return value

    def mapping(self, key: str) -> dict[str, Any]:
        """A mapping; empty where the key is."""
        value = self.get(key, {})
        if not isinstance(value, dict):
            self.wrong(key, value, "a mapping")
        return value

    def one_of(self, key: str, allowed: Iterable[str], default: str | None = None) -> Any:
        """One of some names."""
        value, names = self.get(key, default), list(allowed)
        if value is not None and value not in names:
            self.wrong(key, value, ", ".join(names))
        return value


class Draft:
    """A run file in the making."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.values: dict[str, Any] = {}
        self.fates: dict[str, Fate] = {}
        self.comments: dict[str, str] = {}
        self.origins: dict[KeyPath, str] = {}
        self.resume: str | None = None
        self.processes = 1

    def set(self, target: str, value: Any, key: str = "", comment: str = "") -> None:
        """Say a key of the run file.

        Args:
            target: its dotted key.
            value: its value.
            key: of the foreign file that says it; empty: the tool's own default.
            comment: a line for the converted file.

        Raises:
            ConfigError: another key said it, with another value.
        """
        path = tuple(target.split("."))
        section = self.values
        for part in path[:-1]:
            section = section.setdefault(part, {})
        if path[-1] in section and section[path[-1]] != value and key:
            other = self.origins.get(path) or "another key"
            self.source.refuse(key, f"`{key}` and `{other}` both say `{target}`, and differ. Leave one of them out.")
        section[path[-1]] = value
        self.origins[path] = key
        if comment:
            self.comments[target] = comment
        if key in self.fates:
            self.fates[key].became.append(target)

    def get(self, target: str, default: Any = None) -> Any:
        """What the run file says at a dotted key so far."""
        section: Any = self.values
        for part in target.split("."):
            section = section.get(part) if isinstance(section, dict) else None
        return default if section is None else section

    def note(self, key: str, reason: str, there: str = "") -> None:
        """Say that a key needs nothing here, though its table has a rule for it."""
        if key in self.fates:
            self.fates[key].mark, self.fates[key].reason, self.fates[key].there = "note", reason, there

    def explain(self, key: str, reason: str, there: str = "") -> None:
        """Say more of what became of a key."""
        if key in self.fates:
            fate = self.fates[key]
            fate.reason, fate.there = ". ".join(filter(None, (fate.reason, reason))), there or fate.there

    def place(self, path: KeyPath) -> str:
        """Where a key of the run file comes from, for messages."""
        key = self.origins.get(beginning(path, {path for path, key in self.origins.items() if key}))
        if key is None:
            return f"{self.source.path} (as it was converted)"
        return f"{self.source.place(key.split('.')[0].split('[')[0])}, `{key}`"


def as_number(value: Any) -> int | float | None:
    """A number, or text that is one; None for everything else."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
        return int(value) if value.is_integer() and abs(value) < 2**53 else value
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None
