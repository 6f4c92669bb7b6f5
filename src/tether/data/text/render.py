"""From records to text, with the tokenizer's chat template where rows are conversations. Called by `prepare`.

The prompt is rendered with the template's generation prompt, each completion as part of the whole conversation, as in
TRL's DPO trainer. Where the prompt ends in an assistant message and the completion begins with one, the completion
continues that message (`continue_final_message`); TRL's DPO trainer makes it a second assistant turn, which many
templates refuse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

from transformers import PreTrainedTokenizerBase

from tether.data.rows.schema import Turns
from tether.data.text.template import Writer, conversation, opening
from tether.data.text.turns import scored_spans
from tether.types import Messages, Preference


@dataclass(frozen=True)
class Rendered:
    """A preference as text.

    Args:
        prompt: what the model is given.
        texts: prompt and completion together, one text per completion.
        source_row: number of the row in the data it came from, from 0.
        templated: a chat template wrote the text, so special tokens are already in it.
        given_boundary: the data says where the prompt ends; False where the prompt is only what completions share.
        whole: there is no prompt; the first token stands for it, since nothing predicts it.
        values: numbers of the row, see `Preference`.
        scored: for each text, the `(start, end)` characters of the turns that are scored; None for all of it.
    """

    prompt: str
    texts: tuple[str, ...]
    source_row: int
    templated: bool = False
    given_boundary: bool = True
    whole: bool = False
    values: Mapping[str, float] = field(default_factory=dict)
    scored: tuple[tuple[tuple[int, int], ...], ...] | None = None

    @property
    def round_trips(self) -> bool:
        """Whether every text begins with the prompt; templates that render it otherwise in a conversation exist."""
        return all(text.startswith(self.prompt) for text in self.texts)

    @property
    def completions(self) -> tuple[str, ...]:
        """What follows the prompt in each text; has a meaning only where `round_trips`."""
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
            Rendered(p, tuple(p + c for c in cs), r.source_row, False, given_boundary, _whole(r), r.values)
            for p, cs, r in plain
        ]
    write = Writer(tokenizer, template, name)
    prompts = write([(r, cast(Messages, r.prompt), opening(r)) for r in records])
    whole = [(r, conversation(r, k), "") for r in records for k in range(len(r.completions))]
    written = iter(write(whole))
    rows = [
        Rendered(prompt, tuple(next(written) for _ in r.completions), r.source_row, True, True, _whole(r), r.values)
        for r, prompt in zip(records, prompts, strict=True)
    ]
    if turns == "all":
        return rows
    parts = [(row.prompt, text) for row in rows for text in row.texts]
    spans = iter(scored_spans([(r, messages) for r, messages, _ in whole], parts, write, turns))
    return [replace(row, scored=tuple(next(spans) for _ in row.texts)) for row in rows]


def _whole(record: Preference) -> bool:
    return record.kind == "completion" and not record.prompt
