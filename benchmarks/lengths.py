"""Pairs of controlled length: profiles of tokens per prompt and completion, and rows of text that have them."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

LONGEST = 500  # a prompt and a completion of this many tokens fit together into both tools' default max_length
_WORD = re.compile(r"[a-z]{2,}")
_MARK = "\u0120"  # how a byte-level tokenizer writes the space that begins a word


@dataclass(frozen=True)
class Profile:
    """Mean tokens of a prompt and of each completion, and pairs per step."""

    prompt: int
    completion: int
    pairs: int


PROFILES = {
    "tldr": Profile(350, 35, 4),
    "hh": Profile(190, 75, 4),
    "ultrafeedback": Profile(185, 270, 4),
    "ultrafeedback-2": Profile(185, 270, 2),
}


def words_of_one_token(tokenizer: Any) -> list[str]:
    """Words of the vocabulary that are one token after a space, in alphabetical order.

    A text of n of them, each after a space, has exactly n tokens wherever it stands, since a byte-level tokenizer never
    joins across such a space. So lengths are exact and the boundary between prompt and completion is too.
    """
    names = (name.removeprefix(_MARK) for name in tokenizer.get_vocab() if name.startswith(_MARK))
    return sorted(word for word in names if _WORD.fullmatch(word))


def make_rows(tokenizer: Any, profile: Profile, steps: int, *, spread: float = 0.5, seed: int = 0) -> list[dict]:
    """Rows of `prompt`, `chosen`, `rejected` for some steps.

    Args:
        tokenizer: a byte-level tokenizer, such as that of SmolLM2.
        profile: mean lengths; the completion's includes its end token, which trainers add.
        steps: optimizer steps of `profile.pairs` rows each.
        spread: standard deviation of the logarithm of a length; lengths are log-normal around the profile's means.
        seed: of the lengths and words.
    """
    draw, words = random.Random(seed), words_of_one_token(tokenizer)

    def text(tokens: int) -> str:
        return "".join(f" {word}" for word in draw.choices(words, k=tokens))

    def length(mean: int) -> int:
        # The median of a log-normal distribution lies below its mean by this factor.
        return min(max(2, round(mean * draw.lognormvariate(-(spread**2) / 2, spread))), LONGEST)

    rows = []
    for _ in range(steps * profile.pairs):
        prompt = text(length(profile.prompt))
        chosen, rejected = (text(length(profile.completion) - 1) for _ in range(2))
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows


def tokens_per_step(tokenizer: Any, rows: list[dict], pairs: int) -> Iterator[int]:
    """Tokens of the two full sequences of each row, end tokens included, added up over each step."""
    for start in range(0, len(rows), pairs):
        texts = [row["prompt"] + row[name] for row in rows[start : start + pairs] for name in ("chosen", "rejected")]
        yield sum(len(ids) + 1 for ids in tokenizer(texts)["input_ids"])
