"""What is done to a batch of rows, from their check to token ids. Called by `prepare` and `stream`."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import pyarrow as pa
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from tether.data.images.inputs import Pictures, parts_template, reads_images, take_images
from tether.data.prepare.report import PARTS, MarkerFinder, Tally, digest, row_digest
from tether.data.rows.columns import EXTRAS, columns_to_read, first_filled
from tether.data.rows.schema import (
    BATCH_ROWS,
    Schema,
    Turns,
    preferences,
    python_rows,
    read_preferences,
    unpaired,
)
from tether.data.rows.scores import not_borne_out
from tether.data.rows.values import extra_faults, is_blank, texts_of
from tether.data.text.render import Rendered, render
from tether.data.text.seq2seq import tokenize_seq2seq
from tether.data.text.template import chat_template, text_tokenizer
from tether.data.text.tokenize import BOUNDARIES, Boundary, Encoder, Tokenized, tokenize
from tether.data.text.truncate import TruncationMode, kept_prompt, truncated_lengths
from tether.errors import ConfigError, DataError
from tether.types import Kind, Preference

_IDS = pa.list_(pa.int32())
_MASKS = pa.list_(pa.list_(pa.bool_()))
# Below so many words an answer may begin as its prompt does by chance.
_PROMPT_WORDS = 4


@contextmanager
def paused_collector() -> Iterator[None]:
    """Look for no cycles until this is left; as a decorator, while a function runs.

    Every few hundred new lists start a search, and it visits all that live, ids of words included: a quarter of
    the time that preparation takes. Pause for a batch at a time, so that what templates leave behind does not add up.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@dataclass(frozen=True)
class Options:
    """How rows are prepared; see `tether.data.prepare.prepare` for each.

    Raises:
        ConfigError: an option has a value that is not allowed.
    """

    max_length: int | None
    kind: Kind = "pair"
    turns: Turns = "all"
    mode: TruncationMode = "keep_start"
    boundary: Boundary = "split"
    num_proc: int | None = None
    encoder_decoder: bool = False
    system: str | None = None
    template_arguments: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.boundary not in BOUNDARIES:
            raise ConfigError(f"boundary is {self.boundary!r}; it must be `split`, `drop` or `error`.")
        if self.num_proc is not None and self.num_proc < 1:
            raise ConfigError(f"num_proc is {self.num_proc}; it must be at least 1.")
        truncated_lengths(1, [1], self.max_length, self.mode)


@dataclass(frozen=True)
class Batch:
    """Prepared rows.

    Args:
        table: the columns of `Prepared.dataset`.
        rows: how many were read.
        tally: what was done to them.
        digests: of each row that was kept, and of its prompt.
    """

    table: pa.Table
    rows: int
    tally: Tally
    digests: tuple[list[bytes], list[bytes]]


