"""From rows to token ids ready to be packed, with a report of all that was done. Called by the trainers and the command
line, before any weights load.

Tokenisation is a plain loop over batches: a fast tokenizer already uses every core, and no hash of closures decides
whether old results are reused. The result's fingerprint is a hash of its content.
"""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from typing import Any, cast

import numpy as np
import pyarrow as pa
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from tether.data.audit import DROPS, MarkerFinder, Report, Tally, digest, quantiles, row_digest
from tether.data.render import Rendered, chat_template, render, template_hash, text_tokenizer
from tether.data.schema import BATCH_ROWS, Schema, preferences, read_preferences, texts_of
from tether.data.sources import Source, load_rows
from tether.data.tokenize import BOUNDARIES, Boundary, Encoder, Tokenized, tokenize
from tether.data.truncate import TruncationMode, truncated_lengths
from tether.errors import ConfigError, DataError
from tether.types import Example, Preference

# Columns of numbers that belong to a row, see `Preference.values`.
VALUES = ("label", "weight", "margin")
_IDS = pa.list_(pa.int32())
_PARTS = ("prompt", "chosen", "rejected")
_COLUMNS = pa.schema([("prompt_ids", _IDS), ("completion_ids", pa.list_(_IDS)), ("source_row", pa.int64())])


@dataclass(frozen=True)
class Prepared:
    """Rows that are ready to be packed, and what was done to them.

    Args:
        dataset: columns `prompt_ids` list of int32, `completion_ids` list of lists of int32, `source_row` int64 from 0;
            in source order.
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
    truncation_mode: TruncationMode | str = "keep_start",
    boundary: Boundary | str = "split",
    num_proc: int | None = None,
    name: str = "train",
) -> Prepared:
    """Check, render, tokenise and truncate preference rows.

    Rows with equal or empty completions teach nothing and are dropped; duplicates are counted and kept.

    Args:
        rows: a `datasets.Dataset`, a list of dictionaries, a path, glob or hub name; see `load_rows`.
        tokenizer: of the model to be trained, or a processor with a tokenizer inside.
        max_length: tokens of prompt and completion together, at least 2; None for no truncation.
        truncation_mode: `keep_start` or `keep_end`, see `tether.data.truncate`.
        boundary: what to do where ids(prompt) is no prefix of ids(prompt + completion): `split`, `drop` or `error`, see
            `tether.data.tokenize`.
        num_proc: processes to share the work among; None or 1 for this one. Of use for slow tokenizers and for chat
            templates, which run in Python; the result is the same.
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
    data = load_rows(rows, name=name)
    schema = read_preferences(data, name=name)
    template = chat_template(tokenizer, name=name) if schema.form == "conversational" else None
    encoder = Encoder(text_tokenizer(tokenizer), template=template, name=name)
    finder = MarkerFinder(encoder.tokenizer)
    job = _Job(data, schema, encoder, finder, template, max_length, mode, cast(Boundary, boundary), name)
    batches = list(_run(job, num_proc or 1))
    table = pa.concat_tables([batch.table for batch in batches]).combine_chunks()
    tally = Tally()
    for batch in batches:
        tally.add(batch.tally)
    if not table.num_rows:
        raise DataError(_nothing_left(job, tally))
    rows_seen = tuple(seen for batch in batches for seen in batch.row_digests)
    prompts_seen = tuple(seen for batch in batches for seen in batch.prompt_digests)
    report = _report(job, table, tally, duplicates=len(rows_seen) - len(set(rows_seen)))
    return Prepared(Dataset(table, fingerprint=report.fingerprint), report, rows_seen, prompts_seen)


def example_from_row(row: Mapping[str, Any]) -> Example:
    """One row of `Prepared.dataset` as an `Example`.

    Args:
        row: with `prompt_ids`, `completion_ids` and `source_row`; and where there are any, `scored` (lists of bools
            like `completion_ids`) and the columns of `VALUES`.

    Returns:
        The example, with int64 ids.

    Example:
        >>> example_from_row({"prompt_ids": [1, 5], "completion_ids": [[7, 2], [2]], "source_row": 3}).source_row
        3
    """
    values = {name: row[name] for name in VALUES if name in row}
    return Example.of(
        row["prompt_ids"], row["completion_ids"], row["source_row"], values=values, scored=row.get("scored")
    )


def longest_row(dataset: Dataset) -> int:
    """Index of the row of `Prepared.dataset` whose prompt and longest completion have the most tokens together."""
    prompts, *completions = (np.asarray(lengths) for lengths in _lengths(dataset.data.table))
    return int((prompts + np.max(completions, axis=0)).argmax())


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
    row_digests: list[bytes]
    prompt_digests: list[bytes]


