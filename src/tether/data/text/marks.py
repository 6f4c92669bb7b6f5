"""What of a conversation its rendering contains, and where. Called by `answer_end`, `render` and `turns`.

A template is a program: it may trim a text, leave out a thought, or write no tools at all. So a mark is put behind
every text that a row gives, and the conversation is rendered once more: a mark that is missing stands for a text that
was left out, and where the marks lie is where the texts end. Marks are characters of Unicode's private use area.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tether.data.text.template import Writer, as_object
from tether.types import Messages, Preference

Given = tuple[str, int, int]
_MARK = re.compile("\ue010([0-9]+)\ue011")
_WORD = re.compile(r"\w{2,}")
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_THOUGHT_TAGS = re.compile(r"\s*</?think>\s*")
# An answer without these is another one than was given.
UNUSABLE = ("tool calls", "assistant messages")
# What the texts of a message are called where they are lost.
_BY_ROLE = {"system": "system messages", "developer": "system messages", "tool": "tool results"}


@dataclass
class Marked:
    """A conversation as it was rendered with marks.

    Args:
        text: the rendering without its marks.
        given: for each mark, what the text before it is, the place of its message (-1 for tools), and the number of
            what it is a part of: the name and the arguments of a call are one.
        places: number of a mark to where it lies in `text`; without those that were not written.
    """

    text: str
    given: list[Given]
    places: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))

    def end(self, message: int) -> int | None:
        """Where the last text of a message ends; None for a message of which nothing was written."""
        return max(self._of(message), default=None)

    def end_before(self, message: int) -> int:
        """Where the last text of all messages before this one ends."""
        return max((place for earlier in range(message) for place in self._of(earlier)), default=0)

    def holds_only(self, message: int, start: int, end: int) -> bool:
        """Whether all marks of a message, and no others, lie after `start` and not after `end`."""
        return all(
            (start < place <= end) == (self.given[mark][1] == message)
            for mark, places in self.places.items()
            for place in places
        )

    def lost(self) -> list[tuple[str, int]]:
        """What was not written, with the place of its message."""
        written = {self.given[mark] for mark in self.places}
        return [one[:2] for one in dict.fromkeys(self.given) if one not in written]

    def _of(self, message: int) -> list[int]:
        return [place for mark, places in self.places.items() if self.given[mark][1] == message for place in places]


def marked(
    write: Writer, record: Preference, messages: Messages, opened: str = "", only: Collection[int] | None = None
) -> Marked | None:
    """Render a conversation with a mark behind each of its texts.

    Args:
        write: the template.
        record: whose tools and arguments it is rendered with.
        messages: the conversation.
        opened: see `opening`.
        only: places of messages that get marks; None for all, and the tools.

    Returns:
        The result; None where the template refuses it.
    """
    given: list[Given] = []
    changed = [
        _marked_message(message, place, given) if only is None or place in only else message
        for place, message in enumerate(messages)
    ]
    tools = record.tools
    if only is None and tools:
        tools = [_marked_tool(tool, part, given) for part, tool in enumerate(tools)]
    text = write.attempt(replace(record, tools=tools), changed, opened)
    if text is None:
        return None
    found, length, pieces = Marked("", given), 0, []
    parts = _MARK.split(text)
    for piece, mark in zip(parts[::2], [*parts[1::2], None], strict=True):
        pieces.append(piece)
        length += len(piece)
        if mark is not None:
            found.places[int(mark)].append(length)
    found.text = "".join(pieces)
    return found


def answer_start(
    write: Writer,
    record: Preference,
    messages: Messages,
    place: int,
    text: str,
    found: Marked | None = None,
) -> int | None:
    """Where in a rendered conversation an answer begins: where the prompt that asks for it ends.

    Args:
        write: the template.
        record: the row.
        messages: the conversation.
        place: of the answer in it.
        text: the conversation as it was written.
        found: the same with marks, where it is there already.

    Returns:
        None where it cannot be told.
    """
    asked = write.attempt(record, messages[:place], "add_generation_prompt")
    if asked is not None and text.startswith(asked):
        return len(asked)
    before = marked(write, record, messages[:place], "add_generation_prompt")
    found = found or marked(write, record, messages)
    if before is None or before.text != asked or found is None or found.text != text:
        return None
    # Earlier turns are written otherwise in the prompt; what follows the last of them is compared.
    whole, prompt = found.end_before(place), before.end_before(place)
    return whole + opening_length(text[whole : found.end(place)], before.text[prompt:], messages[place])


def opening_length(between: str, asked: str, answer: Mapping[str, Any]) -> int:
    """How much of what follows the last text before an answer opens it.

    Args:
        between: what the conversation has from there on, up to the end of the answer's own text or further.
        asked: what the prompt has there.
        answer: the message.

    Example:
        >>> opening_length("<end>\\nassistant: Yes", "\\nassistant: ", {"content": "Yes"})
        17
    """
    shared = shared_length(between, asked)
    if shared == len(asked):
        return shared
    # The turn before is closed otherwise, or not at all, in the prompt: its opening of the answer is looked for.
    content = answer.get("content")
    limit = between.rfind(content.strip()) if isinstance(content, str) and content.strip() else -1
    limit = len(between) if limit < 0 else limit
    for cut in range(len(asked)):
        ending = asked[cut:]
        inside_a_word = cut and asked[cut - 1].isalnum() and asked[cut].isalnum()
        if not inside_a_word and _WORD.search(ending) and (at := between.find(ending, 0, limit)) >= 0:
            return max(at + len(ending), shared)
    return shared


def lost_texts(messages: Messages, text: str) -> list[tuple[str, int]]:
    """Texts of messages of which a part is not in a rendering, with the places of the messages."""
    lost, at = [], 0
    for place, message in enumerate(messages):
        content = message.get("content")
        if not isinstance(content, str):
            continue
        # It is behind the one before, as a rule; from the beginning on, many messages would each be looked for in all.
        found = text.find(content.strip(), at)
        if found >= 0 or content.strip() in text:
            at = max(at, found)
            continue
        *thoughts, said = _THOUGHT_TAGS.split(content.strip())
        name = "parts of " + _name(message)
        missing = [(piece, "thoughts") for piece in thoughts] + [(said, name)]
        lost += [(kind, place) for piece, kind in missing if piece not in text and json.dumps(piece)[1:-1] not in text]
    return lost


def needs_marks(record: Preference, messages: Messages) -> bool:
    """Whether a conversation gives more than plain messages, so that only marks tell what became of it."""
    return bool(record.tools) or any(
        message.get("tool_calls") or any(message.get(name) for name in _THOUGHTS) for message in messages
    )


def shared_length(text: str, other: str) -> int:
    """How many leading characters two texts share.

    Example:
        >>> shared_length("assistant", "assist!"), shared_length("a", "a")
        (6, 1)
    """
    low, high = 0, min(len(text), len(other))
    while low < high:  # slices compare in C
        middle = (low + high + 1) // 2
        low, high = (middle, high) if text[:middle] == other[:middle] else (low, middle - 1)
    return low


def _name(message: Mapping[str, Any]) -> str:
    return _BY_ROLE.get(message["role"], f"{message['role']} messages")


def _marked_message(message: Mapping[str, Any], place: int, given: list[Given]) -> dict[str, Any]:
    changed = dict(message)
    for name in (*_THOUGHTS, "content"):
        if isinstance(message.get(name), str) and message[name].strip():
            what = "thoughts" if name in _THOUGHTS else _name(message)
            changed[name] = _behind(message[name], (what, place, 0), given)
    if message.get("tool_calls"):
        changed["tool_calls"] = [
            _marked_call(call, ("tool calls", place, part), given) for part, call in enumerate(message["tool_calls"])
        ]
    return changed


def _marked_call(call: Mapping[str, Any], what: Given, given: list[Given]) -> dict[str, Any]:
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _marked_call(call["function"], what, given)}
    changed = dict(call)
    for name in ("name", "arguments"):
        if name in call:
            changed[name] = _leaves(as_object(call[name]) if name == "arguments" else call[name], what, given)
    return changed


def _leaves(value: Any, what: Given, given: list[Given]) -> Any:
    if isinstance(value, str):
        return _behind(value, what, given) if value.strip() else value
    if isinstance(value, Mapping):
        return {_key(key, item, what, given): _leaves(item, what, given) for key, item in value.items()}
    return [_leaves(item, what, given) for item in value] if isinstance(value, list) else value


def _key(key: str, value: Any, what: Given, given: list[Given]) -> str:
    """A key with a mark, for a number or a truth value, which cannot have one."""
    return key if isinstance(value, (str, Mapping, list)) else _behind(key, what, given)


def _marked_tool(tool: Mapping[str, Any], part: int, given: list[Given]) -> dict[str, Any]:
    if isinstance(tool.get("function"), Mapping):
        return {**tool, "function": _marked_tool(tool["function"], part, given)}
    name = tool.get("name")
    return {**tool, "name": _behind(name, ("tools", -1, part), given)} if isinstance(name, str) else dict(tool)


def _behind(text: str, what: Given, given: list[Given]) -> str:
    """A text with a mark behind it; before white space at its end, which templates trim."""
    given.append(what)
    said = text.rstrip()
    return f"{said}\ue010{len(given) - 1}\ue011{text[len(said) :]}"
