"""Fields of a row as the formats of other tools have them, each checked as it is read. Called by `formats`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from tether.data.rows.columns import EXTRAS, IMAGE_COLUMNS, TEXTS, VALUES
from tether.data.rows.shared import told
from tether.data.rows.values import clean, decoded, described
from tether.types import Messages

Row = Mapping[str, Any]
# Names of roles in the data of other tools, and the usual ones.
OTHER_ROLES = {
    **{name: "user" for name in ("user", "human", "prompter", "question")},
    **{name: "assistant" for name in ("assistant", "gpt", "chatgpt", "bot", "model", "answer")},
    **{name: "tool" for name in ("tool", "function", "ipython", "observation", "function_response", "tool_response")},
    "system": "system",
    "developer": "system",
}
# Of messages that are a call as JSON text: LLaMA-Factory's and ms-swift's.
CALL_ROLES = ("function_call", "tool_call")
_IMAGE = "<image>"
_TURN = re.compile(r"\n\n(Human|Assistant):[ ]?")


class FieldFault(Exception):
    """A field of a row is not what its format needs."""


class Reading(dict[str, Any]):
    """A row that remembers which of its fields were asked for."""

    def __init__(self, row: Row) -> None:
        super().__init__(row)
        self.asked: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.asked.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        """As of a dictionary."""
        self.asked.add(name)
        return super().get(name, default)

    def unread(self, done: Row) -> dict[str, Any]:
        """The fields that hold something and were not asked for; one whose name means something to what comes later
        gets a longer one."""
        left = {name: value for name, value in self.items() if name not in self.asked and value is not None}
        taken = {*done, *TEXTS, *VALUES, *EXTRAS, "scores"}
        return {f"{name} (of the source)" if name in taken else name: value for name, value in left.items()}


def with_image_parts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Where rows have images, `<image>` in a prompt's messages as the image part that it stands for (LLaMA-Factory)."""
    if not any(row.get(column) for row in rows for column in IMAGE_COLUMNS):
        return rows
    return [
        {**row, "prompt": [{**message, "content": _parts(message.get("content"))} for message in row["prompt"]]}
        if isinstance(row["prompt"], list)
        else row
        for row in rows
    ]


def _parts(content: Any) -> Any:
    if not isinstance(content, str):
        return content
    parts: list[dict[str, str]] = []
    for place, piece in enumerate(content.split(_IMAGE)):
        parts += [{"type": "image"}] * (place > 0) + [{"type": "text", "text": piece}] * bool(piece)
    return parts


def text(row: Row, name: str) -> str:
    """A field that must be text."""
    if name not in row:
        raise FieldFault(f"`{name}` is missing; there are {', '.join(map(str, row)) or 'no fields'}")
    if not isinstance(row[name], str):
        raise FieldFault(f"`{name}` is {described(row[name])}; it must be text")
    return row[name]


def optional(row: Row, name: str) -> str | None:
    """A field that may be missing or empty."""
    return text(row, name) if row.get(name) not in (None, "") else None


def first_of(row: Row, names: Iterable[str]) -> str:
    """The first of several fields that a row has."""
    return next((name for name in names if row.get(name) is not None), next(iter(names)))


def conversation(row: Row, name: str, least: int = 1) -> Messages:
    """A field that must be a list of messages; `from` and `value` are `role` and `content` under other names."""
    given = row.get(name)
    if not isinstance(given, list) or len(given) < least:
        raise FieldFault(f"`{name}` is {described(given)}; it must be a list of at least {least} messages")
    return [_message(item, f"message {place} of `{name}`") for place, item in enumerate(given, 1)]


def answer(row: Row, name: str) -> Messages:
    """An answer: text, one message, or a list of messages that ends in it; see `own_part`."""
    given = row.get(name)
    if isinstance(given, str):
        return [{"role": "assistant", "content": given}]
    if isinstance(given, dict):
        return [_message(given, f"`{name}`")]
    if isinstance(given, list) and given:
        return conversation(row, name)
    raise FieldFault(f"`{name}` is {described(given)}; it must be text, a message, or a list of messages")