@dataclass(frozen=True)
class _Job:
    """All that a batch needs; a batch depends on nothing else, so batches can be made anywhere."""

    rows: Dataset
    schema: Schema
    encoder: Encoder
    finder: MarkerFinder
    template: str | None
    max_length: int | None
    mode: TruncationMode
    boundary: Boundary
    name: str

    def batch(self, start: int) -> _Batch:
        """The rows from `start` on, as ids."""
        records = preferences(self.rows, self.schema, start, min(start + BATCH_ROWS, len(self.rows)))
        tally = Tally()
        for record in records:
            self._look(record, tally)
        records = [record for record in records if not _drop(_raw_fault(record), tally)]
        given = self.schema.form == "conversational" or not self.schema.shared_prompt
        tokenizer = self.encoder.tokenizer
        rendered = render(records, tokenizer, template=self.template, given_boundary=given, name=self.name)
        kept: list[tuple[Rendered, Tokenized]] = []
        for row, ids in zip(rendered, tokenize(rendered, self.encoder, boundary=self.boundary), strict=True):
            tally.boundaries[ids.boundary] += 1
            cut = None if _drop(ids.dropped, tally) else self._cut(ids, tally)
            if cut is not None:
                kept.append((row, cut))
        return _Batch(
            pa.table(
                [
                    pa.array([ids.prompt_ids for _, ids in kept], type=_IDS),
                    pa.array([ids.completion_ids for _, ids in kept], type=pa.list_(_IDS)),
                    pa.array([ids.source_row for _, ids in kept], type=pa.int64()),
                ],
                schema=_COLUMNS,
            ),
            tally,
            [row_digest(row) for row, _ in kept],
            [digest(row.prompt) for row, _ in kept],
        )

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
            tally.dropped["prompt_too_long"] += 1
            return None
        prompt, completions = lengths
        kept = [all_of[:length] for all_of, length in zip(ids.completion_ids, completions, strict=True)]
        if len(set(map(tuple, kept))) < len(kept):
            tally.dropped["identical_after_truncation" if kept != ids.completion_ids else "identical"] += 1
            return None
        tally.cut_prompts += prompt < before[0]
        tally.cut_completions.update(k for k, length in enumerate(completions) if length < before[1][k])
        tally.ends_added += ids.ends_added
        return Tokenized(ids.prompt_ids[before[0] - prompt :], kept, ids.source_row, ids.boundary, ids.ends_added)


def _raw_fault(record: Preference) -> str | None:
    if any(record.completions[0] == other for other in record.completions[1:]):
        return "identical"
    if any(not "".join(texts_of(completion)).strip() for completion in record.completions):
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


def _nothing_left(job: _Job, tally: Tally) -> str:
    reasons = ", ".join(f"{tally.dropped[reason]} with {DROPS[reason]}" for reason in DROPS if tally.dropped[reason])
    advice = []
    if tally.dropped["prompt_too_long"] or tally.dropped["identical_after_truncation"]:
        advice.append(f"raise max_length (now {job.max_length}) or shorten the prompts")
    if tally.dropped["identical"] or tally.dropped["empty_completion"]:
        advice.append("give two different completions, neither of them empty")
    if tally.dropped["empty_prompt"]:
        advice.append("give prompts that are not empty, or a tokenizer with a BOS token")
    if tally.dropped["boundary"]:
        advice.append("allow such rows with boundary `split`")
    return f"{job.name}: none of the {len(job.rows)} rows can be used: {reasons}. To do: {'; '.join(advice)}."


def _report(job: _Job, table: pa.Table, tally: Tally, *, duplicates: int) -> Report:
    lengths = _lengths(table)
    completion_tokens = sum(map(sum, lengths[1:]))
    template = job.template
    return Report(
        name=job.name,
        rows=len(job.rows),
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
        cut_completions=tuple(tally.cut_completions[k] for k in range(len(lengths) - 1)),
        boundary=job.boundary,
        boundaries=dict(sorted(tally.boundaries.items())),
        ends_added=tally.ends_added,
        marker_rows=tally.marker_rows,
        markers=dict(sorted(tally.markers.items())),
        tokens=sum(lengths[0]) + completion_tokens,
        completion_tokens=completion_tokens,
        lengths={part: quantiles(values) for part, values in zip(_PARTS, lengths, strict=True)},
        template_hash=None if template is None else template_hash(template),
        fingerprint=_fingerprint(table),
    )


def _lengths(table: pa.Table) -> list[Sequence[int]]:
    """Tokens of each prompt, then of each first completion, each second one."""
    prompts = table["prompt_ids"].combine_chunks().value_lengths().to_pylist()
    each = table["completion_ids"].combine_chunks().flatten().value_lengths().to_pylist()
    width = len(_PARTS) - 1
    return [prompts, *(each[k::width] for k in range(width))]


def _fingerprint(table: pa.Table) -> str:
    whole = blake2b(digest_size=16)
    for column in table.itercolumns():
        values = column.combine_chunks()
        while pa.types.is_list(values.type):
            whole.update(values.value_lengths().to_numpy(zero_copy_only=False).tobytes())
            values = values.flatten()
        whole.update(values.to_numpy(zero_copy_only=False).tobytes())
    return whole.hexdigest()
