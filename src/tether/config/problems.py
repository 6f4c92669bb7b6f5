"""From what pydantic found to one paragraph that says where, what was given, what is allowed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any

from pydantic import BaseModel, ValidationError

from tether.config.document import KeyPath, dotted
from tether.config.fields import keys_of
from tether.config.keys.unknown import unknown
from tether.config.run import RunConfig, Train
from tether.config.sections import SOURCE_TAGS
from tether.config.words import describe_type
from tether.errors import Allowed
from tether.training import PreferenceConfig
from tether.training.surface.retired import RETIRED

_SHOWN = 3
# Problems that say more than that a value is of another type.
_TELLING = ("value_error", "missing", "extra_forbidden")
_KINDS = (
    (bool, "a switch"),
    (int, "a whole number"),
    (float, "a number with a fraction"),
    (str, "text"),
    (list, "a list"),
    (dict, "a mapping"),
)


def describe(error: ValidationError, values: dict[str, Any], place: Callable[[KeyPath], str], fields: list[str]) -> str:
    """One paragraph about all problems of a run file; the first ones in full.

    Args:
        error: from validating `values` as a `RunConfig`.
        values: the run file's contents.
        place: where a key was given, such as `run.yaml, line 3`.
        fields: names that `train` takes besides its own.

    Returns:
        The paragraph.
    """
    sentences: dict[KeyPath, str] = {}
    for problem in sorted(error.errors(include_url=False), key=lambda one: one["type"] not in _TELLING):
        path, model, allowed = _resolve(problem["loc"], values)
        if path not in sentences:
            sentences[path] = f"{place(path)}: {_sentence(problem, path, model, allowed, values, fields)}"
    # Of a value that may be a mapping or something else, pydantic says what is wrong for each; the inner one tells.
    deepest = [path for path in sentences if not any(other[: len(path)] == path != other for other in sentences)]
    shown = [sentences[path] for path in deepest[:_SHOWN]]
    more = len(deepest) - len(shown)
    return " ".join(shown) + (f" There are {more} further problems." if more > 1 else " There is one more." * more)


def unknown_key(path: KeyPath, known: Iterable[str], fields: list[str]) -> str:
    """`unknown` with what the classes of a run file know; `fields`: names that `train` takes besides its own."""
    return unknown(path, known, dict(_leaves(fields)), Train.model_fields, retired_hints())


# Where a run file has other words than a configuration in Python.
_IN_WORDS = {
    "rpo_alpha": "Write `objective: {loss: [sigmoid, sft], weights: [1.0, …]}`, with it as the second weight.",
    "reference_free": "Write `reference: none`.",
}


@cache
def retired_hints() -> dict[str, str]:
    """Names that TRL and transformers had for options, each with what to do in a run file."""
    keys, hints = keys_of(PreferenceConfig), {}
    for name, old in RETIRED.items():
        if old.becomes is not None:
            hints[name] = f"It is called `{keys.get(old.becomes, old.becomes)}` now."
        elif old.never_matters:
            hints[name] = "It has no effect any more, and none is needed: leave it out."
        else:
            hints[name] = f"There is no such option any more: {old.advice}."
    return {**hints, **_IN_WORDS}


def wrong_value(path: KeyPath, value: Any, allowed: str | None) -> str:
    """A sentence about a value that is not allowed.

    Args:
        path: of the key.
        value: what was given.
        allowed: what may stand there, in words; None where the value may.

    Returns:
        The sentence; empty for none.
    """
    if allowed is None:
        return ""
    advice = ""
    if isinstance(value, str) and "number" in allowed and _is_number(value):
        advice = " Take the quotes away."
    return f"`{dotted(path)}` is {show(value)}; allowed is {allowed}.{advice}"


def show(value: Any) -> str:
    """A value and its kind, shortened: `'32' (text)`."""
    if value is None:
        return "empty (null)"
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    text = text if len(text) <= 60 else text[:57] + "…"
    return f"{text} ({next((words for kind, words in _KINDS if isinstance(value, kind)), type(value).__name__)})"


def _resolve(location: KeyPath, values: dict[str, Any]) -> tuple[KeyPath, type[BaseModel], str]:
    """The key that an error belongs to, the section it is in, and what is allowed there.

    pydantic adds the branch of a union and the index in a list to the location; the key is where sections end.
    """
    owner: type[BaseModel] = RunConfig
    inner: type[BaseModel] | None = RunConfig
    path: list[str | int] = []
    allowed, within = "", False
    for part in location:
        if part in SOURCE_TAGS:
            inner, within = SOURCE_TAGS[str(part)], True
            continue
        if inner is None:
            if not within:
                break
            if _holds(values, path, part):  # a place in a list of sources, or the name of a set
                path.append(part)
            continue
        if part not in inner.model_fields and not _holds(values, path, part):  # a branch of a union
            continue
        owner = inner
        path.append(part)
        if part not in owner.model_fields:
            break
        field = owner.model_fields[str(part)]
        inner = section_in(field.annotation)
        allowed = next((item.words for item in field.metadata if isinstance(item, Allowed)), "")
        if not allowed:
            keys = f"a mapping with the keys {', '.join(inner.model_fields)}" if inner else ""
            allowed = keys or describe_type(field.annotation)
    return tuple(path), owner, allowed


def _holds(values: Any, path: KeyPath | list[str | int], part: str | int) -> bool:
    """Whether a part of a location is in the file, and not the name that pydantic has for a branch of a union."""
    for step in path:
        values = values[step] if _has(values, step) else None
    return _has(values, part)


def _has(value: Any, part: str | int) -> bool:
    return part in value if isinstance(value, dict) else isinstance(value, list) and isinstance(part, int)


def section_in(annotation: Any) -> type[BaseModel] | None:
    for kind in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def _sentence(
    problem: Any, path: KeyPath, model: type[BaseModel], allowed: str, values: dict[str, Any], fields: list[str]
) -> str:
    if problem["type"] == "extra_forbidden":
        return unknown_key(path, model.model_fields, fields)
    if problem["type"] == "missing":
        return f"`{dotted(path)}` is missing. {model.model_fields[str(path[-1])].description}"
    if problem["type"] == "value_error":
        return f"`{dotted(path)}`: {problem['ctx']['error']}."
    value: Any = values
    for part in path:
        value = value[part] if _has(value, part) else problem["input"]
    return wrong_value(path, value, allowed)


def _leaves(fields: list[str]) -> Iterator[tuple[str, str]]:
    """`(key, dotted path)` of every key inside a section."""
    yield from ((name, f"train.{name}") for name in fields)
    for section, field in RunConfig.model_fields.items():
        inner = section_in(field.annotation)
        yield from ((name, f"{section}.{name}") for name in (inner.model_fields if inner else ()))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
