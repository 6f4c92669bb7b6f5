"""What every section of the run file is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError


@dataclass(frozen=True)
class Allowed:
    """What may stand at a key, in words; printed when something else came."""

    words: str


class Section(BaseModel):
    """A mapping of the run file: no unknown keys, no silent conversion, not changed once read."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


# Sections that may be written as one text: that text stands for this key of theirs.
SHORT_FORMS = {"model": "name", "reference": "meaning"}


def named(section: str, kind: type[Section]) -> BeforeValidator:
    def expand(value: Any) -> Any:
        if isinstance(value, str):
            return {SHORT_FORMS[section]: value}
        if not isinstance(value, (dict, Section)):
            raise PydanticCustomError("short_form", "neither text nor a mapping")
        return value

    return BeforeValidator(expand, json_schema_input_type=str | kind)


Text = Annotated[str, Field(min_length=1), Allowed("text")]
Count = Annotated[int, Field(ge=1), Allowed("a whole number from 1")]
Flag = Annotated[bool, Allowed("true or false")]
