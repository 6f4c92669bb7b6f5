"""The JSON schema of the run file, for editors."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter

from tether.config.adapter import adapter_fields
from tether.config.fields import known_fields
from tether.config.model_section import ADAPTERS
from tether.config.sections import RunConfig


def json_schema() -> dict[str, Any]:
    """The JSON schema of the run file, the fields of `tether.DPOConfig` under `train` included."""
    schema = RunConfig.model_json_schema()
    train = schema["$defs"]["Train"]
    for name, hint in known_fields().items():
        train["properties"][name] = _schema_of(hint)
    train["additionalProperties"] = False
    schema["$defs"]["Peft"] = {"oneOf": [_adapter(kind) for kind in ADAPTERS]}
    return schema


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
