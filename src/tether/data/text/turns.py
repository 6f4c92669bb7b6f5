"""Where in a rendered conversation the turns lie that are scored. Called by `render`.

A template is a program, so turns are not searched for by their words: the conversation is rendered up to each turn,
and what that has in common with the whole is where the turn begins.
"""

from __future__ import annotations

from collections.abc import Sequence

from tether.data.rows.schema import Turns
from tether.data.text.template import Writer, opening, turn_end
from tether.types import Messages, Preference

Spans = tuple[tuple[int, int], ...]


def scored_spans(
    conversations: Sequence[tuple[Preference, Messages]],
    parts: Sequence[tuple[str, str]],
    write: Writer,
    turns: Turns,
) -> list[Spans]:
    """The characters of each conversation that its scored turns take up, ends of turn included.

    Args:
        conversations: records, and prompt and completion of each as one conversation.
        parts: the same as text: the prompt, and the whole.
        write: what wrote them.
        turns: `assistant`, every turn of the assistant after the prompt; or `last`, the last one of them.

    Returns:
        `(start, end)` of each scored turn, in order. A template that renders the beginning of a conversation otherwise
        than as a part of the whole (one that leaves out earlier thoughts) begins a turn where the two part, and ends it
        with the next end of turn.
    """
    wanted = [_turns(record, messages, turns) for record, messages in conversations]
    asked = [
        one
        for (record, messages), places in zip(conversations, wanted, strict=True)
        for place in places
        for one in ((record, messages[:place], "add_generation_prompt"), (record, messages[: place + 1], ""))
    ]
    written = iter(write(asked))
    end_of_turn = turn_end(write.tokenizer, write.template)
    spans = []
    for (record, messages), places, (prompt, whole) in zip(conversations, wanted, parts, strict=True):
        own = []
        for place in places:
            before, through = next(written), next(written)
            # The first turn of a completion begins where its prompt ends, which may be inside a turn.
            start = _common(prompt if place == _first(record) else before, whole)
            own.append((start, _end(start, place == len(messages) - 1, through, whole, end_of_turn)))
        spans.append(tuple(own))
    return spans


def _turns(record: Preference, messages: Messages, turns: Turns) -> list[int]:
    answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    answers = [place for place in answers if place >= _first(record)]
    return answers[-1:] if turns == "last" else answers


def _first(record: Preference) -> int:
    """Place of the first message that is not of the prompt alone."""
    return len(record.prompt) - (opening(record) == "continue_final_message")


def _end(start: int, last: bool, through: str, whole: str, end_of_turn: str) -> int:
    if last:
        return len(whole)
    if whole.startswith(through):
        return len(through)
    found = whole.find(end_of_turn, start) if end_of_turn else -1
    return found + len(end_of_turn) if found >= 0 else max(start, _common(through, whole))


def _common(text: str, whole: str) -> int:
    """How many leading characters two texts share."""
    low, high = 0, min(len(text), len(whole))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if text[:middle] == whole[:middle] else (low, middle - 1)
    return low
