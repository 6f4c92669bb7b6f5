"""From rows to token ids ready to be packed, with a report of all that was done. Called by the trainers and the command
line, before any weights load.

Tokenisation is a plain loop over batches: a fast tokenizer already uses every core, and no hash of closures decides
whether old results are reused. The result's fingerprint is a hash of its content.
"""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from typing import cast

import numpy as np
import pyarrow as pa
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from tether.data.audit import DROPS, PARTS, MarkerFinder, Report, Tally, digest, nothing_left, quantiles, row_digest
from tether.data.collector import paused_collector
from tether.data.images import Pictures, parts_template, reads_images, take_images
from tether.data.render import Rendered, render
from tether.data.schema import BATCH_ROWS, VALUES, Schema, Turns, preferences, read_preferences, unpaired
from tether.data.seq2seq import tokenize_seq2seq
from tether.data.sources import Source, load_rows
from tether.data.table import fingerprint_of, lengths_of
from tether.data.template import chat_template, template_hash, text_tokenizer
from tether.data.tokenize import BOUNDARIES, Boundary, Encoder, Tokenized, tokenize
from tether.data.truncate import TruncationMode, kept_prompt, truncated_lengths
from tether.data.values import is_blank, texts_of
from tether.errors import ConfigError, DataError
from tether.types import Kind, Preference

_IDS = pa.list_(pa.int32())
_MASKS = pa.list_(pa.list_(pa.bool_()))


@dataclass(frozen=True)
class Prepared:
    """Rows that are ready to be packed, and what was done to them.

    Args:
        dataset: columns `prompt_ids` list of int32, `completion_ids` list of lists of int32, `source_row` int64 from 0;
            where the rows have them, `label`, `weight` and `margin` float32; unless all turns are scored, `scored`,
            lists of bools like `completion_ids`. In source order.
        report: counts, lengths and hashes.
        row_digests: one digest per row of `dataset`, of its text before truncation; `overlap` compares them.
        prompt_digests: the same of the prompt alone.
    """

    dataset: Dataset
    report: Report
    row_digests: tuple[bytes, ...] = field(repr=False)
    prompt_digests: tuple[bytes, ...] = field(repr=False)


@dataclass(frozen=True)
class Overlap:
    """How much of a training set is inside an evaluation set.

    Args:
        rows: training rows that are evaluation rows too, word for word.
        prompts: training rows whose prompt, with any completions, is an evaluation prompt too.
        train_rows: rows of the training set.
    """

    rows: int
    prompts: int
    train_rows: int

    def to_dict(self) -> dict[str, int]:
        """As plain values, for JSON."""
        return asdict(self)


