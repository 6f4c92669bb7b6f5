"""One row as the model will see it: every token with its part and mask. Called by the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

Part = Literal["prompt", "completion"]


@dataclass(frozen=True)
class Token:
    """A token of a row.

    Args:
        id: its number.
        text: what it stands for; parts of a character that no token holds alone are shown as the tokenizer writes them.
        part: prompt or completion.
        scored: it counts in the loss.
        special: it is one of the tokenizer's special tokens.
    """

    id: int
    text: str
    part: Part
    scored: bool
    special: bool


def tokens_of(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[list[Token]]:
    """The tokens of a prepared row: those of the prompt, then those of each completion.

    Args:
        row: of `Prepared.dataset`.
        tokenizer: that made it.
    """
    completions = row["completion_ids"]
    masks = row.get("scored") or [[True] * len(ids) for ids in completions]
    prompt = _tokens(row["prompt_ids"], [False] * len(row["prompt_ids"]), "prompt", tokenizer)
    answers = [_tokens(ids, mask, "completion", tokenizer) for ids, mask in zip(completions, masks, strict=True)]
    return [prompt, *answers]


def _tokens(ids: list[int], mask: list[bool], part: Part, tokenizer: PreTrainedTokenizerBase) -> list[Token]:
    special = set(tokenizer.all_special_ids) | {
        number for number, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    return [
        Token(token, _text(token, tokenizer), part, scored, token in special)
        for token, scored in zip(ids, mask, strict=True)
    ]


def _text(token: int, tokenizer: PreTrainedTokenizerBase) -> str:
    text = str(tokenizer.decode([token], skip_special_tokens=False))
    if text and "\ufffd" not in text:
        return text
    return str(tokenizer.convert_ids_to_tokens(token))
