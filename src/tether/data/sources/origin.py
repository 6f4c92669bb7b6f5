"""One source of rows and what is said of it: its path, its format, how often its rows occur. Called by `sources`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

from tether.data.rows.formats import FORMAT_NAMES, FORMATS, PATTERNED, PLAIN, Format, Wording, patterned
from tether.data.sources.files import listed
from tether.errors import ConfigError

Source = Dataset | DatasetDict | IterableDataset | IterableDatasetDict | str | Path | Mapping[str, Any] | Sequence[Any]
_NAME_LENGTH = 200
_KEYS = ("message_keys", "{role: speaker, content: text}")


@dataclass(frozen=True)
class Origin:
    """One source of rows, as a mapping in a run file says it: `{path: pairs.jsonl, format: chatml.intel}`.

    Args:
        path: a path, glob, folder or hub name, or a list of paths; or rows in memory.
        format: name of the layout of its rows (`tether.data.rows.formats`); None: TRL's columns, or what it plainly is.
        fields: name of a field as the format reads it to the name of the column that holds it.
        weight: how often each row occurs: 2 twice, 0.5 every second one, drawn by its place.
        fraction: share of its rows among those of all sources; the first rows, and none twice; None: all rows.
        first: only that many rows, from the first on; None: all.
        roles: roles of messages by other names, as in {bard: assistant}.
        message_keys: what messages call `role` and `content`, as in {role: speaker, content: text}.
        columns: only these columns are read; None: all.
        split: which part of a hub data set, or of a folder whose files are named after parts.
        name: which configuration of a hub data set.
        revision: branch, tag or commit of a hub data set.
        data_dir: folder inside a hub data set.
        data_files: files of a hub data set, or patterns of them.
        transform: a function in a local file that makes of a row one with TRL's columns; see `transform_of`.
        prompt_format: pattern of the prompt, for the format `user_defined`; so for the other parts of a row.
        chosen_format: see `prompt_format`.
        rejected_format: see `prompt_format`.
        completion_format: see `prompt_format`.
    """

    path: Any
    format: str | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    weight: float = 1.0
    fraction: float | None = None
    first: int | None = None
    roles: Mapping[str, str] = field(default_factory=dict)
    message_keys: Mapping[str, str] = field(default_factory=dict)
    columns: Sequence[str] | None = None
    split: str = "train"
    name: str | None = None
    revision: str | None = None
    data_dir: str | None = None
    data_files: Any = None
    transform: str | None = None
    prompt_format: str | None = None
    chosen_format: str | None = None
    rejected_format: str | None = None
    completion_format: str | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any], name: str) -> Origin:
        """Read a mapping.

        Raises:
            ConfigError: a key is not known, or a value is not allowed.
        """
        known = [one.name for one in fields(cls)]
        for key in given:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f"Did you mean `{near[0]}`?" if near else f"Known are {listed(known)}."
                raise ConfigError(f"{name}: a source has the key `{key}`, which is not known. {hint}")
        origin = cls(**{key: value for key, value in given.items() if value is not None})
        for key, rate in (("weight", origin.weight), ("fraction", origin.fraction)):
            if rate is not None and (
                isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate < 1e6
            ):
                raise ConfigError(f"{name}: {key} is {rate!r}; it must be a number above 0.")
        if origin.fraction is not None and origin.weight != 1:
            raise ConfigError(
                f"{name}: weight says how often a row occurs and fraction which share all rows of the source have. "
                "Leave one of them out."
            )
        if (
            isinstance(origin.first, bool)
            or not isinstance(origin.first, int | None)
            or (origin.first is not None and origin.first < 1)
        ):
            raise ConfigError(f"{name}: first is {origin.first!r}; it must be a whole number from 1.")
        for key, example in (("fields", "{prompt: question}"), ("roles", "{bard: assistant}"), _KEYS):
            renamed = getattr(origin, key)
            if not isinstance(renamed, Mapping) or not all(
                isinstance(one, str) for kv in renamed.items() for one in kv
            ):
                raise ConfigError(f"{name}: {key} is {renamed!r}; it must be a mapping such as {example}.")
        if strange := sorted(origin.message_keys.keys() - {"role", "content"}):
            raise ConfigError(f"{name}: message_keys has {strange[0]!r}; allowed are role and content.")
        return origin

    @property
    def hub(self) -> dict[str, Any]:
        """What is said of a hub data set beside its name and split, as `datasets.load_dataset` takes it."""
        given = {key: getattr(self, key) for key in ("name", "revision", "data_dir", "data_files")}
        return {key: value for key, value in given.items() if value is not None}

    def layout(self, name: str) -> Format | None:
        """The format that is named.

        Raises:
            ConfigError: there is none of this name, or patterns stand beside another one.
        """
        patterns = {
            part: pattern
            for part in ("prompt", "chosen", "rejected", "completion")
            if (pattern := getattr(self, f"{part}_format")) is not None
        }
        if patterns and self.format not in PATTERNED:
            first = next(iter(patterns))
            raise ConfigError(
                f"{name}: {first}_format is given with the format `{self.format}`, which does not read it. Set "
                "`format: user_defined`, or leave it out."
            )
        if self.format is None or self.format in PLAIN:
            return None
        if self.format in PATTERNED:
            return patterned(Wording(patterns))
        if self.format not in FORMATS:
            near = difflib.get_close_matches(str(self.format), FORMAT_NAMES, n=1, cutoff=0.5)
            hint = f"Did you mean `{near[0]}`? " if near else ""
            raise ConfigError(f"{name}: there is no format `{self.format}`. {hint}There are {', '.join(FORMAT_NAMES)}.")
        return FORMATS[self.format]


def by_fractions(origins: Sequence[Origin], name: str) -> bool:
    """Whether the sources have shares of all rows.

    Raises:
        ConfigError: some have one, and others do not.
    """
    given = [one.fraction is not None for one in origins]
    if any(given) and not all(given):
        lacking = names_of(origins)[given.index(False)]
        raise ConfigError(f"{name}: fraction is given for some sources and not for {lacking}. Give all of them one.")
    return any(given)


def names_of(origins: Sequence[Origin]) -> list[str]:
    """What to call sources in messages: their paths, or their number where they are rows in memory."""
    named = [
        str(one.path)
        if isinstance(one.path, (str, Path)) or all(isinstance(item, (str, Path)) for item in _items(one.path))
        else f"source {number}"
        for number, one in enumerate(origins, 1)
    ]
    return [text if len(text) <= _NAME_LENGTH else f"{text[:_NAME_LENGTH]}…" for text in named]


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [None]


def is_origin(value: Any) -> bool:
    """Whether a value is a mapping that names a source, and not a row or a mapping of names to sources."""
    return isinstance(value, Mapping) and "path" in value


def origins_of(source: Source, split: str, name: str) -> list[Origin]:
    if is_origin(source):
        return [Origin.of(cast(Mapping[str, Any], source), name)]
    if isinstance(source, Sequence) and not isinstance(source, str) and any(map(is_origin, source)):
        mixed: list[Mapping[str, Any]] = [item if is_origin(item) else {"path": item} for item in source]
        return [Origin.of(item, name) for item in mixed]
    return [Origin(source, split=split)]
