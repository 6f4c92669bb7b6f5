"""What a single value of a row may be, and what is said of one that is something else. Called by `schema`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Literal

from tether.types import Messages

Form = Literal["standard", "conversational"]
SHOWN_FAULTS = 5
# Of a ranked row every two are looked at: half a million pairs.
_MOST_COMPLETIONS = 1000
# Of one text: millions of tokens, which take a tokenizer seconds; a hundred million would take it the machine's memory.
_MOST_CHARACTERS = 10_000_000
_MESSAGES_AS_TEXT = re.compile(r"""\s*\[\s*\{\s*['"](?:role|content)['"]\s*:""")
_ALLOWED = {None: "text or a list of messages", "standard": "text", "conversational": "a list of messages"}
_TRUTH = {"true": 1.0, "false": 0.0, "1": 1.0, "0": 0.0, "1.0": 1.0, "0.0": 0.0}
# What rendering sets itself; a row that set it too would change what is trained.
_RESERVED = (
    *("conversation", "messages", "tools", "chat_template", "add_generation_prompt", "continue_final_message"),
    *("tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs"),
)


@dataclass
class Faults:
    """Faults of rows: the first ones in words, all of them counted."""

    shown: list[str] = field(default_factory=list)
    total: int = 0
    rows: set[int] = field(default_factory=set)

    def add(self, row: int, fault: str) -> None:
        """Note a fault of a row, counted from 1."""
        self.total += 1
        self.rows.add(row)
        if len(self.shown) < SHOWN_FAULTS:
            self.shown.append(f"row {row}: {fault}")

    def message(self, name: str, rows: int) -> str:
        """One paragraph about all of them."""
        head = f"{name}: {len(self.rows)} of {rows} rows cannot be used"
        head += f" ({self.total} faults, the first {SHOWN_FAULTS} shown)" if self.total > len(self.shown) else ""
        return f"{head}. {'; '.join(self.shown)}. Correct or remove them (rows count from 1)."


def form_of(value: Any) -> Form:
    """Messages are a list; anything else is taken for text."""
    return "conversational" if isinstance(value, list) else "standard"


def text_faults(column: str, value: Any, form: Form | None) -> Iterator[str]:
    """Faults of a prompt or completion: text, or a list of messages; one of the two where `form` says so."""
    if not isinstance(value, (str, list)) or (form is not None and form_of(value) != form):
        allowed = (
            _ALLOWED[None] if not isinstance(value, (str, list)) else f"{_ALLOWED[form]}, like the rest of the data"
        )
        yield f"`{column}` is {described(value)}; it must be {allowed}"
    elif (size := _characters(value)) > _MOST_CHARACTERS:
        yield f"`{column}` has {size:,} characters; it may have {_MOST_CHARACTERS:,}: write it as several rows"
    elif isinstance(value, str):
        if spells_messages(value):
            yield f"`{column}` is text that spells out a list of messages; store the list itself, in JSON or Parquet"
    elif not value:
        yield f"`{column}` is an empty list; it must hold at least one message"
    else:
        for position, message in enumerate(value, 1):
            yield from (f"message {position} of `{column}` {fault}" for fault in _message_faults(message))


def _characters(value: str | list[Any]) -> int:
    """How long a text is, or all texts of messages."""
    if isinstance(value, str):
        return len(value)
    texts = (message.get("content") for message in value if isinstance(message, dict))
    return sum(len(text) for text in texts if isinstance(text, str))


def list_faults(column: str, value: Any, form: Form | None) -> Iterator[str]:
    """Faults of a ranked list of completions."""
    if not isinstance(value, list) or len(value) < 2:
        shown = "a list of one item" if isinstance(value, list) and value else described(value)
        yield f"`{column}` is {shown}; it must be a list of two completions or more"
        return
    if len(value) > _MOST_COMPLETIONS:
        yield f"`{column}` has {len(value):,} completions; it may have {_MOST_COMPLETIONS:,}, as any two are compared"
        return
    for place, item in enumerate(value, 1):
        yield from text_faults(f"{column}[{place}]", item, form)


def number_faults(column: str, value: Any) -> Iterator[str]:
    """Faults of a number that belongs to a row; a `label` is a truth value."""
    number = as_number(column, value)
    if number is None or not math.isfinite(number):
        wanted = "true or false" if column == "label" else "a number" if number is None else "a finite number"
        yield f"`{column}` is {described(value)}; it must be {wanted}"
    elif column == "weight" and number < 0:
        yield f"`weight` is {described(value)}; it must be 0 or more"


def score_faults(value: Any, completions: Any) -> Iterator[str]:
    """Faults of the scores of a ranked list."""
    numbers = [as_number("scores", item) for item in value] if isinstance(value, list) else []
    if not isinstance(value, list):
        yield f"`scores` is {described(value)}; it must be a list of numbers, one for each completion"
    elif None in numbers:
        place = numbers.index(None)
        yield f"`scores[{place + 1}]` is {described(value[place])}; it must be a number"
    elif isinstance(completions, list) and len(value) != len(completions):
        yield f"`scores` has {len(value)} numbers for {len(completions)} completions; it must have one for each"
    elif not all(math.isfinite(number) for number in numbers if number is not None):
        yield "`scores` holds a number that is not finite; completions cannot be ranked by it"


def extra_faults(column: str, value: Any, form: Form) -> Iterator[str]:
    """Faults of `tools` and `chat_template_kwargs`, which reach the chat template of their row."""
    given = decoded(value)
    if not given:
        return
    if form == "standard":
        yield f"`{column}` is given, but the row is text, which no chat template writes; give lists of messages"
    elif column == "tools":
        if not isinstance(given, list) or not all(isinstance(tool, dict) for tool in given):
            yield f"`tools` is {described(given)}; it must be a list of objects, each a tool's JSON schema"
    elif not isinstance(given, dict):
        yield f"`{column}` is {described(given)}; it must be an object of arguments of the chat template"
    elif taken := [name for name in given if name in _RESERVED]:
        yield f"`{column}` sets `{taken[0]}`, which Tether sets itself; leave it out"


def as_number(column: str, value: Any) -> float | None:
    """A value as a number; None for what is none. Text counts, since CSV has no other type."""
    if isinstance(value, str):
        if column == "label":
            return _TRUTH.get(value.strip().lower())
        try:
            return float(value)
        except ValueError:
            return None
    if isinstance(value, bool):
        return float(value) if column == "label" else None
    if not isinstance(value, (int, float, Decimal)) or (column == "label" and value not in (0, 1)):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def decoded(value: Any) -> Any:
    """What a value that may be spelled out as JSON says, without the empty fields that Arrow adds."""
    if isinstance(value, str):
        try:
            return json.loads(value) if value.strip() else None
        except (ValueError, RecursionError):
            return value
    return _without_none(value)


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def _message_faults(message: Any) -> Iterator[str]:
    if not isinstance(message, dict):
        yield f"is {described(message)}; it must be an object with `role` and `content`"
        return
    filled = clean(message)
    if filled.get("function_call"):
        yield "has `function_call`, the older form of a tool call; write it as `tool_calls`"
    elif "tool_calls" in filled and not _are_calls(filled["tool_calls"]):
        yield f"has `tool_calls` that is {described(filled['tool_calls'])}; it must be a list of objects"
    elif any(isinstance(call.get("function"), dict) and not call["function"].get("name") for call in _calls_of(filled)):
        yield "has a tool call without a `name`; a call has the name of its function"
    elif {"from", "value"} <= filled.keys():
        yield "has the keys from, value, as ShareGPT's rows do; it must have `role` and `content`"
    elif not {"role", "content"} <= filled.keys():
        yield f"has the keys {', '.join(map(str, filled)) or 'none'}; it must have `role` and `content`"
    elif not isinstance(filled["role"], str):
        yield f"has a `role` that is {described(filled['role'])}; it must be text"
    elif isinstance(filled["content"], list):
        kinds = [part.get("type") if isinstance(part, dict) else type(part).__name__ for part in filled["content"]]
        odd = next((kind for kind in kinds if kind != "text"), "text without `text`")
        yield (
            f"has `content` in parts that are not all text (one is `{odd}`), which a model of text does not read; "
            "it must be text"
        )
    elif not isinstance(filled["content"], str):
        yield f"has `content` that is {described(filled['content'])}; it must be text"


def spells_messages(value: str) -> bool:
    """Whether a text spells out a list of messages."""
    return _MESSAGES_AS_TEXT.match(value) is not None


def _calls_of(message: dict[str, Any]) -> list[dict[str, Any]]:
    return message.get("tool_calls") or []


def _are_calls(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(call, dict) for call in value)


def described(value: Any) -> str:
    """What a value is, in words, shortened."""
    match value:
        case None:
            return "missing (null)"
        case bool():
            return f"a truth value ({value})"
        case int() | float() | Decimal():
            return f"a number ({str(value)[:40]})"
        case str():
            return f"text ({value[:40]!r}{'…' if len(value) > 40 else ''})"
        case list():
            return "a list of messages" if value and isinstance(value[0], dict) else "a list"
        case bytes():
            return "bytes"
        case dict():
            return f"an object with the keys {', '.join(map(str, value))}"
    return f"a {type(value).__name__}"


def clean(message: Any) -> dict[str, Any]:
    """A message without the empty fields that Arrow adds where other messages have a value, and its tool calls as
    objects. A message that only calls tools has no content; it gets an empty one, as templates add it to text."""
    kept = {key: value for key, value in message.items() if value is not None}
    if isinstance(kept.get("content"), list):
        kept["content"] = joined_parts(kept["content"])
    if "tool_calls" not in kept:
        return kept
    calls = decoded(kept.pop("tool_calls"))
    if not calls:
        return kept
    if _are_calls(calls):
        calls = [_nested(call) for call in calls]
    return {**({} if "content" in kept else {"content": ""}), **kept, "tool_calls": calls}


def _nested(call: dict[str, Any]) -> dict[str, Any]:
    """A tool call as templates read it; many files have its name and arguments without the object around them."""
    if "function" in call or not {"name", "arguments"} <= call.keys():
        return call
    own = {key: item for key, item in call.items() if key in ("name", "arguments")}
    return {"type": "function", **{key: item for key, item in call.items() if key not in own}, "function": own}


def joined_parts(content: list[Any]) -> Any:
    """Content in parts (`{"type": "text", "text": …}`) as the text that they are together; others as they are.

    Example:
        >>> joined_parts([{"type": "text", "text": "The sky "}, {"type": "text", "text": "is blue."}])
        'The sky is blue.'
    """
    filled = [
        {key: item for key, item in part.items() if item is not None} for part in content if isinstance(part, dict)
    ]
    plain = [part["text"] for part in filled if part.get("type") == "text" and isinstance(part.get("text"), str)]
    return "".join(plain) if len(plain) == len(content) else content


def cleaned(value: Any) -> Any:
    """Text as it is; messages cleaned."""
    return [clean(message) for message in value] if isinstance(value, list) else value


def texts_of(value: str | Messages) -> list[str]:
    """The texts in a prompt or completion: itself, or the content of each message.

    Example:
        >>> texts_of([{"role": "user", "content": "Hi"}])
        ['Hi']
    """
    return [value] if isinstance(value, str) else [message["content"] for message in value]


def is_blank(value: str | Messages) -> bool:
    """Whether a completion says nothing: no text and no tool call."""
    called = isinstance(value, list) and any(message.get("tool_calls") for message in value)
    return not called and not "".join(texts_of(value)).strip()