def own_part(name: str, messages: Messages, prompt: Messages) -> Messages:
    """What an answer has beyond its prompt, of which it may repeat all messages or the last ones.

    Args:
        name: its field.
        messages: as it was given; several where it has steps, such as the calls of tools, or repeats its prompt.
        prompt: of its row.

    Raises:
        FieldFault: it begins with messages of another conversation, so that it is no answer to this prompt.

    Example:
        >>> asked, said = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
        >>> own_part("chosen", [asked, said], [asked])
        [{'role': 'assistant', 'content': 'So.'}]
    """
    if len(messages) == 1:
        return messages
    ours, theirs = _compared(messages), _compared(prompt)
    longest = min(len(messages) - 1, len(prompt))
    # The first message is compared alone before many are copied, once for each of the prompt's.
    places = (n for n in range(longest, 0, -1) if ours[0] == theirs[-n])
    repeated = next((n for n in places if ours[:n] == theirs[-n:]), 0)
    if messages[repeated]["role"] != "assistant":
        raise FieldFault(
            f"`{name}` begins with {'a message' if repeated else 'messages'} of the {messages[repeated]['role']} that "
            "the prompt of this row does not end in, so that it answers another conversation; give both answers one "
            "prompt"
        )
    return messages[repeated:]


def _compared(messages: Messages) -> list[Any]:
    """Messages but for the blanks around their texts, which exports cut off in one place and not in the other."""
    return [
        (role, content.strip() if isinstance(content, str) else content, calls)
        for role, content, calls in told(messages)
    ]


def label(row: Row, name: str = "label") -> dict[str, Any]:
    """Whether the completion of a row is desirable; its value is checked with the other columns."""
    if name not in row:
        raise FieldFault(f"`{name}` is missing; it must be true or false")
    return {"label": row[name]}


def _message(item: Any, where: str) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise FieldFault(f"{where} is {described(item)}; it must be an object")
    given = clean(item)
    role, content = (given.pop(other, given.get(name)) for name, other in (("role", "from"), ("content", "value")))
    if role in CALL_ROLES:
        return {"role": "assistant", "content": "", "tool_calls": _calls(content, where)}
    if not isinstance(role, str) or (role not in OTHER_ROLES and "from" in item):
        raise FieldFault(f"{where} has a role that is {described(role)}; known are {', '.join(OTHER_ROLES)}")
    if not isinstance(content, (str, list)):
        raise FieldFault(f"{where} has content that is {described(content)}; it must be text")
    return {**given, "role": OTHER_ROLES.get(role, role), "content": content}


def _calls(content: Any, where: str) -> list[dict[str, Any]]:
    calls = decoded(content)
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and "name" in call for call in calls):
        raise FieldFault(f"{where} is a function call that is {described(content)}; it must be JSON with a `name`")
    return [{"type": "function", "function": call} for call in calls]


def is_transcript(given: str) -> bool:
    """Whether a text begins as a transcript in the manner of HH-RLHF does."""
    return _TURN.match("\n\n" + given.lstrip("\n")) is not None


def transcript(row: Row, name: str) -> Messages:
    """The turns of a transcript in the manner of HH-RLHF.

    Example:
        >>> transcript({"chosen": "\\n\\nHuman: Hi\\n\\nAssistant: Hello"}, "chosen")
        [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello'}]
    """
    before, *turns = _TURN.split("\n\n" + text(row, name).lstrip("\n"))
    if before.strip() or not turns:
        raise FieldFault(f"`{name}` begins with {before.strip()[:40]!r}; a transcript begins with 'Human:'")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[speaker], "content": said.strip()} for speaker, said in zip(turns[::2], turns[1::2], strict=True)
    ]
