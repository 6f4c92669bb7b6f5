"""From text to token ids for encoder-decoder models. Called by `prepare`.

The encoder reads the prompt as the tokenizer writes a text, special tokens included (T5 ends it with `</s>`, BART puts
it between `<s>` and `</s>`). The decoder begins with a start token of the model's own, so a completion is a text of its
own too: as the tokenizer writes a target, with exactly one end token. Prompt and completion are never one text, so
there is no boundary that could move.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from tether.data.text.render import Rendered
from tether.data.text.tokenize import Encoder, Tokenized
from tether.errors import ConfigError

Around = tuple[list[int], list[int]]


def tokenize_seq2seq(rows: Sequence[Rendered], encoder: Encoder) -> list[Tokenized]:
    """Turn rendered rows into what an encoder and a decoder are given; every distinct text is tokenised once.

    Args:
        rows: a batch.
        encoder: the tokenizer.

    Returns:
        One result per row, in order; a row that a chat template renders in a way that does not tell the prompt from
        its completions is marked as dropped.

    Raises:
        ConfigError: only some turns are to be scored.
    """
    if any(row.scored is not None for row in rows):
        raise ConfigError(
            "Some turns of a completion are not to be scored, and a decoder writes one text. Leave `turns` at `all`."
        )
    source, target = ids_around(encoder.tokenizer), ids_around(encoder.tokenizer, target=True)
    completions = [
        row.completions if row.templated else tuple(map(encoder.without_end, row.completions)) for row in rows
    ]
    distinct = list(dict.fromkeys(t for row, own in zip(rows, completions, strict=True) for t in (row.prompt, *own)))
    ids = dict(zip(distinct, encoder.encode(distinct), strict=True))
    found = []
    for row, own in zip(rows, completions, strict=True):
        prompt = _between(ids[row.prompt], source)
        ended = encoder.all_ended(row, [_between(ids[text], (target[0], [])) for text in own])
        dropped = "boundary" if row.moved else None
        kind = "exact" if row.given_boundary else "shared"
        found.append(
            Tokenized(
                prompt,
                [completion for completion, _ in ended],
                row.source_row,
                "template" if row.moved else kind,
                sum(added for _, added in ended),
                dropped if prompt else "empty_prompt",
            )
        )
    return found


def ids_around(tokenizer: PreTrainedTokenizerBase, *, target: bool = False) -> Around:
    """The ids that a tokenizer puts before and after a text: of a source, or of what a decoder writes."""
    text = "text_target" if target else "text"

    def ids(**options: Any) -> list[int]:
        return cast(list[int], tokenizer(**{text: "a"}, verbose=False, **options)["input_ids"])

    bare, full = ids(add_special_tokens=False), ids()
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    return [], []


def _between(ids: list[int], around: Around) -> list[int]:
    """A text with what belongs around it; what it brings itself is not added a second time."""
    before, after = around
    ids = ids if ids[: len(before)] == before else before + ids
    return ids if not after or ids[-len(after) :] == after else ids + after
