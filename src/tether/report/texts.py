"""Prompts and completions as the page shows them: text or messages, and no more of either than a page may hold."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from tether.report.numbers import as_number, number, signed

# A text as parts, each with who says it; nobody says a plain one.
Parts = list[tuple[str, str]]


@dataclass(frozen=True)
class Limits:
    """How much of what has no natural end is shown, so that a page stays small.

    Args:
        characters: of one text.
        rows: samples, and completions of a group.
        tokens: of one completion in the token view.
        pairs: in the token view.
        config: characters of the configuration.
    """

    characters: int = 3000
    rows: int = 30
    tokens: int = 300
    pairs: int = 12
    config: int = 60_000

    def text(self, text: str) -> str:
        """A text, cut with a note of how much is missing."""
        over = len(text) - self.characters
        return text if over <= 0 else f"{text[: self.characters]} … ({number(over)} more characters)"

    def tighter(self) -> Limits:
        """A quarter of everything."""
        return Limits(
            *(max(1, value // 4) for value in (self.characters, self.rows, self.tokens, self.pairs, self.config))
        )


def plain_text(value: Any) -> str:
    """A prompt or completion as one text."""
    return "\n\n".join(f"{role}: {text}" if role else text for role, text in parts_of(value))


def parts_of(value: Any) -> Parts:
    """A prompt or completion: text as it is, chat messages with their roles.

    >>> parts_of([{"role": "user", "content": "Hi"}]), parts_of(" there")
    ([('user', 'Hi')], [('', 'there')])
    """
    if isinstance(value, list) and all(isinstance(message, dict) for message in value):
        return [(str(message.get("role", "")), _content(message.get("content"))) for message in value]
    # A completion starts with the space that parts it from its prompt.
    return [("", _content(value).strip())]


def sample_of(row: dict[str, Any], limits: Limits) -> dict[str, Any]:
    """A text of the policy before training and after it, with the scores of a judge where there are any.

    Args:
        row: of `samples.json`.
        limits: how much may be shown.
    """
    before, after = as_number(row.get("score_before")), as_number(row.get("score_after"))

    def cut(name: str) -> Parts:
        return [(role, limits.text(text)) for role, text in parts_of(row.get(name, ""))][: limits.rows]

    def score(value: float) -> str:
        return number(value, 2) if value == value else ""

    return {
        **{name: cut(name) for name in ("prompt", "before", "after")},
        "score_before": score(before),
        "score_after": score(after),
        "change": signed(after - before, 2) if before == before and after == after else "",
    }


def _content(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
