"""From a run file and overrides to a checked `RunConfig`."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tether.config.document import KeyPath, beginning, parse, read_document
from tether.config.fields import Loss, adapter_fields, config_class, fields_under, keys_of, problem_with, row_of
from tether.config.keys.unknown import loss_in
from tether.config.problems import describe, dotted, show, unknown_key, wrong_value
from tether.config.run import RunConfig, Train
from tether.config.sections import SHORT_FORMS
from tether.config.words import unfit
from tether.errors import ConfigError
from tether.objectives import OBJECTIVES
from tether.training import PreferenceConfig
from tether.training.declaration import default_of

Place = Callable[[KeyPath], str]


def load_run_file(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run file and check every key of it, without loading data or a model.

    Args:
        path: a YAML file, see DESIGN in the documentation or `json_schema()`.
        overrides: `key=value` with a dotted key and a YAML value, such as `train.learning_rate=1e-5`, `lora.r=8` or
            `lora=null`. A section is replaced as a whole, a key inside it alone.

    Returns:
        The run, every default filled in.

    Raises:
        ConfigError: one paragraph with the place, what was given and what is allowed.
    """
    path = Path(path).expanduser()
    values, lines = read_document(path)
    given: dict[KeyPath, str] = {}
    for override in overrides:
        _apply(values, override, given)

    def place(key: KeyPath) -> str:
        known = beginning(key, {**lines, **given})
        if known in given:
            return f"override '{given[known]}'"
        return f"{path}, line {lines[known]}" if known else str(path)

    values.setdefault("output", f"runs/{path.stem}")
    return check_run(values, place)


def check_run(values: dict[str, Any], place: Place = lambda key: "run") -> RunConfig:
    """Check the contents of a run file.

    Args:
        values: as read from YAML.
        place: where a key was given, for messages.

    Returns:
        The run.

    Raises:
        ConfigError: one paragraph with the place, what was given and what is allowed.
    """
    loss = loss_in(values)
    config = config_class(loss)
    values = _with_own_defaults(values, loss)
    fields = [name for name in fields_under("train", config) if name not in Train.model_fields]
    try:
        run = RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(describe(error, values, place, fields)) from error
    problems: dict[str, tuple[dict[str, Any], Callable[[str, Any], str]]] = {
        "train": (run.train.further, partial(_train_problem, config, fields)),
        "objective": (run.objective.further, partial(_objective_problem, config, fields, run.objective.loss)),
    }
    if run.peft is not None:
        problems["peft"] = (run.peft.further, partial(_adapter_problem, adapter_fields(run.peft.type), fields))
    for section, (further, problem) in problems.items():
        for name, value in further.items():
            if sentence := problem(name, value):
                raise ConfigError(f"{place((section, name))}: {sentence}")
    return run


def _train_problem(config: type[PreferenceConfig], fields: list[str], name: str, value: Any) -> str:
    """What is wrong with a key of `train` that the section does not name; empty where nothing is."""
    key = ("train", name)
    said = keys_of(config).get(name, "")
    if said and said != dotted(key):
        where = said if " " in said else f"`{said}`"
        return f"`{dotted(key)}` is said by {where} in a run file. Write it there."
    if name not in fields:
        return unknown_key(key, [*Train.model_fields, *fields], fields)
    return wrong_value(key, value, problem_with(name, value, config))


def _objective_problem(config: type[PreferenceConfig], fields: list[str], loss: Loss, name: str, value: Any) -> str:
    """The same of `objective`."""
    key, known = ("objective", name), fields_under("objective", config)
    if name in known:
        return wrong_value(key, value, problem_with(known[name], value, config))
    if any(name in row.defaults for rows in OBJECTIVES.values() for row in rows.values()):
        takes = ", ".join(key for key in known if key != "loss") or "no options"
        return f"`{dotted(key)}` does not apply to loss {loss!r}; it takes {takes}."
    return unknown_key(key, known, fields)


def _adapter_problem(known: dict[str, Any], fields: list[str], name: str, value: Any) -> str:
    """The same of `peft`."""
    if name not in known:
        return unknown_key(("peft", name), ["type", *known], fields)
    return wrong_value(("peft", name), value, unfit(known[name], value))


def _with_own_defaults(values: dict[str, Any], loss: Loss) -> dict[str, Any]:
    """The values, with the defaults of the loss' configuration, and what the loss' name stands for."""
    row, config = row_of(loss), config_class(loss)
    fields = config.__dataclass_fields__
    default = {key: default_of(fields[name]) for key, name in fields_under("objective", config).items()}
    default |= {"loss": loss, **(row.preset if row else {})}
    rate = {"learning_rate": fields["learning_rate"].default}
    for section, own in (("objective", default), ("train", rate)):
        given = values.get(section, {})
        if isinstance(given, dict):
            values = {**values, section: {**own, **given}}
    return values


def _apply(values: dict[str, Any], override: str, given: dict[KeyPath, str]) -> None:
    name, equals, text = override.partition("=")
    path: KeyPath = tuple(name.strip().split("."))
    if not equals or not all(path):
        near = difflib.get_close_matches(override, RunConfig.model_fields, n=1)
        raise ConfigError(
            f"The argument '{override}' is not an override. Allowed is key=value with a dotted key, such as "
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
