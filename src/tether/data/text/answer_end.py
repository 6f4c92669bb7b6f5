"""How a template closes an answer: where in a rendering the end-of-turn token of an answer lies. Called by `render`.

It is measured, not read off the tokenizer: a short conversation is rendered once closed after its answer and once with
a further message behind it. What both write behind the answer closes it; what only one writes does not (the second end
that Phi-3 writes after a conversation, the opening of the next turn). Where they share no control token (gpt-oss), the
answer has another end in the midst of a conversation. The same is measured for an answer that calls a tool: a control
token that is written once for each call closes the call, not the answer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from tether.data.text.marks import Marked, marked, shared_length
from tether.data.text.template import PROBE_CALL, PROBE_TOOLS, Writer
from tether.types import Messages, Preference

_ASK: dict[str, Any] = {"role": "user", "content": "Hi"}
_SAY: dict[str, Any] = {"role": "assistant", "content": "Yes"}
_CALL: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": [PROBE_CALL]}
_TOLD: dict[str, Any] = {"role": "tool", "name": "probe", "tool_call_id": "probe0001", "content": "Done"}


@dataclass(frozen=True)
class Closing:
    """How answers of one kind are closed.

    Args:
        tail: all that follows the last answer of a conversation.
        end: the end-of-turn token there; empty for none.
        inside: that of an answer in the midst of a conversation; empty for none.
        kept: how much of the tail belongs to an answer that no token ends.
    """

    tail: str = ""
    end: str = ""
    inside: str = ""
    kept: int = 0


class Closings:
    """The closings of a template, measured when they are asked for.

    Args:
        write: the template.
    """

    def __init__(self, write: Writer) -> None:
        self._write = write
        self._controls = control_tokens(write.tokenizer)

    @cached_property
    def said(self) -> Closing:
        """Of an answer in words."""
        return self._measured(_SAY, _ASK)

    @cached_property
    def called(self) -> Closing:
        """Of an answer that calls a tool."""
        return self._measured(_CALL, _TOLD)

    def end(self, message: dict[str, Any], text: str, start: int, *, last: bool) -> int | None:
        """The place after the end-of-turn token of an answer.

        Args:
            message: the answer.
            text: the conversation.
            start: where the answer's own text ends.
            last: nothing comes after it.

        Returns:
            None where the template ends it with no token.
        """
        kinds = (self.called, self.said) if message.get("tool_calls") else (self.said,)
        ends = [kind.end if last else kind.inside for kind in kinds]
        found = [(place, end) for end in ends if end and (place := text.find(end, start)) >= 0]
        if not found:
            return None
        # A call that ends in its own token comes before the end of a later answer.
        place, end = min(found)
        return place + len(end)

    def is_bare(self, text: str) -> bool:
        """Whether a completion is nothing but control tokens."""
        return not self._controls.sub("", text).strip()

    def plain_end(self, text: str, start: int) -> int:
        """The place after an answer in the midst of a conversation that is closed with no token."""
        said = self.said
        return start + said.kept if not said.end and text.startswith(said.tail, start) else start

    def cut(self, message: dict[str, Any], text: str, start: int) -> tuple[int, bool]:
        """Where the last answer of a conversation is over, and whether with an end-of-turn token; see `end`."""
        end = self.end(message, text, start, last=True)
        if end is not None:
            return end, True
        if not self.said.end and text[start:] == self.said.tail:
            return self.plain_end(text, start), False
        return len(text), False

    def _measured(self, answer: dict[str, Any], further: dict[str, Any]) -> Closing:
        record = Preference([], (), "completion", 0, tools=PROBE_TOOLS if "tool_calls" in answer else None)
        closed = marked(self._write, record, [_ASK, answer])
        place = closed and closed.end(1)
        if closed is None or place is None:
            return Closing()
        tail = closed.text[place:]
        inner = marked(self._write, record, [_ASK, answer, further, _SAY])
        inside = inner.text[stop : inner.end(2)] if inner is not None and (stop := inner.end(1)) is not None else tail
        passed = self._passed(record, answer, tail)
        shared = tail[: shared_length(tail, inside)]
        ends = [found.group() for found in self._controls.finditer(shared) if found.group() not in passed]
        opens = self._opens_always(record)
        while len(ends) > 1 and ends[-1] in opens:
            ends.pop()
        if ends:
            return Closing(tail, ends[-1], ends[-1])
        first = [self._first(text, passed) for text in (tail, inside)]
        # What only the next turn has may be its opening (GLM), or the end of this one, which the last one lacks.
        open_ended = not first[0] and ("tool_calls" in answer or first[1] in self._openings(record))
        open_ended = open_ended or first[1] in self._opens_question(record)
        return Closing(tail, first[0], "" if open_ended else first[1], len(tail) if inside.startswith(tail) else 0)

    def _first(self, text: str, passed: set[str]) -> str:
        return next((found.group() for found in self._controls.finditer(text) if found.group() not in passed), "")

    def _passed(self, record: Preference, answer: dict[str, Any], tail: str) -> set[str]:
        """Control tokens that are written for each call, so that none of them ends the answer."""
        if "tool_calls" not in answer:
            return set()
        twice = {**answer, "tool_calls": [PROBE_CALL, {**PROBE_CALL, "id": "probe0002"}]}
        both = marked(self._write, record, [_ASK, twice])
        if both is None or len(both.places) < 5:  # the question, and name and argument of each call
            return set()
        calls = sorted(place for places in both.places.values() for place in places)
        behind = both.text[calls[2] :]  # of the first call
        return {token for token in self._controls.findall(tail) if behind.count(token) > tail.count(token)}

    def _opens_always(self, record: Preference) -> set[str]:
        """Control tokens that open a turn, of a template that opens the next answer whether asked or not."""
        texts = [marked(self._write, record, [_ASK], opened) for opened in ("", "add_generation_prompt")]
        if texts[0] is None or texts[1] is None or texts[0].text != texts[1].text:
            return set()
        return self._openings(record)

    def _openings(self, record: Preference) -> set[str]:
        """Control tokens before the first text of a conversation."""
        asked = [[_ASK], [{"role": "system", "content": "Be kind"}, _ASK]]
        heads = [marked(self._write, record, messages) for messages in asked]
        before = [head.text[: _first_place(head)] for head in heads if head is not None and head.places]
        return set(self._controls.findall(min(before, key=len, default="")))

    def _opens_question(self, record: Preference) -> set[str]:
        """The control token right before a question, unless it closes one too: an end that turns share opens none."""
        asked = marked(self._write, record, [_ASK])
        if asked is None or (place := asked.end(0)) is None:
            return set()
        nearest = self._controls.findall(asked.text[: _first_place(asked)])[-1:]
        return {*nearest} - {self._first(asked.text[place:], set())}


def _first_place(found: Marked) -> int:
    return min(place for places in found.places.values() for place in places)


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """A pattern of all special and added tokens of a tokenizer; the longest first, and none that is white space."""
    added = (token.content for token in tokenizer.added_tokens_decoder.values())
    names = {name for name in (*map(str, tokenizer.all_special_tokens), *added) if name.strip()}
    ordered = sorted(names, key=lambda name: (-len(name), name))
    return re.compile("|".join(map(re.escape, ordered)) or r"(?!)")


def cut_of(closings: Closings, messages: Messages, text: str, found: Marked | None) -> tuple[int, bool]:
    """Where the last answer of a rendered conversation is over, and whether with an end-of-turn token."""
    last = messages[-1]
    if found is not None and found.text == text and (end := found.end(len(messages) - 1)) is not None:
        return closings.cut(last, text, end)
    said = closings.said
    for content in (last["content"], last["content"].strip()):
        if text.endswith(content + said.tail):
            return closings.cut(last, text, len(text) - len(said.tail))
    if said.end and (place := text.rfind(said.end)) >= 0:
        return place + len(said.end), True
    return len(text), False


def is_plainly_closed(closings: Closings, message: dict[str, Any], text: str) -> bool:
    """Whether a conversation ends in its last message and the measured tail, so that no marks are needed."""
    content = message["content"]
    return bool(content.strip()) and (
        text.endswith(content + closings.said.tail) or text.endswith(content.strip() + closings.said.tail)
    )
