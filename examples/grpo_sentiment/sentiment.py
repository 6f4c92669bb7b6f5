"""Two judges of sentiment, made in different ways: one is the reward, the other only looks on (weight 0)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from tether.evaluate import TfidfJudge, VaderJudge

PAIRS = Path(__file__).resolve().parents[1] / "imdb" / "pairs.jsonl"


@cache
def _vader() -> VaderJudge:
    return VaderJudge()


@cache
def _words() -> TfidfJudge:
    """Learnt from the 556 pairs of `examples/imdb`, of which the preferred continuation is the positive one."""
    rows = [json.loads(line) for line in PAIRS.read_text("utf-8").splitlines()]
    texts = [row[side] for side in ("chosen", "rejected") for row in rows]
    return TfidfJudge(texts, [1] * len(rows) + [0] * len(rows))


def vader(completions: Sequence[str], **_: Any) -> list[float]:
    """VADER's compound score, from -1 (negative) to 1 (positive): a list of rated words, and rules."""
    return _vader().score(completions).tolist()


def words(completions: Sequence[str], **_: Any) -> list[float]:
    """Probability of being positive by a logistic regression on words and pairs of words."""
    return _words().score(completions).tolist()
