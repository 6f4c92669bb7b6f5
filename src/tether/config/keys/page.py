"""The page of the run file's keys, docs/run_file.md: `python -m tether.config.keys.page` prints it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from typing import Any

from tether.config.fields import config_class, configs_by_algorithm, fields_under, losses_by_algorithm
from tether.config.keys.unknown import KEYS
from tether.config.problems import retired_hints, section_in
from tether.config.run import RunConfig, Train
from tether.config.sections import Data, Judge, Lora, Model, Reference, Remote, Rollout, Rows, Section, Sizes, Sync
from tether.config.words import describe_type, field_types
from tether.training import PreferenceConfig
from tether.training.declaration import Text, default_of

_HEAD = """\
# The run file

Every key, with its type, its default and what it does. This page is written by `python -m tether.config.keys.page`; a
test compares the two. Keys that are not here are refused, with the nearest one that exists.
`tether train run.yaml train.max_length=512` sets a key for one run.
"""
_OBJECTIVE = """
## `objective`

`loss` names the loss (docs/choosing_an_objective.md); the others are its options.
"""
_PEFT = """
## `peft`

`type` names a kind of adapter (docs/models.md); the others are fields of PEFT's configuration.
"""
_SECTIONS: tuple[tuple[str, type[Section]], ...] = (
    ("model", Model),
    ("lora", Lora),
    ("data", Data),
    ("data.train", Rows),
    ("data.images", Sizes),
    ("reference", Reference),
    ("reference.sync", Sync),
    ("reference.remote", Remote),
    ("rewards", Judge),
    ("rollout", Rollout),
    ("train", Train),
)
# A sentence of transformers' own text is enough.
_LONG = 200


def run_file_page() -> str:
    """The page in Markdown."""
    parts = [_HEAD, *_table("the file", RunConfig)]
    for name, section in _SECTIONS:
        doc = " ".join((section.__doc__ or "").split())
        parts += [f"\n## `{name}`\n\n{doc}\n", *_table(name, section)]
    parts += ["\n### Further keys of `train`\n\nFields of transformers' and of Tether's configuration.\n"]
    parts += _rows_of_fields("train", [config_class("sigmoid")])
    parts.append(_OBJECTIVE)
    parts += _rows_of_fields("objective", configs_by_algorithm().values())
    parts.append(_PEFT)
    return "\n".join(parts)


def _table(name: str, section: type[Section]) -> Iterator[str]:
    yield from _HEADER
    for key, info in section.model_fields.items():
        words = next((one.words for one in info.metadata if hasattr(one, "words")), None)
        default = "must be given" if info.is_required() else _value(info.get_default(call_default_factory=True))
        yield _row(key, words or describe_type(info.annotation), default, info.description or "")


_HEADER = ("| key | allowed | default | what it does |", "|---|---|---|---|")


def _rows_of_fields(section: str, configs: Iterable[type[PreferenceConfig]]) -> Iterator[str]:
    yield from _HEADER
    seen: set[str] = set()
    for config in configs:
        types = field_types(config)
        for key, name in fields_under(section, config).items():
            if key in seen or (section == "train" and key in Train.model_fields):
                continue
            seen.add(key)
            field = config.__dataclass_fields__[name]
            text = field.metadata.get("help") or ""
            words = text.listed("null") if isinstance(text, Text) and text.allowed else describe_type(types[name])
            yield _row(key, words, _value(default_of(field)), str(text))


def _value(default: Any) -> str:
    if isinstance(default, Section):
        return "its own defaults"
    if default is dataclasses.MISSING:
        return "must be given"
    return f"`{json.dumps(getattr(default, 'value', default), default=str)}`"


def _row(key: str, allowed: str, default: str, text: str) -> str:
    plain = " ".join(str(text).split())
    first = plain if len(plain) <= _LONG else plain.partition(". ")[0]
    first = first if len(first) <= _LONG else f"{first[: _LONG - 2].rsplit(' ', 1)[0]} …"
    cells = [f"`{key}`", allowed, default, first]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def known_keys() -> dict[str, Any]:
    """What `quick` knows of keys: of the file, of its sections, and of each algorithm's configuration."""
    sections = {name: section_in(field.annotation) for name, field in RunConfig.model_fields.items()}
    train = {}
    for name, config in configs_by_algorithm().items():
        fields = [key for key in fields_under("train", config) if key not in Train.model_fields]
        elsewhere = [field for field in config.__dataclass_fields__ if field not in fields]
        train[name] = {"fields": fields, "said_elsewhere": elsewhere}
    return {
        "file": list(RunConfig.model_fields),
        "sections": {
            name: list(section.model_fields)
            for name, section in sections.items()
            if section is not None and _is_closed(name, section)
        },
        "losses": {loss: config_class(loss).algorithm for losses in losses_by_algorithm().values() for loss in losses},
        "train": train,
        "retired": retired_hints(),
    }


def _is_closed(name: str, section: type[Any]) -> bool:
    """Whether a section is a mapping of keys that it names itself; `train` has fields of configurations besides."""
    return name in ("train", "objective") or section.model_config.get("extra") != "allow"


if __name__ == "__main__":
    KEYS.write_text(json.dumps(known_keys(), indent=1) + "\n", encoding="utf-8")
    print(run_file_page(), end="\n")
