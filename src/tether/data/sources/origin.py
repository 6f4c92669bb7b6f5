"""One source of rows and what is said of it: its path, its format, how often its rows occur. Called by `sources`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from pydantic import Field

from tether.data.rows.formats import FORMAT_NAMES, FORMATS, PATTERNED, PLAIN, Format, Wording, patterned
from tether.data.sources.files import listed
from tether.errors import Allowed, ConfigError

Source = Dataset | DatasetDict | IterableDataset | IterableDatasetDict | str | Path | Mapping[str, Any] | Sequence[Any]
_NAME_LENGTH = 200
Text = Annotated[str, Field(min_length=1)]
Names = Annotated[list[Text], Field(min_length=1)]
REVISION = Allowed("text (in quotes if it looks like a number), or null")
_KEYS = ("message_keys", "{role: speaker, content: text}")


@dataclass(frozen=True)
class Origin:
    """One source of rows, as a mapping in a run file says it: `{path: pairs.jsonl, format: chatml.intel}`.

    `path` may be rows in memory too. The run file has type, text and bounds of all other keys from here.
    """

    path: Any
    format: Annotated[
        Text | None,
        Field(description="How other tools lay out their rows; null: TRL's columns, or what it plainly is."),
        Allowed("the name of a format, such as chatml.intel; see docs/data.md"),
    ] = None
    fields: Annotated[
        dict[str, Text],
        Field(description="Name of a field to the column that holds it, as in {prompt: question}."),
    ] = field(default_factory=dict)
    weight: Annotated[
        float,
        Field(description="How often each row occurs: 2 twice, 0.5 every second one.", gt=0, lt=1e6),
        Allowed("a number above 0"),
    ] = 1.0
    fraction: Annotated[
        Annotated[float, Field(gt=0, lt=1e6)] | None,
        Field(
            description="Share of the rows of all sources, each of which has one then; the first rows are taken, none "
            "twice."
        ),
        Allowed("a number above 0, or null"),
    ] = None
    repeat: Annotated[
        bool,
        Field(
            description="Beside fraction: sources with too few rows for their share begin again, until all rows of all "
            "sources were taken."
        ),
        Allowed("true or false"),
    ] = False
    first: Annotated[
        Annotated[int, Field(ge=1)] | None,
        Field(description="Only that many rows, from the first on; null: all."),
        Allowed("a whole number from 1, or null"),
    ] = None
    roles: Annotated[
        dict[str, Text],
        Field(description="Other names of roles of messages to the usual ones, as in {bard: assistant}."),
    ] = field(default_factory=dict)
    message_keys: Annotated[
        dict[Literal["role", "content"], Text],
        Field(description="What messages call role and content, as in {role: speaker, content: text}."),
    ] = field(default_factory=dict)
    columns: Annotated[
        Names | None,
        Field(description="Only these columns are read; null: all."),
        Allowed("a list of columns, or null"),
    ] = None
    split: Annotated[
        Text,
        Field(description="Part of the data, also with bounds: train[:1000], train[10%:20%], train+test."),
        Allowed("a part, as in train"),
    ] = "train"
    name: Annotated[Text | None, Field(description="Configuration of a hub data set; null: its only one.")] = None
    revision: Annotated[Text | None, Field(description="Branch, tag or commit of a hub data set."), REVISION] = None
    data_dir: Annotated[Text | None, Field(description="Folder inside a hub data set; null: all of it.")] = None
    data_files: Annotated[
        Text | Names | None,
        Field(description="Files of a hub data set; null: those of the split."),
        Allowed("a path or pattern, or a list of them"),
    ] = None
    transform: Annotated[
        Text | None,
        Field(description="A function in a local file that makes of each row one with TRL's columns; the file is run."),
        Allowed("a file and a function in it, as in rows.py:as_pair, or null"),
    ] = None
    prompt_format: Annotated[
        Text | None,
        Field(description="Pattern of the prompt, for the format user_defined."),
        Allowed("text with {prompt}, or null"),
    ] = None
    chosen_format: Annotated[
        Text | None,
        Field(description="Pattern of the chosen completion, for the format user_defined."),
        Allowed("text with {chosen} in it, or null"),
    ] = None
    rejected_format: Annotated[
        Text | None,
        Field(description="Pattern of the rejected completion, for the format user_defined."),
        Allowed("text with {rejected} in it, or null"),
    ] = None
    completion_format: Annotated[
        Text | None,
        Field(description="Pattern of the completion, for the format user_defined."),
        Allowed("text with {completion} in it, or null"),
    ] = None

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
        if not isinstance(origin.repeat, bool):
            raise ConfigError(f"{name}: repeat is {origin.repeat!r}; it must be true or false.")
        if origin.repeat and origin.fraction is None:
            raise ConfigError(f"{name}: repeat is given without fraction, which it is about. Give a fraction.")
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
        ConfigError: some have one, or repeat rows, and others do not.
    """
    given = [one.fraction is not None for one in origins]
    if any(given) and not all(given):
        lacking = names_of(origins)[given.index(False)]
        raise ConfigError(f"{name}: fraction is given for some sources and not for {lacking}. Give all of them one.")
    if len({one.repeat for one in origins}) > 1:
        raise ConfigError(f"{name}: repeat is given for some sources and not for all. Give it for all of them.")
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