@dataclass(frozen=True)
class Job:
    """All that a batch needs; a batch depends on nothing else, so batches can be made anywhere.

    Args:
        rows: checked rows.
        schema: what they are.
        options: how they are prepared.
        encoder: of the tokenizer and template.
        finder: of markers in text.
        template: the chat template; None for text.
        name: what to call the rows in messages.
        pictures: the rows' images.
        processor: the tokenizer, or the processor that reads images.
        first: number of the first row, from 0.
    """

    rows: Dataset
    schema: Schema
    options: Options
    encoder: Encoder
    finder: MarkerFinder
    template: str | None
    name: str
    pictures: Pictures | None
    processor: PreTrainedTokenizerBase | ProcessorMixin
    first: int = 0

    @classmethod
    def of(cls, rows: Dataset, tokenizer: PreTrainedTokenizerBase | ProcessorMixin, options: Options, name: str) -> Job:
        """Check rows and say what is to be done to them; see `prepare` for the errors."""
        data, pictures = take_images(rows, tokenizer, name=name)
        schema = read_preferences(data, kind=options.kind, turns=options.turns, name=name)
        _require_prompt(pictures, schema, options, name)
        if options.encoder_decoder and schema.whole:
            column = "messages" if "messages" in schema.columns else "text"
            raise DataError(
                f"{name}: the rows are one text each (`{column}`), and the model reads a prompt in its encoder and "
                "writes a completion in its decoder. Give `prompt` and `completion`."
            )
        for fault in extra_faults("chat_template_kwargs", options.template_arguments, schema.form):
            raise ConfigError(f"{name}: {fault}, or leave the run's chat_template_kwargs out.")
        if options.system is not None and schema.form == "standard":
            raise ConfigError(
                f"{name}: a system message is given (`data.system`), and the rows are text, which has no messages. "
                "Leave it out, or give the rows as messages."
            )
        template = chat_template(tokenizer, name=name) if schema.form == "conversational" else None
        template = parts_template(template) if template is not None and reads_images(tokenizer) else template
        encoder = Encoder(text_tokenizer(tokenizer), template=template, name=name)
        finder = MarkerFinder(encoder.tokenizer)
        return cls(data, schema, options, encoder, finder, template, name, pictures, tokenizer)

    def continued(self, rows: Dataset, first: int) -> Job:
        """The same for further rows of the same set; `first` is the number of the first of them.

        Raises:
            DataError: they are not what the first rows are; the message names rows and fields.
        """
        data, pictures = take_images(rows, self.processor, name=self.name, first=first)
        data, schema = _continued_schema(data, self.schema, self.options.kind, self.name, first)
        schema = read_preferences(
            data, kind=self.options.kind, turns=self.options.turns, name=self.name, schema=schema, first=first
        )
        _require_prompt(pictures, schema, self.options, self.name)
        return replace(self, rows=data, schema=schema, pictures=pictures, first=first)

    @paused_collector()
    def batch(self, start: int) -> Batch:
        """The rows from `start` on, as ids."""
        stop = min(start + BATCH_ROWS, len(self.rows))
        turns = self.options.turns
        records = preferences(self.rows, self.schema, start, stop, turns=turns, first=self.first)
        if self.options.system is not None:
            records = [_with_system(record, self.options.system) for record in records]
        if self.options.template_arguments:
            records = [_with_arguments(record, self.options.template_arguments) for record in records]
        tally = Tally(
            other_prompts=self._other_prompts(records, start, stop),
            not_borne_out=sum(not_borne_out(self.rows, self.schema, start, stop)),
        )
        for record in records:
            self._look(record, tally)
        records = [record for record in records if not self._drop(_raw_fault(record), tally)]
        if self.per_row == 2:
            records = [row for record in records for row in unpaired(record)]
        given = self.schema.form == "conversational" or not self.schema.shared_prompt
        rendered = render(
            records,
            self.encoder.tokenizer,
            template=self.template,
            given_boundary=given,
            turns=turns,
            name=self.name,
        )
        for row in rendered:
            tally.unwritten.update(row.lost)
        rendered = [row for row in rendered if not _drop(row.fault, tally)]
        kept: list[tuple[Rendered, Tokenized]] = []
        for row, ids in zip(rendered, self._tokenize(rendered), strict=True):
            tally.boundaries[ids.boundary] += 1
            cut = None if _drop(ids.dropped, tally) else self._cut(ids, tally)
            if cut is not None:
                kept.append((row, cut))
        told = [row for row, _ in kept] if self.pictures is None else self.pictures.told_apart([row for row, _ in kept])
        seen = [row_digest(row) for row in told], [digest(row.prompt) for row in told]
        return Batch(self._table(kept), (stop - start) * self.per_row, tally, seen)

    @property
    def per_row(self) -> int:
        """Prepared rows that one row of the source can become."""
        return 2 if self.options.kind == "unpaired" and self.schema.kind == "pair" else 1

    def _table(self, kept: list[tuple[Rendered, Tokenized]]) -> pa.Table:
        values = [*self.schema.values, *(["label"] if self.per_row == 2 else [])]
        columns: dict[str, pa.Array] = {
            "prompt_ids": pa.array([ids.prompt_ids for _, ids in kept], type=_IDS),
            "completion_ids": pa.array([ids.completion_ids for _, ids in kept], type=pa.list_(_IDS)),
            "source_row": pa.array([ids.source_row for _, ids in kept], type=pa.int64()),
            **{name: pa.array([row.values[name] for row, _ in kept], type=pa.float32()) for name in values},
        }
        if self.options.turns != "all":
            columns["scored"] = pa.array([ids.scored for _, ids in kept], type=_MASKS)
        if self.pictures is not None:
            columns["images"] = self.pictures.column([row for row, _ in kept])
        return pa.table(columns)

    def _drop(self, reason: str | None, tally: Tally) -> bool:
        if reason is not None:
            tally.dropped[reason] += self.per_row
        return reason is not None

    def _tokenize(self, rendered: list[Rendered]) -> list[Tokenized]:
        if self.options.encoder_decoder:
            return tokenize_seq2seq(rendered, self.encoder)
        found = tokenize(rendered, self.encoder, boundary=self.options.boundary)
        return found if self.pictures is None else self.pictures.with_tokens(rendered, found, self.encoder)

    def _look(self, record: Preference, tally: Tally) -> None:
        """Count what is odd in the text of a row but no reason to drop it."""
        completions = [text for completion in record.completions for text in texts_of(completion)]
        # A completion of text may bring its end-of-sequence token; that is its place.
        completions = completions if self.template else [self.encoder.without_end(text) for text in completions]
        markers = self.finder.find([*texts_of(record.prompt), *completions])
        tally.markers.update(markers)
        tally.marker_rows += bool(markers)
        prompt = record.prompt
        if isinstance(prompt, str) and prompt.strip() and not self.schema.shared_prompt:
            repeats = [text.startswith(prompt) for text in completions]
            tally.repeated_prompts += bool(repeats) and all(repeats)
            tally.unevenly_repeated += any(repeats) and not all(repeats) and len(prompt.split()) >= _PROMPT_WORDS

    def _other_prompts(self, records: list[Preference], start: int, stop: int) -> int:
        """Rows with a prompt of text beside whole conversations, of which no message says the same."""
        if not self.schema.shared_prompt or "prompt" not in self.schema.columns:
            return 0
        said = (row["prompt"] for row in python_rows(self.rows, ("prompt",), start, stop))
        return sum(
            bool(text) and text not in texts_of(record.prompt) for record, text in zip(records, said, strict=True)
        )

    def _cut(self, ids: Tokenized, tally: Tally) -> Tokenized | None:
        """Truncate, and count it."""
        max_length, mode = self.options.max_length, self.options.mode
        before = len(ids.prompt_ids), [len(completion) for completion in ids.completion_ids]
        lengths = truncated_lengths(*before, max_length, mode)
        if lengths is None and mode == "error":
            raise DataError(
                f"{self.name}: row {ids.source_row + 1} has {before[0] + max(before[1], default=0):,} tokens, and "
                f"max_length is {max_length:,}. Raise it, shorten the row, or choose another truncation_mode."
            )
        if lengths is None:
            tally.dropped["too_long" if mode == "drop" else "prompt_too_long"] += 1
            return None
        prompt, completions = lengths
        prompt_ids = kept_prompt(ids.prompt_ids, prompt, mode, _image_ids(self.processor))
        if prompt_ids is None:
            tally.dropped["image_cut"] += 1
            return None
        kept = [all_of[:length] for all_of, length in zip(ids.completion_ids, completions, strict=True)]
        if len(kept) > 1 and len(set(map(tuple, kept))) < len(kept):
            tally.dropped["identical_after_truncation" if kept != ids.completion_ids else "alike"] += 1
            return None
        scored = ids.scored and [mask[:length] for mask, length in zip(ids.scored, completions, strict=True)]
        if scored and not all(map(any, scored)):
            tally.dropped["nothing_scored" if all(map(any, ids.scored or ())) else "unscored"] += 1
            return None
        tally.cut_prompts += prompt < before[0]
        tally.cut_tokens.update(prompt=before[0] - prompt, completions=sum(before[1]) - sum(completions))
        parts = len(PARTS[self.options.kind])
        tally.cut_completions.update(min(k, parts - 1) for k, n in enumerate(completions) if n < before[1][k])
        tally.ends_added += ids.ends_added
        return replace(ids, prompt_ids=prompt_ids, completion_ids=kept, scored=scored)


