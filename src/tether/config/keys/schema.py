"""The JSON schema of the run file, for editors."""

from __future__ import annotations

import dataclasses
from typing import Any

from pydantic import TypeAdapter

from tether.config.fields import adapter_fields, configs_by_algorithm, fields_under, losses_by_algorithm, presets
from tether.config.run import RunConfig
from tether.config.sections import ADAPTERS
from tether.config.words import field_types
from tether.objectives import OBJECTIVES, Range
from tether.training import PreferenceConfig
from tether.training.declaration import Text, Whole


def json_schema() -> dict[str, Any]:
    """The JSON schema of the run file: `objective` for each algorithm, and every field of their configurations."""
    schema = RunConfig.model_json_schema()
    losses: dict[str, list[str]] = {**losses_by_algorithm(), **{name: [name] for name in presets()}}
    configs: dict[str, type[PreferenceConfig]] = {**configs_by_algorithm(), **presets()}
    train = schema["$defs"]["Train"]
    for config in configs.values():
        train["properties"] = {**_properties("train", config), **train["properties"]}
    train["additionalProperties"] = False
    of_their_own = {key for name, keys in losses.items() if name != "dpo" for key in keys}
    losses["dpo"] = [key for key in losses["dpo"] if key not in of_their_own]
    schema["$defs"]["Objective"] = {"oneOf": [_objective(configs[name], keys) for name, keys in losses.items()]}
    schema["$defs"]["Peft"] = {"oneOf": [_adapter(kind) for kind in ADAPTERS]}
    return schema


def _objective(config: type[PreferenceConfig], keys: list[str]) -> dict[str, Any]:
    """A mapping of the losses of one algorithm and their options."""
    loss: dict[str, Any] = {"enum": keys}
    pairs = config.algorithm == "dpo" and config.preset is None
    if pairs:
        names = {"type": "array", "items": {"enum": list(OBJECTIVES["dpo"])}, "minItems": 1}
        loss = {"anyOf": [loss, names], "default": "sigmoid"}
    return {
        "type": "object",
        "properties": {**_properties("objective", config), "loss": loss},
        "required": [] if pairs else ["loss"],
        "additionalProperties": False,
    }


def _properties(section: str, config: type[PreferenceConfig]) -> dict[str, Any]:
    """Type, text, default and bounds of the fields that are keys of a section."""
    found = {}
    for key, name in fields_under(section, config).items():
        field, made = config.__dataclass_fields__[name], _schema_of(field_types(config)[name])
        text = field.metadata.get("help")
        if isinstance(text, Text):
            default = {} if field.default is dataclasses.MISSING else {"default": field.default}
            made = {**made, "description": str(text), **default, **_bounds(text)}
        found[key] = made
    return found


def _bounds(text: Text) -> dict[str, Any]:
    """JSON's words for one range or for nothing but constants; a mixture is left to the reader."""
    constants = [one for one in text.allowed if not isinstance(one, (Range, Whole))]
    if text.allowed and constants == list(text.allowed):
        return {"enum": constants}
    (bound,) = [one for one in text.allowed if one not in constants] or [None]
    if isinstance(bound, Whole):
        return {"minimum": bound.low}
    if not isinstance(bound, Range):
        return {}
    low = "minimum" if bound.low_included else "exclusiveMinimum"
    high = "maximum" if bound.high_included else "exclusiveMaximum"
    return {name: value for name, value in ((low, bound.low), (high, bound.high)) if abs(value) != float("inf")}


def _adapter(kind: str) -> dict[str, Any]:
    """A mapping of one kind of adapter and the fields of PEFT's configuration of it."""
    properties = {name: _schema_of(hint) for name, hint in adapter_fields(kind).items()}
    return {
        "type": "object",
        "properties": {"type": {"const": kind}, **properties},
        "required": ["type"],
        "additionalProperties": False,
    }


def _schema_of(hint: Any) -> dict[str, Any]:
    found = TypeAdapter(hint).json_schema()
    # Enumerations are written in place, as `$defs` of a part cannot be reached from the whole.
    definitions = found.pop("$defs", {})
    branches = [definitions.get(part.get("$ref", "").split("/")[-1], part) for part in found.get("anyOf", [found])]
    if any("enum" in branch for branch in branches):
        branches = [branch for branch in branches if branch != {"type": "string"}]
    return {"anyOf": branches} if len(branches) > 1 else branches[0]
