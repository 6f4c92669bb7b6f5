"""`config.yaml` of a run that a Python script started: what its trainer was given, for the page and later commands."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tether.errors import ConfigError
from tether.redact import masked_values
from tether.training.declaration import default_of
from tether.training.saving.resume_check import super_of

if TYPE_CHECKING:
    from tether.training.config import PreferenceConfig
    from tether.training.setup.run import Given

CONFIG = "config.yaml"
# The key by which such a file is told from a run file.
TRAINER = "trainer"
_HEADER = """\
# What a Python script gave to {trainer}: a record, not a run file. `args` has each field of {config} that is Tether's
# own, and of transformers' those with another value than the default; for an object in memory null stands.
"""
_LEAF = (bool, int, float, str, type(None))


def described(trainer: str, given: Given, args: PreferenceConfig) -> str:
    """The text of the file.

    Args:
        trainer: name of its class.
        given: what it was given.
        args: its configuration, as it was resolved.
    """
    peft = given.peft_config.to_dict() if given.peft_config is not None else None
    found = {
        TRAINER: trainer,
        "model": _name(given.model),
        "ref_model": _name(given.ref_model),
        "peft_config": peft and {name: _plain(value) for name, value in peft.items() if value is not None},
        "data": {"train": _rows(given.train_dataset), "eval": _rows(given.eval_dataset)},
        "output": str(args.output_dir),
        "args": _resolved(args),
    }
    head = _HEADER.format(trainer=trainer, config=type(args).__name__)
    return head + yaml.safe_dump(masked_values(found), sort_keys=False, allow_unicode=True, width=120)


def recorded(path: Path) -> dict[str, Any] | None:
    """What such a file says; None for a run file, and where there is none.

    Raises:
        ConfigError: it is not YAML.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (yaml.YAMLError, ValueError) as error:  # the latter of a number, a date or bytes that are none
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}. Correct it, or remove it.") from error
    return values if isinstance(values, dict) and TRAINER in values else None


def _resolved(args: PreferenceConfig) -> dict[str, Any]:
    theirs = {field.name for field in dataclasses.fields(super_of(type(args)))}
    found = {}
    for field in dataclasses.fields(args):
        value = getattr(args, field.name, None)
        if field.init and field.name != "output_dir" and (field.name not in theirs or value != default_of(field)):
            found[field.name] = _plain(value)
    return found


def _name(model: Any) -> str | None:
    return str(model) if isinstance(model, (str, Path)) else None


def _rows(rows: Any) -> Any:
    if isinstance(rows, Mapping) and not all(isinstance(value, _LEAF) for value in rows.values()):
        return {str(name): _rows(one) for name, one in rows.items()}
    if rows is None or isinstance(rows, (str, Path, Mapping)):
        return _plain(rows)
    return f"{len(rows)} rows in memory" if hasattr(rows, "__len__") else "a stream in memory"


def _plain(value: Any) -> Any:
    """A value as YAML has it; what is no plain value, as text."""
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(one) for one in (value if isinstance(value, (list, tuple)) else sorted(value, key=str))]
    plain = getattr(value, "value", value)  # of an enumeration
    return plain if type(plain) in _LEAF else str(plain)
