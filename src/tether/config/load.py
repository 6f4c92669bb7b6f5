"""From a run file and overrides to a checked `RunConfig`."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tether.config.adapter import adapter_fields
from tether.config.document import KeyPath, parse, read_document
from tether.config.fields import ELSEWHERE, known_fields, problem_with, unfit
from tether.config.problems import describe, dotted, show, unknown_key, wrong_value
from tether.config.section import SHORT_FORMS
from tether.config.sections import Objective, RunConfig, Train
from tether.config.trainers import Loss, default_of, own_fields
from tether.errors import ConfigError


def load_run_file(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run file and check every key of it, without loading data or a model.

    Args:
        path: a YAML file, see DESIGN in the documentation or `json_schema()`.
        overrides: `key=value` with a dotted key and a YAML value, such as `train.learning_rate=1e-5`, `lora.r=8` or
            `lora=null`. A section is replaced as a whole, a key inside it alone.

    Returns:
        The run, every default filled in.

    Raises:
        ConfigError: one paragraph with the place, what came and what is allowed.
    """
    path = Path(path).expanduser()
    values, lines = read_document(path)
    given: dict[KeyPath, str] = {}
    for override in overrides:
        _apply(values, override, given)

    def place(key: KeyPath) -> str:
        for length in range(len(key), 0, -1):
            if key[:length] in given:
                return f"override '{given[key[:length]]}'"
            if key[:length] in lines:
                return f"{path}, line {lines[key[:length]]}"
        return str(path)

    values.setdefault("output", f"runs/{path.stem}")
    return check_run(values, place)


def check_run(values: dict[str, Any], place: Callable[[KeyPath], str] = lambda key: "run") -> RunConfig:
    """Check the contents of a run file.

    Args:
        values: as read from YAML.
        place: where a key was given, for messages.

    Returns:
        The run.

    Raises:
        ConfigError: one paragraph with the place, what came and what is allowed.
    """
    loss = _loss_in(values)
    values = _with_own_defaults(values, loss)
    fields = list(known_fields(loss))
    try:
        run = RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(describe(error, values, place, fields)) from error
    for name, value in run.train.further.items():
        key = ("train", name)
        if name in ELSEWHERE:
            raise ConfigError(
                f"{place(key)}: `{dotted(key)}` is said by {ELSEWHERE[name]} in a run file. Write it there."
            )
        if name not in fields and name not in own_fields(loss):
            raise ConfigError(f"{place(key)}: {unknown_key(key, [*Train.model_fields, *fields], fields)}")
        if name in own_fields(loss):
            said = f"`{dotted(key)}` is said by `objective.{name}` in a run file. Write it there."
            raise ConfigError(f"{place(key)}: {said}")
        allowed = problem_with(name, value, loss)
        if allowed:
            raise ConfigError(f"{place(key)}: {wrong_value(key, value, allowed)}")
    _check_objective(run, fields, place)
    _check_adapter(run, fields, place)
    return run


def _check_adapter(run: RunConfig, fields: list[str], place: Callable[[KeyPath], str]) -> None:
    if run.peft is None:
        return
    known = adapter_fields(run.peft.type)
    for name, value in run.peft.further.items():
        key = ("peft", name)
        if name not in known:
            raise ConfigError(f"{place(key)}: {unknown_key(key, ['type', *known], fields)}")
        allowed = unfit(known[name], value)
        if allowed:
            raise ConfigError(f"{place(key)}: {wrong_value(key, value, allowed)}")


def _check_objective(run: RunConfig, fields: list[str], place: Callable[[KeyPath], str]) -> None:
    loss, known = run.objective.loss, [*Objective.model_fields, *own_fields(run.objective.loss)]
    for name, value in run.objective.further.items():
        key = ("objective", name)
        if name not in known:
            raise ConfigError(f"{place(key)}: {unknown_key(key, known, fields)}")
        allowed = problem_with(name, value, loss)
        if allowed:
            raise ConfigError(f"{place(key)}: {wrong_value(key, value, allowed)}")


def _loss_in(values: dict[str, Any]) -> Loss:
    """The loss of a run file that is not checked yet."""
    section = values.get("objective")
    loss = section.get("loss") if isinstance(section, dict) else None
    return loss if isinstance(loss, str) else "sigmoid"


def _with_own_defaults(values: dict[str, Any], loss: Loss) -> dict[str, Any]:
    """The values, with the trainer's default where it has another than the run file."""
    train, default = values.get("train", {}), default_of(loss, "learning_rate")
    if not isinstance(train, dict) or default == Train.model_fields["learning_rate"].default:
        return values
    return {**values, "train": {"learning_rate": default, **train}}


def _apply(values: dict[str, Any], override: str, given: dict[KeyPath, str]) -> None:
    name, equals, text = override.partition("=")
    path: KeyPath = tuple(name.strip().split("."))
    if not equals or not all(path):
        near = difflib.get_close_matches(override, RunConfig.model_fields, n=1)
        raise ConfigError(
            f"The argument '{override}' is no override. Allowed is key=value with a dotted key, such as "
            f"{near[0] if near else 'train.learning_rate'}=…; give one run file, and overrides after it."
        )
    value, _ = parse(text, f"override '{override}'")
    section: dict[str, Any] = values
    for depth, part in enumerate(path[:-1]):
        inner: Any = section.get(str(part))
        if depth == 0 and isinstance(inner, str) and part in SHORT_FORMS:
            inner = {SHORT_FORMS[str(part)]: inner}
        if inner is None:
            inner = {}
        if not isinstance(inner, dict):
            raise ConfigError(
                f"The override '{override}' goes into `{dotted(path[: depth + 1])}`, which is {show(inner)} and no "
                "mapping. Override that key as a whole."
            )
        section[str(part)] = inner
        section = inner
    section[str(path[-1])] = value
    given[path] = override
