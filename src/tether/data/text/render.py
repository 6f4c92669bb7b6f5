"""From records to text, with the tokenizer's chat template where rows are conversations. Called by `prepare`.

The prompt is rendered with the template's generation prompt, each completion as part of the whole conversation, as in
TRL's DPO trainer. Where the prompt ends in an assistant message and the completion begins with one, the completion
continues that message (`continue_final_message`); TRL's DPO trainer makes it a second assistant turn, which many
templates refuse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Literal, cast

from transformers import PreTrainedTokenizerBase

from tether.data.rows.schema import Turns
from tether.data.text.answer_end import Closings, cut_of, is_plainly_closed
from tether.data.text.marks import (
    UNUSABLE,
    answer_start,
    lost_texts,
    marked,
    needs_marks,
    opening_length,
    shared_length,
)
from tether.data.text.template import Writer, conversation, opening
from tether.data.text.turns import Written, scored_spans
from tether.errors import DataError
from tether.types import Messages, Preference

# What was asked of the template, and what it wrote.
_Conversation = tuple[tuple[Preference, Messages, str], str]


@dataclass(frozen=True)
class Rendered:
    """A preference as text.

    Args:
        prompt: what the model is given.
        texts: prompt and completion together, one text per completion; through a template, up to its end of turn.
        source_row: number of the row in the data it came from, from 0.
        templated: a chat template wrote the text, so special tokens are already in it.
        given_boundary: the data says where the prompt ends; False where the prompt is only what completions share.
        whole: there is no prompt; the first token stands for it, since nothing predicts it.
        values: numbers of the row, see `Preference`.
        scored: for each text, the `(start, end)` characters of the turns that are scored; None for all of it.
        closed: for each text, whether the template ended it with an end-of-turn token; empty without a template.
        lost: what the row gives and the template does not write, see `marks`.
        fault: why the row cannot be used: a completion that is not written, or turns that cannot be told apart.
        moved: the template writes the prompt otherwise alone, so that it is what the conversation has up to the answer.
    """

    prompt: str
    texts: tuple[str, ...]
    source_row: int
    templated: bool = False
    given_boundary: bool = True
    whole: bool = False
    values: Mapping[str, float] = field(default_factory=dict)
    scored: tuple[tuple[tuple[int, int], ...], ...] | None = None
    closed: tuple[bool, ...] = ()
    lost: tuple[str, ...] = ()
    fault: Literal["unwritten", "turns"] | None = None
    moved: bool = False

    @property
    def completions(self) -> tuple[str, ...]:
        """What follows the prompt in each text; has a meaning only where they begin with it."""
        return tuple(text[len(self.prompt) :] for text in self.texts)


def render(
    records: Sequence[Preference],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str | None = None,
    given_boundary: bool = True,
    turns: Turns = "all",
    name: str = "data",
) -> list[Rendered]:
    """Write records as text; conversations through the chat template.

    Args:
        records: all text, or all conversations.
        tokenizer: whose special tokens the template uses.
        template: chat template, required for conversations; see `chat_template`.
        given_boundary: False where the prompt was taken from what the completions share.
        turns: which turns of a completion are scored, of conversations: `all` of it, every turn of the `assistant`, or
            the `last` one of these.
        name: what to call the rows in messages.

    Returns:
        One text form per record, in order.

    Raises:
        DataError: the template refuses a conversation; the message names the row.
    """
    if template is None:
        plain = [(cast(str, r.prompt), cast(tuple[str, ...], r.completions), r) for r in records]
        return [
            Rendered(
                prompt,
                tuple(prompt + completion for completion in completions),
                record.source_row,
                templated=False,
                given_boundary=given_boundary,
                whole=_whole(record),
                values=record.values,
            )
            for prompt, completions, record in plain
        ]
    write = Writer(tokenizer, template, name)
    write.refuse_other_roles(records)
    closings = Closings(write)
    prompts = write([(r, cast(Messages, r.prompt), opening(r)) for r in records])
    whole = [(r, conversation(r, k), "") for r in records for k in range(len(r.completions))]
    written = iter(zip(whole, write(whole), strict=True))
    rows: list[Rendered] = []
    for record, alone in zip(records, prompts, strict=True):
        texts = list(islice(written, len(record.completions)))
        if not all(text.startswith(alone) for _, text in texts) and not any(row.moved for row in rows):
            _require_steady(record, alone, write)
        rows.append(_rendered(record, alone, texts, write, closings, turns))
    return rows


def _rendered(
    record: Preference, alone: str, texts: Sequence[_Conversation], write: Writer, closings: Closings, turns: Turns
) -> Rendered:
    """One row, of its prompt as it is written alone and of its conversations."""
    moved = not all(text.startswith(alone) for _, text in texts)
    prompt = _prompt_within(texts, alone, write) if moved else alone
    own = [_Text.of(record, text, prompt, write, closings) for text in texts]
    lost = {name for one in own for name in one.lost} if own else _lost(record, prompt, write)
    lost |= write.unread(record)
    row = Rendered(
        prompt,
        tuple(one.text for one in own),
        record.source_row,
        True,
        True,
        _whole(record),
        record.values,
        closed=tuple(one.closed for one in own),
        lost=tuple(sorted(name for name in lost if name.removeprefix("parts of ") not in lost - {name})),
        fault="unwritten" if any(one.unwritten for one in own) else None,
        moved=moved,
    )
    return row if turns == "all" or row.fault else _with_turns(row, own, write, closings, turns)


def _require_steady(record: Preference, prompt: str, write: Writer) -> None:
    """Refuse a template that writes a prompt in another way each time, such as one with the time of day: no text then
    begins with its prompt."""
    again = write([(record, cast(Messages, record.prompt), opening(record))])[0]
    if again != prompt:
        place = shared_length(prompt, again)
        raise DataError(
            f"{write.name}: row {record.source_row + 1}: the chat template wrote the prompt twice in two ways "
            f"({prompt[place : place + 20]!r} and {again[place : place + 20]!r}), so no answer can be told from "
            "its prompt. Set a template that writes neither the time of day nor anything random."
        )


def _prompt_within(texts: Sequence[_Conversation], alone: str, write: Writer) -> str:
    """The prompt of conversations that do not begin with it as it is written alone: what they have up to the answer, so
    that nothing which others say, and no opening of a turn, counts as the answer. As it is where that is not found."""
    if opening(texts[0][0][0]) != "add_generation_prompt":
        return alone
    found = set()
    for (record, messages, _), text in texts:
        place = len(record.prompt)
        given = messages[place - 1]["content"]
        said = given.strip() if isinstance(given, str) else ""
        asked = alone.rfind(said) + len(said) if said else 0
        if said in alone and asked and text.startswith(alone[:asked]):  # only what opens the answer is another
            start = asked + opening_length(text[asked:], alone[asked:], messages[place])
        else:
            start = answer_start(write, record, messages, place, text)
        found.add(None if start is None else text[:start])
    (prompt,) = found if len(found) == 1 else (None,)
    return alone if prompt is None else prompt


def _with_turns(row: Rendered, own: Sequence[_Text], write: Writer, closings: Closings, turns: Turns) -> Rendered:
    spans = tuple(scored_spans([one.written for one in own], write, closings, turns))
    return replace(row, scored=spans) if all(spans) else replace(row, fault="turns")


@dataclass(frozen=True)
class _Text:
    """One conversation as text up to its end of turn, and what became of what it gives."""

    written: Written
    closed: bool
    lost: frozenset[str]
    unwritten: bool

    @property
    def text(self) -> str:
        return self.written.text[: self.written.cut]

    @classmethod
    def of(
        cls,
        record: Preference,
        rendered: _Conversation,
        prompt: str,
        write: Writer,
        closings: Closings,
    ) -> _Text:
        (_, messages, _), text = rendered
        lost = lost_texts(messages, text)
        found = None
        if lost or needs_marks(record, messages) or not is_plainly_closed(closings, messages[-1], text):
            found = marked(write, record, messages)
            lost += found.lost() if found is not None else []
        cut, closed = cut_of(closings, messages, text, found)
        first = len(record.prompt)
        gone = any(place >= first and name in UNUSABLE for name, place in lost)
        if lost and not gone and closings.is_bare(text[shared_length(prompt, text) : cut]):
            lost = [one for one in lost if one[0] != "parts of assistant messages"] + [("assistant messages", first)]
            gone = True
        return cls(Written(record, messages, prompt, text, cut), closed, frozenset(name for name, _ in lost), gone)


def _lost(record: Preference, prompt: str, write: Writer) -> set[str]:
    """What is lost of a prompt alone."""
    messages = cast(Messages, record.prompt)
    lost = lost_texts(messages, prompt)
    if (lost or needs_marks(record, messages)) and (found := marked(write, record, messages, opening(record))):
        lost += found.lost()
    return {name for name, _ in lost}


def _whole(record: Preference) -> bool:
    return record.kind == "completion" and not record.prompt
