"""How long rows are in tokens, what limits would cut, and what an epoch costs. Called by `check`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from tether.data.audit import quantiles
from tether.data.render import render
from tether.data.schema import Schema
from tether.data.template import chat_template
from tether.data.tokenize import Encoder, tokenize
from tether.data.truncate import truncated_lengths
from tether.types import Preference

LIMITS = (512, 1024, 2048, 4096, 8192)
# Rows whose tokens are counted; the shares of that many are right to within one per cent or so.
MEASURED_ROWS = 10_000


@dataclass(frozen=True)
class Limit:
    """What one `max_length` would do, with `keep_start`, as shares of rows.

    Args:
        cut: a completion would lose tokens.
        dropped: the prompt alone fills the limit.
    """

    cut: float
    dropped: float


@dataclass(frozen=True)
class Lengths:
    """Lengths of rows in tokens.

    Args:
        rows: that were measured, drawn evenly.
        quantiles: `prompt` and `completion` to quantiles of their lengths.
        longer_wins: accuracy of preferring the completion of more tokens; None for rows that are no pairs.
        limits: `max_length` to what it would do.
        truncated: share of rows that the run's own limit would cut or drop; None without a limit.
        inexact_boundaries: share of rows whose prompt tokens are no prefix of the whole's.
        tokens: of all rows in an epoch, prompts counted once.
        sequence_tokens: the same with a prompt counted with each of its completions, as without packing.
        petaflop_per_billion: 10^15 operations of an epoch for each billion parameters: 6 a parameter and token for the
            policy's forward and backward, 2 for the reference.
        totals: prompt and longest completion together, for histograms.
    """

    rows: int
    quantiles: dict[str, dict[str, int]]
    longer_wins: float | None
    limits: dict[int, Limit]
    truncated: float | None
    inexact_boundaries: float
    tokens: int
    sequence_tokens: int
    petaflop_per_billion: float
    totals: list[int] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON; without the lengths of single rows."""
        plain = {name: value for name, value in self.__dict__.items() if name != "totals"}
        plain["limits"] = {str(limit): {"cut": one.cut, "dropped": one.dropped} for limit, one in self.limits.items()}
        return plain


def measured(
    rows: Sequence[Preference],
    schema: Schema,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    *,
    name: str = "data",
) -> Lengths:
    """Tokenise rows, an even sample of them where they are many, and say how long they are.

    Args:
        rows: all of them.
        schema: theirs.
        tokenizer: of the model.
        max_length: the run's limit; None for none.
        name: what to call the rows in messages.

    Raises:
        DataError: the tokenizer has no chat template or no end-of-sequence token.
    """
    step = max(len(rows) // MEASURED_ROWS, 1)
    drawn = rows[::step]
    template = chat_template(tokenizer, name=name) if schema.form == "conversational" else None
    given = schema.form == "conversational" or not schema.shared_prompt
    encoder = Encoder(tokenizer, template=template, name=name)
    prompts, completions, inexact = [], [], 0
    for start in range(0, len(drawn), 1000):
        rendered = render(drawn[start : start + 1000], tokenizer, template=template, given_boundary=given, name=name)
        for ids in tokenize(rendered, encoder):
            prompts.append(len(ids.prompt_ids))
            completions.append([len(one) for one in ids.completion_ids])
            inexact += ids.boundary in ("split", "template")
    scale = len(rows) / len(drawn)
    tokens = round(scale * (sum(prompts) + sum(map(sum, completions))))
    sequences = round(scale * sum(p * max(len(c), 1) + sum(c) for p, c in zip(prompts, completions, strict=True)))
    own = None if max_length is None else _limit(prompts, completions, max_length)
    flat = [length for lengths in completions for length in lengths]
    return Lengths(
        rows=len(drawn),
        quantiles={"prompt": quantiles(prompts), **({"completion": quantiles(flat)} if flat else {})},
        longer_wins=_longer_wins(completions),
        limits={limit: _limit(prompts, completions, limit) for limit in LIMITS},
        truncated=None if own is None else own.cut + own.dropped,
        inexact_boundaries=inexact / len(drawn),
        tokens=tokens,
        sequence_tokens=sequences,
        petaflop_per_billion=8 * tokens * 1e9 / 1e15,
        totals=[p + max(c, default=0) for p, c in zip(prompts, completions, strict=True)],
    )


def _limit(prompts: Sequence[int], completions: Sequence[Sequence[int]], limit: int) -> Limit:
    cut = dropped = 0
    for prompt, lengths in zip(prompts, completions, strict=True):
        kept = truncated_lengths(prompt, lengths, limit)
        dropped += kept is None
        cut += kept is not None and kept != (prompt, list(lengths))
    return Limit(cut / len(prompts), dropped / len(prompts))


def _longer_wins(completions: Sequence[Sequence[int]]) -> float | None:
    ends = np.array([(lengths[0], lengths[-1]) for lengths in completions if len(lengths) > 1])
    if not len(ends) or not (unequal := int((ends[:, 0] != ends[:, 1]).sum())):
        return None
    return float((ends[:, 0] > ends[:, 1]).sum() / unequal)
