"""From rows to token ids ready to be packed, with a report of all that was done. Called by the trainers and the command
line, before any weights load.

Tokenisation is a plain loop over batches: a fast tokenizer already uses every core, and no hash of closures decides
whether old results are reused. The result's fingerprint is a hash of its content.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import numpy as np
import pyarrow as pa
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from tether.data.prepare.job import Batch, Job, Options
from tether.data.prepare.report import DIGEST_BYTES, Report, nothing_left
from tether.data.prepare.table import fingerprint_of
from tether.data.prepare.totals import Totals
from tether.data.prepare.workers import held_job, workers
from tether.data.rows.schema import BATCH_ROWS, Turns
from tether.data.sources.load import Source, load_rows
from tether.data.spool import spooled
from tether.data.text.tokenize import Boundary
from tether.data.text.truncate import TruncationMode
from tether.errors import DataError
from tether.progress import counted
from tether.types import Kind


@dataclass(frozen=True)
class Digests(Sequence[bytes]):
    """Digests of 16 bytes, one after another in one piece of memory.

    Example:
        >>> digests = Digests(b"a" * 16 + b"b" * 16)
        >>> len(digests), digests[1]
        (2, b'bbbbbbbbbbbbbbbb')
    """

    joined: bytes

    def __len__(self) -> int:
        return len(self.joined) // DIGEST_BYTES

    def __getitem__(self, place: Any) -> Any:
        if not 0 <= place < len(self):
            raise IndexError(place)
        return self.joined[place * DIGEST_BYTES : (place + 1) * DIGEST_BYTES]


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
    row_digests: Digests = field(repr=False)
    prompt_digests: Digests = field(repr=False)


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
    system: str | None = None,
    template_arguments: Mapping[str, Any] | None = None,
    name: str = "train",
) -> Prepared:
    """Check, render, tokenise and truncate preference rows.

    Rows with equal or empty completions teach nothing and are dropped; duplicates are counted and kept.

    Args:
        rows: a `datasets.Dataset`, a list of dictionaries, a path, glob or hub name; see `load_rows`.
        tokenizer: of the model to be trained, or a processor with a tokenizer inside.
        max_length: tokens of prompt and completion together, at least 2; None for no truncation.
        kind: what the rows are read as, see `tether.data.rows.schema`; pairs can be read as `unpaired`, two rows each.
        turns: what is scored of a completion of several turns: `all` of it, what others say included, as TRL does; the
            turns of the `assistant`; or the `last` one of these. Of `messages`, `all` is the whole conversation.
        truncation_mode: `keep_start`, `keep_end`, `middle` or `drop`, see `tether.data.text.truncate`.
        boundary: what to do where ids(prompt) is not a prefix of ids(prompt + completion): `split`, `drop` or
            `error`, see `tether.data.text.tokenize`.
        num_proc: processes to share the work among; None or 1 for this one. Of use for slow tokenizers and templates.
        system: a system message of conversations that begin with none.
        template_arguments: arguments of the chat template; those of a row count before these.
        encoder_decoder: the model reads the prompt in an encoder, see `tether.data.text.seq2seq`.
        name: what to call the rows in messages and in the report.

    Returns:
        The ids and the report.

    Raises:
        DataError: the rows cannot be read, do not have a known form, or none is left; or the tokenizer lacks an
            end-of-sequence token or, for conversations, a chat template.
        ConfigError: an option has a value that is not allowed.
    """
    options = Options(
        max_length,
        kind,
        turns,
        cast(TruncationMode, truncation_mode),
        cast(Boundary, boundary),
        num_proc,
        encoder_decoder,
        system,
        template_arguments,
    )
    job = Job.of(load_rows(rows, kind=kind, name=name), tokenizer, options, name)
    return _finished(job, _run(job, num_proc or 1))


def _finished(job: Job, batches: Iterable[Batch]) -> Prepared:
    totals = Totals(remembered=0)  # rows that are repeated are counted at the end, in a tenth of the memory
    # As one piece of bytes each: as objects they would take three times as much.
    rows_seen, prompts_seen = bytearray(), bytearray()

    def tables() -> Iterator[pa.Table]:
        for batch in batches:
            totals.add(batch, job)
            rows_seen.extend(b"".join(batch.digests[0]))
            prompts_seen.extend(b"".join(batch.digests[1]))
            yield batch.table

    table = spooled(tables())
    if table is None or not totals.kept:
        raise DataError(nothing_left(totals.tally, job.name, len(job.rows), job.options.max_length, job.schema.kind))
    totals.duplicates = totals.kept - len(np.unique(np.frombuffer(rows_seen, np.uint64)[::2]))
    report = totals.report(job, fingerprint_of(table))
    seen = Digests(bytes(rows_seen)), Digests(bytes(prompts_seen))
    return Prepared(as_dataset(table, job, report.fingerprint), report, *seen)


def as_dataset(table: pa.Table, job: Job, fingerprint: str) -> Dataset:
    """Prepared rows as a data set, which reads their images when rows are asked for."""
    dataset = Dataset(table, fingerprint=fingerprint)
    return dataset if job.pictures is None else job.pictures.read_when_asked(dataset)


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


def _run(job: Job, processes: int) -> Iterator[Batch]:
    starts = range(0, len(job.rows), BATCH_ROWS)
    alone = min(processes, len(starts)) == 1
    with nullcontext() if alone else workers(job, min(processes, len(starts))) as pool:
        batches = map(job.batch, starts) if pool is None else pool.map(_batch_of_job, starts)
        with counted(f"preparing {job.name}", len(job.rows)) as advance:
            for start, batch in zip(starts, batches, strict=True):
                yield batch
                advance(min(BATCH_ROWS, len(job.rows) - start))


def _batch_of_job(start: int) -> Batch:
    return held_job().batch(start)
