"""The keys of `train:` and `objective:` that are fields of the trainer's configuration: which exist, and what may
stand there."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Iterator
from enum import Enum
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from tether.config.model_section import MODEL_FIELDS
from tether.config.sections import OBJECTIVE_FIELDS, Objective, Train
from tether.config.trainers import Loss, config_class, own_fields

# Fields that the run file says elsewhere. One place for each thing, so that no two can disagree.
ELSEWHERE = {
    "output_dir": "`output`",
    **{OBJECTIVE_FIELDS.get(name, name): f"`objective.{name}`" for name in Objective.model_fields},
    "reference": "`reference`",
    "reference_means": "`reference.means`",
    "reference_store": "`reference.store`",
    "reference_store_dtype": "`reference.store_dtype`",
    "reference_adapter": "`reference.adapter`",
    "reference_snapshot": "`reference.snapshot`",
    "reference_remote": "`reference.remote`",
    "ref_model_init_kwargs": "`reference`",
    "sync_ref_model": "`reference.sync`",
    "ref_model_sync_steps": "`reference.sync.steps`",
    "ref_model_mixup_alpha": "`reference.sync.alpha`",
    "dataset_cache": "`data.cache`",
    "dataset_streaming": "`data.streaming`",
    "dataset_buffer_size": "`data.buffer_size`",
    "model_init_kwargs": "`model`",
    "trust_remote_code": "`model.trust_remote_code`",
    **{field: f"`model.{name}`" for field, name in MODEL_FIELDS.items()},
    "resume_from_checkpoint": "the option --resume",
    "local_rank": "the launcher (torchrun or accelerate)",
    "do_train": "the command: `tether train` trains",
    "do_eval": "`data.eval`: rows given there are evaluated",
    "do_predict": "`data.eval`: rows given there are evaluated",
}
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


def known_fields(loss: Loss = "sigmoid") -> dict[str, Any]:
    """Type by name of the fields of the configuration of a loss' trainer that a run file may set under `train`."""
    said = {*ELSEWHERE, *Train.model_fields, *own_fields(loss)}
    return {name: hint for name, hint in field_types(config_class(loss)).items() if name not in said}


@functools.cache
def field_types(config: type[Any]) -> dict[str, Any]:
    """Type by name of the fields of a configuration."""
    hints = typing.get_type_hints(config)
    return {field.name: hints[field.name] for field in dataclasses.fields(config) if field.init}


def problem_with(name: str, value: Any, loss: Loss = "sigmoid") -> str | None:
    """What is allowed for a field in place of `value`, in words; None if the value may stand.

    Args:
        name: of a field of the configuration of the loss' trainer.
        value: from the run file.
        loss: the run file's.

    Returns:
        Words that complete "allowed is".
    """
    return unfit(field_types(config_class(loss))[name], value)


def unfit(hint: Any, value: Any) -> str | None:
    """What a type allows in place of `value`, in words; None if the value may stand."""
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
    # None of these fields has a meaning below zero; transformers checks few of them.
    if isinstance(value, (int, float)) and value < 0:
        return f"{describe_type(hint)}, from 0 on"
    return None


def describe_type(hint: Any) -> str:
    """A type in words: `int | None` is "a whole number or null"."""
    words: list[str] = []
    for kind in branches(hint):
        choices = _choices(kind)
        if choices:
            words.append(_listed(choices))
        elif kind is not str or not any(_choices(other) for other in branches(hint)):
            words.append(_WORDS.get(typing.get_origin(kind) or kind, "an object that only a script can give"))
    return " or ".join(dict.fromkeys(words))


def _listed(choices: list[str]) -> str:
    return ", ".join(choices[:_FEW]) + (", …" if len(choices) > _FEW else "")


def branches(hint: Any) -> Iterator[Any]:
    """The parts of a union, at any depth; of another type, the type."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        for part in typing.get_args(hint):
            yield from branches(part)
    else:
        yield hint


def _choices(kind: Any) -> list[str]:
    if typing.get_origin(kind) is Literal:
        return [str(choice) for choice in typing.get_args(kind)]
    if isinstance(kind, type) and issubclass(kind, Enum):
        return [str(choice.value) for choice in kind]
    return []
