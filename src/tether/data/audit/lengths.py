"""How long rows are in tokens, what limits would cut, and what an epoch costs. Called by `audit`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from tether.data.images.inputs import Pictures, parts_template, reads_images
from tether.data.images.parts import image_column, references_of
from tether.data.prepare.job import paused_collector
from tether.data.prepare.report import quantiles
from tether.data.rows.schema import Schema
from tether.data.rows.values import SHOWN_FAULTS
from tether.data.text.render import render
from tether.data.text.seq2seq import tokenize_seq2seq
from tether.data.text.template import chat_template, text_tokenizer
from tether.data.text.tokenize import Encoder, Tokenized, tokenize
from tether.data.text.truncate import TruncationMode, kept_prompt, truncated_lengths
from tether.errors import DataError
from tether.types import Preference

LIMITS = (512, 1024, 2048, 4096, 8192)
# Rows whose tokens are counted; the shares of that many are right to within one per cent or so.
MEASURED_ROWS = 10_000
# Of rows with images, whose pixels must be read for their number of tokens.
READ_ROWS = 200


@dataclass(frozen=True)
class Limited:
    """A run's own limit: tokens of prompt and completion together (None for none), and what is kept of longer ones."""

    max_length: int | None = None
    mode: TruncationMode = "keep_start"


@dataclass(frozen=True)
class Reading:
    """Where the images of the rows are: the rows as they came, of which row `n * step` of the source is row n."""

    rows: Dataset
    step: int = 1

    def pictures(self, drawn: Sequence[Preference], processor: Any, name: str) -> Pictures:
        """The images of a few rows, by their number in the source."""
        column = image_column(self.rows)
        found = {}
        for row in drawn:
            place = row.source_row // self.step
            found[row.source_row] = references_of(self.rows, column, place, place + 1)[0] if column else []
        return Pictures(found, processor, name)


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
        image_cut: share of rows of which that would cut an image, so that they are dropped; None without images.
        unreadable: what is wrong with images that could not be read, in words.
        inexact_boundaries: share of rows whose prompt tokens are not a prefix of the whole's.
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
    image_cut: float | None = None
    unreadable: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON; without the lengths of single rows."""
        plain = {name: value for name, value in self.__dict__.items() if name != "totals"}
        plain["limits"] = {str(limit): {"cut": one.cut, "dropped": one.dropped} for limit, one in self.limits.items()}
        return plain


def drawing(rows: int, reading: Reading | None) -> int:
    """Which row of so many is measured: every n-th one."""
    return max(rows // (MEASURED_ROWS if reading is None else READ_ROWS), 1)


def measured(
    drawn: Sequence[Preference],
    count: int,
    schema: Schema,
    processing: PreTrainedTokenizerBase | ProcessorMixin,
    limit: Limited | None = None,
    reading: Reading | None = None,
    *,
    encoder_decoder: bool = False,
    name: str = "data",
) -> Lengths:
    """Tokenise an even part of the rows, and say how long they are.

    Args:
        drawn: these, see `drawing`.
        count: of all rows.
        schema: theirs.
        processing: the model's tokenizer or processor.
        limit: the run's; None for none.
        reading: where their images are; None for rows without.
        encoder_decoder: the model reads prompts in an encoder, see `tether.data.text.seq2seq`.
        name: what to call the rows in messages.

    Raises:
        DataError: the tokenizer has no chat template or no end-of-sequence token, or no image can be read.
    """
    tokenizer = text_tokenizer(processing)
    template = chat_template(processing, name=name) if schema.form == "conversational" else None
    template = parts_template(template) if template is not None and reads_images(processing) else template
    given = schema.form == "conversational" or not schema.shared_prompt
    encoder = Encoder(tokenizer, template=template, name=name)
    pictures = None if reading is None else reading.pictures(drawn, processing, name)
    measured_rows = _Measured(getattr(processing, "image_token_id", None), limit or Limited())
    for start in range(0, len(drawn), 1000):
        with paused_collector():
            some = drawn[start : start + 1000]
            rendered = render(some, tokenizer, template=template, given_boundary=given, name=name)
            found = tokenize_seq2seq(rendered, encoder) if encoder_decoder else tokenize(rendered, encoder)
            for row, ids in zip(rendered, found, strict=True):
                try:
                    measured_rows.add(ids if pictures is None else pictures.with_tokens([row], [ids], encoder)[0])
                except DataError as error:
                    measured_rows.unreadable.append(str(error).removeprefix(f"{name}: "))
    if not measured_rows.prompts:
        raise DataError(f"{name}: no row could be measured: {'; '.join(measured_rows.unreadable[:SHOWN_FAULTS])}.")
    return measured_rows.summary(count, images=pictures is not None)


@dataclass
class _Measured:
    """Lengths of the rows that were tokenised so far."""

    image_token: int | None
    limit: Limited
    prompts: list[int] = field(default_factory=list)
    completions: list[list[int]] = field(default_factory=list)
    inexact: int = 0
    image_cut: int = 0
    unreadable: list[str] = field(default_factory=list)

    def add(self, ids: Tokenized) -> None:
        """Note a row."""
        self.prompts.append(len(ids.prompt_ids))
        self.completions.append([len(one) for one in ids.completion_ids])
        self.inexact += ids.boundary in ("split", "template")
        kept = truncated_lengths(self.prompts[-1], self.completions[-1], self.limit.max_length, self.limit.mode)
        if kept is not None and self.image_token is not None:
            self.image_cut += kept_prompt(ids.prompt_ids, kept[0], self.limit.mode, {self.image_token}) is None

    def summary(self, rows: int, *, images: bool) -> Lengths:
        """Of `rows` rows, of which these are an even part."""
        prompts, completions, count = self.prompts, self.completions, len(self.prompts)
        scale = rows / count
        tokens = round(scale * (sum(prompts) + sum(map(sum, completions))))
        pairs = list(zip(prompts, completions, strict=True))
        own = None if self.limit.max_length is None else _limit(prompts, completions, self.limit)
        flat = [length for lengths in completions for length in lengths]
        return Lengths(
            rows=count,
            quantiles={"prompt": quantiles(prompts), **({"completion": quantiles(flat)} if flat else {})},
            longer_wins=_longer_wins(completions),
            limits={limit: _limit(prompts, completions, Limited(limit)) for limit in LIMITS},
            truncated=None if own is None else own.cut + own.dropped,
            inexact_boundaries=self.inexact / count,
            tokens=tokens,
            sequence_tokens=round(scale * sum(p * max(len(c), 1) + sum(c) for p, c in pairs)),
            petaflop_per_billion=8 * tokens * 1e9 / 1e15,
            totals=[p + max(c, default=0) for p, c in pairs],
            image_cut=self.image_cut / count if images and own is not None else None,
            unreadable=tuple(self.unreadable),
        )


def _limit(prompts: Sequence[int], completions: Sequence[Sequence[int]], limit: Limited) -> Limit:
    cut = dropped = 0
    for prompt, lengths in zip(prompts, completions, strict=True):
        kept = truncated_lengths(prompt, lengths, limit.max_length, limit.mode)
        dropped += kept is None
        cut += kept is not None and kept != (prompt, list(lengths))
    return Limit(cut / len(prompts), dropped / len(prompts))


def _longer_wins(completions: Sequence[Sequence[int]]) -> float | None:
    ends = np.array([(lengths[0], lengths[-1]) for lengths in completions if len(lengths) > 1])
    if not len(ends) or not (unequal := int((ends[:, 0] != ends[:, 1]).sum())):
        return None
    return float((ends[:, 0] > ends[:, 1]).sum() / unequal)