def prepare(
    rows: Source,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
    *,
    max_length: int | None,
    kind: Kind = "pair",
    turns: Turns = "all",
    truncation_mode: TruncationMode | str = "keep_start",
    boundary: Boundary | str = "split",
    num_proc: int | None = None,
    encoder_decoder: bool = False,
    name: str = "train",
) -> Prepared:
    """Check, render, tokenise and truncate preference rows.

    Rows with equal or empty completions teach nothing and are dropped; duplicates are counted and kept.

    Args:
        rows: a `datasets.Dataset`, a list of dictionaries, a path, glob or hub name; see `load_rows`.
        tokenizer: of the model to be trained, or a processor with a tokenizer inside.
        max_length: tokens of prompt and completion together, at least 2; None for no truncation.
        kind: what the rows are read as, see `tether.data.schema`; pairs can be read as `unpaired`, two rows each.
        turns: what is scored of a completion of several turns: `all` of it, what others say included, as TRL does; the
            turns of the `assistant`; or the `last` one of these. Of `messages`, `all` is the whole conversation.
        truncation_mode: `keep_start`, `keep_end`, `middle` or `drop`, see `tether.data.truncate`.
        boundary: what to do where ids(prompt) is no prefix of ids(prompt + completion): `split`, `drop` or `error`, see
            `tether.data.tokenize`.
        num_proc: processes to share the work among; None or 1 for this one. Of use for slow tokenizers and templates.
        encoder_decoder: the model reads the prompt in an encoder, see `tether.data.seq2seq`.
        name: what to call the rows in messages and in the report.

    Returns:
        The ids and the report.

    Raises:
        DataError: the rows cannot be read, do not have a known form, or none is left; or the tokenizer lacks an
            end-of-sequence token or, for conversations, a chat template.
        ConfigError: an option has a value that is not allowed.
    """
    if boundary not in BOUNDARIES:
        raise ConfigError(f"boundary is {boundary!r}; it must be `split`, `drop` or `error`.")
    if num_proc is not None and num_proc < 1:
        raise ConfigError(f"num_proc is {num_proc}; it must be at least 1.")
    mode = cast(TruncationMode, truncation_mode)
    truncated_lengths(1, [1], max_length, mode)  # refuses wrong options before the rows are read
    data, pictures = take_images(load_rows(rows, kind=kind, name=name), tokenizer, name=name)
    schema = read_preferences(data, kind=kind, turns=turns, name=name)
    if encoder_decoder and schema.whole:
        column = "messages" if "messages" in schema.columns else "text"
        raise DataError(
            f"{name}: the rows are one text each (`{column}`), and the model reads a prompt in its encoder and writes "
            "a completion in its decoder. Give `prompt` and `completion`."
        )
    template = chat_template(tokenizer, name=name) if schema.form == "conversational" else None
    template = parts_template(template) if template is not None and reads_images(tokenizer) else template
    encoder = Encoder(text_tokenizer(tokenizer), template=template, name=name)
    options = (template, max_length, mode, cast(Boundary, boundary), name)
    special = (_image_ids(tokenizer), encoder_decoder, pictures)
    job = _Job(data, schema, kind, turns, encoder, MarkerFinder(encoder.tokenizer), *options, *special)
    return _finished(job, list(_run(job, num_proc or 1)))


def _finished(job: _Job, batches: list[_Batch]) -> Prepared:
    table = pa.concat_tables([batch.table for batch in batches]).combine_chunks()
    tally = Tally()
    for batch in batches:
        tally.add(batch.tally)
    if not table.num_rows:
        raise DataError(nothing_left(tally, job.name, len(job.rows), job.max_length))
    rows_seen, prompts_seen = (tuple(chain(*seen)) for seen in zip(*(batch.digests for batch in batches), strict=True))
    report = _report(job, table, tally, duplicates=len(rows_seen) - len(set(rows_seen)))
    dataset = Dataset(table, fingerprint=report.fingerprint)
    if job.pictures is not None:
        dataset = job.pictures.read_when_asked(dataset)
    return Prepared(dataset, report, rows_seen, prompts_seen)


def overlap(train: Prepared, evaluation: Prepared) -> Overlap:
    """Count training rows, and training prompts, that are inside an evaluation set.

    Args:
        train: the prepared training rows.
        evaluation: the prepared evaluation rows, with the same tokenizer.

    Returns:
        The counts, of training rows that were kept.
    """
    rows, prompts = set(evaluation.row_digests), set(evaluation.prompt_digests)
    return Overlap(
        sum(row in rows for row in train.row_digests),
        sum(prompt in prompts for prompt in train.prompt_digests),
        len(train.row_digests),
    )


@dataclass(frozen=True)
class _Batch:
    table: pa.Table
    tally: Tally
    digests: tuple[list[bytes], list[bytes]]


