"""What a type allows, checked and in words."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Iterator
from enum import Enum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "a mapping",
    list: "a list",
    type(None): "null",
}
_FEW = 12


@functools.cache
def field_types(config: type[Any]) -> dict[str, Any]:
    """Type by name of the fields of a configuration; a flag that may stand without a value (`--fsdp`) may be true."""
    hints = typing.get_type_hints(config)
    alone = {field.name for field in dataclasses.fields(config) if field.metadata.get("const") is True}
    return {
        field.name: bool | hints[field.name] if field.name in alone else hints[field.name]
        for field in dataclasses.fields(config)
        if field.init
    }


def unfit(hint: Any, value: Any) -> str | None:
    """What a type allows in place of `value`, in words that complete "allowed is"; None if the value may stand."""
    choices = [choice for kind in branches(hint) for choice in _choices(kind)]
    # A field typed `IntervalStrategy | str` takes any text for Python's sake; only the enumeration's values work.
    if choices and isinstance(value, str) and value not in choices:
        longer = [choice for choice in choices if value and choice.startswith(value)]
        near = longer[:1] or difflib.get_close_matches(value, choices, n=1)
        return _listed(choices) + (f" (did you mean {near[0]}?)" if near else "")
    try:
        TypeAdapter(hint, config=ConfigDict(strict=True, allow_inf_nan=False)).validate_python(value)
    except ValidationError:
        return describe_type(hint)
    return None


def describe_type(hint: Any) -> str:
    """A type in words.

    >>> describe_type(int | None)
    'a whole number or null'
    """
    words: list[str] = []
    for kind in branches(hint):
        choices = _choices(kind)
        if choices:
            words.append(_listed(choices))
        elif kind is not str or not any(_choices(other) for other in branches(hint)):
            words.append(_word(typing.get_origin(kind) or kind))
    return " or ".join(dict.fromkeys(words))


def _word(kind: Any) -> str:
    if isinstance(kind, type) and issubclass(kind, BaseModel):  # a section of a run file
        kind = dict
    return _WORDS.get(kind, "an object that only a script can give")


def branches(hint: Any) -> Iterator[Any]:
    """The parts of a union, at any depth; of another type, the type."""
    if typing.get_origin(hint) is typing.Annotated:
        hint = typing.get_args(hint)[0]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        for part in typing.get_args(hint):
            yield from branches(part)
    else:
        yield hint


def _listed(choices: list[str]) -> str:
    return ", ".join(choices[:_FEW]) + (", …" if len(choices) > _FEW else "")


def _choices(kind: Any) -> list[str]:
    if typing.get_origin(kind) is Literal:
        return [str(choice) for choice in typing.get_args(kind)]
    if isinstance(kind, type) and issubclass(kind, Enum):
        return [str(choice.value) for choice in kind]
    return []