def _continued_schema(rows: Dataset, schema: Schema, kind: Kind, name: str, first: int) -> tuple[Dataset, Schema]:
    """What further rows of a set are, of which the first ones have a schema already.

    Args:
        rows: further rows.
        schema: of the first ones.
        kind: what the rows are to be read as.
        name: what to call them in messages.
        first: number of the first of these rows, from 0.

    Returns:
        The rows, with empty values in columns that they lack, and their schema.

    Raises:
        DataError: a column that is read has its first value here.
    """
    table = cast(pa.Table, rows.with_format("arrow")[:])
    for column in schema.columns:
        if column not in table.column_names:
            table = table.append_column(column, pa.nulls(len(table)))
    rows = Dataset(table.replace_schema_metadata())
    filled = columns_to_read(rows, kind, name, first)
    for column in filled:
        if column not in (*schema.columns, *schema.unused_columns, *EXTRAS):
            raise DataError(
                f"{name}: the column `{column}` has its first value in row {first_filled(rows, column, first)}, and "
                "rows before it are trained on without it already. Give it to all rows or to none, or read the rows "
                "without streaming."
            )
    columns = (*schema.columns, *(name for name in filled if name in EXTRAS and name not in schema.columns))
    unused = tuple(column for column in rows.column_names if column not in columns or column in schema.unused_columns)
    return rows, replace(schema, rows=len(rows), columns=columns, unused_columns=unused)


def _require_prompt(pictures: Pictures | None, schema: Schema, options: Options, name: str) -> None:
    """Refuse images in conversations of which every token is trained on: images are read with a prompt."""
    if pictures is not None and schema.whole and options.turns == "all":
        raise DataError(
            f"{name}: `messages` have images, and every token of them is to be trained on; images need a prompt. "
            "Train on the assistant's turns (`train: {turns: assistant}`), or give `prompt` and `completion`."
        )


def _image_ids(processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> frozenset[int]:
    """Tokens that stand for parts of an image."""
    found = getattr(processing_class, "image_token_id", None)
    return frozenset([found]) if isinstance(found, int) else frozenset()


def _with_system(record: Preference, text: str) -> Preference:
    """A conversation that begins with a system message."""
    prompt = record.prompt
    if isinstance(prompt, str) or (prompt and prompt[0].get("role") == "system"):
        return record
    return replace(record, prompt=[{"role": "system", "content": text}, *prompt])


def _with_arguments(record: Preference, given: Mapping[str, Any]) -> Preference:
    """With further arguments of the chat template, of which those of the row count before others."""
    return replace(record, chat_template_kwargs={**given, **record.chat_template_kwargs})


def _raw_fault(record: Preference) -> str | None:
    if any(one in record.completions[:k] for k, one in enumerate(record.completions)):
        return "identical"
    if any(map(is_blank, record.completions)):
        return "empty_completion"
    return None


def _drop(reason: str | None, tally: Tally) -> bool:
    if reason is not None:
        tally.dropped[reason] += 1
    return reason is not None