@dataclass(frozen=True)
class _Job:
    """All that a batch needs; a batch depends on nothing else, so batches can be made anywhere."""

    rows: Dataset
    schema: Schema
    kind: Kind
    turns: Turns
    encoder: Encoder
    finder: MarkerFinder
    template: str | None
    max_length: int | None
    mode: TruncationMode
    boundary: Boundary
    name: str
    never_cut: frozenset[int] = frozenset()
    encoder_decoder: bool = False
    pictures: Pictures | None = None

    @paused_collector()
    def batch(self, start: int) -> _Batch:
        """The rows from `start` on, as ids."""
        stop = min(start + BATCH_ROWS, len(self.rows))
        records = preferences(self.rows, self.schema, start, stop, turns=self.turns)
        tally = Tally()
        for record in records:
            self._look(record, tally)
        records = [record for record in records if not self._drop(_raw_fault(record), tally)]
        if self.kind == "unpaired" and self.schema.kind == "pair":
            records = [row for record in records for row in unpaired(record)]
        given = self.schema.form == "conversational" or not self.schema.shared_prompt
        rendered = render(
            records,
            self.encoder.tokenizer,
            template=self.template,
            given_boundary=given,
            turns=self.turns,
            name=self.name,
        )
        kept: list[tuple[Rendered, Tokenized]] = []
        for row, ids in zip(rendered, self._tokenize(rendered), strict=True):
            tally.boundaries[ids.boundary] += 1
            cut = None if _drop(ids.dropped, tally) else self._cut(ids, tally)
            if cut is not None:
                kept.append((row, cut))
        told = [row for row, _ in kept] if self.pictures is None else self.pictures.told_apart([row for row, _ in kept])
        seen = [row_digest(row) for row in told], [digest(row.prompt) for row in told]
        return _Batch(self._table(kept), tally, seen)

    @property
    def per_row(self) -> int:
        """Prepared rows that one row of the source can become."""
        return 2 if self.kind == "unpaired" and self.schema.kind == "pair" else 1

    def _table(self, kept: list[tuple[Rendered, Tokenized]]) -> pa.Table:
        values = [*self.schema.values, *(["label"] if self.per_row == 2 else [])]
        columns: dict[str, pa.Array] = {
            "prompt_ids": pa.array([ids.prompt_ids for _, ids in kept], type=_IDS),
            "completion_ids": pa.array([ids.completion_ids for _, ids in kept], type=pa.list_(_IDS)),
            "source_row": pa.array([ids.source_row for _, ids in kept], type=pa.int64()),
            **{name: pa.array([row.values[name] for row, _ in kept], type=pa.float32()) for name in values},
        }
        if self.turns != "all":
            columns["scored"] = pa.array([ids.scored for _, ids in kept], type=_MASKS)
        if self.pictures is not None:
            columns["images"] = self.pictures.column([row for row, _ in kept])
        return pa.table(columns)

    def _drop(self, reason: str | None, tally: Tally) -> bool:
        if reason is not None:
            tally.dropped[reason] += self.per_row
        return reason is not None

    def _tokenize(self, rendered: list[Rendered]) -> list[Tokenized]:
        if self.encoder_decoder:
            return tokenize_seq2seq(rendered, self.encoder)
        found = tokenize(rendered, self.encoder, boundary=self.boundary)
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
        repeats = isinstance(prompt, str) and prompt.strip() and all(text.startswith(prompt) for text in completions)
        tally.repeated_prompts += bool(repeats) and not self.schema.shared_prompt

    def _cut(self, ids: Tokenized, tally: Tally) -> Tokenized | None:
        """Truncate, and count it."""
        before = len(ids.prompt_ids), [len(completion) for completion in ids.completion_ids]
        lengths = truncated_lengths(*before, self.max_length, self.mode)
        if lengths is None:
            tally.dropped["too_long" if self.mode == "drop" else "prompt_too_long"] += 1
            return None
        prompt, completions = lengths
        prompt_ids = kept_prompt(ids.prompt_ids, prompt, self.mode, self.never_cut)
        if prompt_ids is None:
            tally.dropped["image_cut"] += 1
            return None
        kept = [all_of[:length] for all_of, length in zip(ids.completion_ids, completions, strict=True)]
        if len(kept) > 1 and len(set(map(tuple, kept))) < len(kept):
            tally.dropped["identical_after_truncation" if kept != ids.completion_ids else "identical"] += 1
            return None
        scored = ids.scored and [mask[:length] for mask, length in zip(ids.scored, completions, strict=True)]
        if scored and not all(map(any, scored)):
            tally.dropped["nothing_scored"] += 1
            return None
        tally.cut_prompts += prompt < before[0]
        tally.cut_tokens.update(prompt=before[0] - prompt, completions=sum(before[1]) - sum(completions))
        parts = len(PARTS[self.kind])
        tally.cut_completions.update(min(k, parts - 1) for k, n in enumerate(completions) if n < before[1][k])
        tally.ends_added += ids.ends_added
        return replace(ids, prompt_ids=prompt_ids, completion_ids=kept, scored=scored)


