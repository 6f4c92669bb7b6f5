"""Where in a rendered conversation the turns lie that are scored. Called by `render`.

The conversation is rendered with marks behind every text, and up to each answer as the model is asked for it: an
answer begins where that prompt ends, and ends with the end-of-turn token behind its own last text. The result is proved
for every turn: it must hold all marks of its message and none of another one, or the row is not used. Of a template
that marks itself what the assistant says (`{% generation %}`), only what it marks is scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tether.data.rows.schema import Turns
from tether.data.text.answer_end import Closings
from tether.data.text.marks import Marked, marked, shared_length
from tether.data.text.template import Writer, opening
from tether.types import Messages, Preference

Spans = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Written:
    """A conversation and what was written of it.

    Args:
        record: the row.
        messages: prompt and completion.
        prompt: the prompt as text.
        text: the whole, as the template writes it.
        cut: where the last answer is over.
    """

    record: Preference
    messages: Messages
    prompt: str
    text: str
    cut: int


def scored_spans(conversations: Sequence[Written], write: Writer, closings: Closings, turns: Turns) -> list[Spans]:
    """The characters of each conversation that its scored turns take up, ends of turn included.

    Args:
        conversations: what was written.
        write: what wrote it.
        closings: how it closes answers.
        turns: `assistant`, every turn of the assistant after the prompt; or `last`, the last one of them.

    Returns:
        `(start, end)` of each scored turn, in order; none for a conversation whose turns cannot be told apart.
    """
    return [_Turns(one, write, closings).spans(turns) for one in conversations]


class _Turns:
    """The turns of one conversation."""

    def __init__(self, one: Written, write: Writer, closings: Closings) -> None:
        self.one, self.write, self.closings = one, write, closings
        self.first = len(one.record.prompt) - (opening(one.record) == "continue_final_message")

    def spans(self, turns: Turns) -> Spans:
        """Of the scored turns; none where they cannot be told."""
        one = self.one
        places = [k for k, message in enumerate(one.messages) if message["role"] == "assistant" and k >= self.first]
        places = places[-1:] if turns == "last" else places
        found = self._marked(places)
        if found is None:
            return ()
        spans = []
        for place in places:
            span = self._span(place, found)
            if span is None or not found.holds_only(place, *span):
                return ()
            spans.append(span)
        own = self.write.generated(one.record, one.messages)
        return tuple(spans) if own is None else _within(own, spans)

    def _marked(self, places: Sequence[int]) -> Marked | None:
        """The conversation with its marks; with the fewest that tell, where all of them change what is written."""
        one = self.one
        needed = {near for place in places for near in (place - 1, place, place + 1)}
        for only in (None, needed, set(places)):
            found = marked(self.write, one.record, one.messages, only=only)
            if found is not None and found.text == one.text:
                return found
        return None

    def _span(self, place: int, found: Marked) -> tuple[int, int] | None:
        one = self.one
        start = self._start(place, found)
        if start is None:
            return None
        last = place == len(one.messages) - 1
        stop = max(found.end(place) or 0, start)
        if last:
            return start, max(one.cut, stop)
        end = self.closings.end(one.messages[place], one.text, stop, last=False)
        limit = found.end(place + 1)
        if end is None or (limit is not None and end > limit):
            return start, self.closings.plain_end(one.text, stop)
        return start, end

    def _start(self, place: int, found: Marked) -> int | None:
        """Where an answer begins: where the prompt that asks for it ends."""
        one = self.one
        if place == self.first:
            # It begins where the row's prompt ends, which may be inside a turn.
            return shared_length(one.prompt, one.text)
        asked = self.write.attempt(one.record, one.messages[:place], "add_generation_prompt")
        if asked is not None and one.text.startswith(asked):
            return len(asked)
        before = marked(self.write, one.record, one.messages[:place], "add_generation_prompt")
        if before is None or before.text != asked:
            return None
        # Earlier turns are written otherwise in the prompt; what follows the last of them is compared.
        whole, prompt = found.end_before(place), before.end_before(place)
        return whole + shared_length(one.text[whole:], before.text[prompt:])


def _within(parts: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> Spans:
    """What lies in both."""
    both = ((max(part[0], span[0]), min(part[1], span[1])) for span in spans for part in parts)
    return tuple((start, end) for start, end in both if end > start)