def _image_ids(processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> frozenset[int]:
    """Tokens that stand for parts of an image."""
    found = getattr(processing_class, "image_token_id", None)
    return frozenset([found]) if isinstance(found, int) else frozenset()


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


def _run(job: _Job, processes: int) -> Iterator[_Batch]:
    starts = range(0, len(job.rows), BATCH_ROWS)
    if min(processes, len(starts)) == 1:
        yield from map(job.batch, starts)
        return
    # Forked where the system can: a spawned process would import the user's script again, guard or not.
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    context = multiprocessing.get_context(method)
    with (
        warnings.catch_warnings(),
        ProcessPoolExecutor(min(processes, len(starts)), context, _set_job, (job,)) as pool,
    ):
        # Python 3.12 warns of any fork beside threads; the workers use neither torch nor locks held by this process.
        warnings.simplefilter("ignore", DeprecationWarning)
        yield from pool.map(_batch_of_job, starts)


_JOBS: list[_Job] = []  # the job of a worker process; handing it over with every batch would copy all rows each time


def _set_job(job: _Job) -> None:
    _JOBS[:] = [job]


def _batch_of_job(start: int) -> _Batch:
    return _JOBS[0].batch(start)


def _report(job: _Job, table: pa.Table, tally: Tally, *, duplicates: int) -> Report:
    prompts, completions = lengths_of(table)
    parts = {"prompt": prompts.tolist()}
    if names := PARTS[job.kind]:
        by_part = (
            zip(*completions, strict=True) if len(names) > 1 else [[n for lengths in completions for n in lengths]]
        )
        parts |= dict(zip(names, map(list, by_part), strict=True))
    completion_tokens = sum(map(sum, completions))
    scored = completion_tokens
    if job.turns != "all":
        scored = int(np.sum(table["scored"].combine_chunks().flatten().flatten().to_numpy(zero_copy_only=False)))
    return Report(
        name=job.name,
        kind=job.kind,
        rows=len(job.rows) * job.per_row,
        kept=table.num_rows,
        dropped={reason: tally.dropped[reason] for reason in DROPS},
        form=job.schema.form,
        shared_prompt=job.schema.shared_prompt,
        unused_columns=job.schema.unused_columns,
        message_fields=job.schema.message_fields,
        duplicates=duplicates,
        repeated_prompts=tally.repeated_prompts,
        max_length=job.max_length,
        truncation_mode=job.mode,
        cut_prompts=tally.cut_prompts,
        cut_tokens={part: tally.cut_tokens[part] for part in ("prompt", "completions")},
        cut_completions=tuple(tally.cut_completions[k] for k in range(len(names))),
        boundary=job.boundary,
        boundaries=dict(sorted(tally.boundaries.items())),
        ends_added=tally.ends_added,
        marker_rows=tally.marker_rows,
        markers=dict(sorted(tally.markers.items())),
        tokens=int(prompts.sum()) + completion_tokens,
        completion_tokens=completion_tokens,
        scored_tokens=scored,
        turns=job.turns,
        values={name: float(np.mean(table[name].to_numpy())) for name in VALUES if name in table.column_names},
        lengths={part: quantiles(values) for part, values in parts.items()},
        template_hash=None if job.template is None else template_hash(job.template),
        fingerprint=fingerprint_of(table),
    )
