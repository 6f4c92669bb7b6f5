"""A training set that is prepared while it is read: a chunk of rows after the other, by the same code as a whole set.
Called by the trainers."""

from __future__ import annotations

import copy
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, cast

import pyarrow as pa
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from tether.data.images.inputs import ImageRows
from tether.data.prepare.job import Batch, Job, Options
from tether.data.prepare.prefetch import Ahead
from tether.data.prepare.prepare import as_dataset
from tether.data.prepare.report import Report, nothing_left
from tether.data.prepare.table import fingerprint_of
from tether.data.prepare.totals import Totals
from tether.data.prepare.workers import held_job, workers
from tether.data.rows.columns import BATCH_ROWS
from tether.data.rows.schema import Schema
from tether.data.sources.stream import RowStream
from tether.errors import DataError, TetherError

# Changes the rows of one chunk after another of a pass, all of them in order.
Arrange = Callable[[pa.Table], pa.Table]
_WAITING = 2  # chunks that are ready before they are needed
_REMEMBERED = 1_000_000


@dataclass(frozen=True)
class Chunk:
    """Prepared rows that came of `BATCH_ROWS` rows of the source, or fewer at its end.

    Args:
        number: from 0; its rows are those of the source from `number * BATCH_ROWS` on.
        table: the columns of `Prepared.dataset`.
        batch: the same rows before they were arranged, and what was done to them.
        schema: what the rows were.
    """

    number: int
    table: pa.Table
    batch: Batch
    schema: Schema

    @property
    def mark(self) -> str:
        """What the chunk is told apart by: a hash of its content."""
        return fingerprint_of(self.batch.table)[:16] if self.batch.table.num_rows else ""


class PreparedStream:
    """Rows that are prepared while they are trained on.

    What becomes of a row depends on the row alone, and chunks are made by the code of `tether.data.prepare.prepare`:
    what all chunks hold together is what the whole set would.

    Args:
        source: the rows.
        tokenizer: of the model to be trained, or its processor.
        options: how rows are prepared.
        arrange: called once for each pass; gives what changes its rows, a chunk at a time and in order.

    Raises:
        DataError: the first chunk cannot be used, see `tether.data.prepare.prepare`; or no row of the stream can.
        ConfigError: see `tether.data.prepare.prepare`.

    Attributes:
        job: what is done to rows; it holds those of the first chunk.
        first: prepared rows of the first chunk that has any, for proofs and probes.
        sample: the rows of the first chunk as they came.
        report: of the chunks up to `first`.
    """

    def __init__(
        self,
        source: RowStream,
        tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
        options: Options,
        *,
        arrange: Callable[[], Arrange] = lambda: lambda table: table,
    ) -> None:
        self.source, self._arrange = source, arrange
        self._pool: ProcessPoolExecutor | None = None
        chunks = source.chunks()
        rows = next(chunks, None)
        if rows is None:
            raise DataError(f"{source.name}: there are no rows; at least one is needed.")
        # Tokenizers are not made for two threads: this one is used by no one else.
        self.job, self.sample = Job.of(rows, copy.deepcopy(tokenizer), options, source.name), rows
        chunk, self.report = self._first(chunks)
        self.first = as_dataset(chunk.table, self.job, self.report.fingerprint)
        if (options.num_proc or 1) > 1:
            # Before weights are loaded and threads run: a process is copied with all that it has.
            self._pool = workers(replace(self.job, rows=rows.select([])), cast(int, options.num_proc))
            weakref.finalize(self, self._pool.shutdown, wait=False, cancel_futures=True)

    def _first(self, further: Iterator[Dataset]) -> tuple[Chunk, Report]:
        """The first chunk with rows that can be used."""
        totals, arrange, job = Totals(), self._arrange(), self.job
        numbered = enumerate(further, 1)
        number = 0
        while True:
            chunk = _chunk(number, job.batch(0), job.schema, arrange)
            totals.add(chunk.batch, job)
            if totals.kept:
                return chunk, totals.report(self.job)
            number, rows = next(numbered, (0, None))
            if rows is None:
                raise DataError(
                    nothing_left(totals.tally, job.name, totals.rows, job.options.max_length, job.schema.kind)
                )
            job = self.job.continued(rows, number * BATCH_ROWS)

    def chunks(self, epoch: int = 0, wanted: Callable[[int], bool] = lambda number: True) -> Ahead[Chunk]:
        """Prepared chunks in order, made ahead in the background: close it when done.

        Args:
            epoch: see `RowStream.chunks`.
            wanted: whether a chunk, by its number, is prepared; the rows of others are read and left.

        Raises:
            DataError: while it is read: a row is not what the first rows are, or cannot be read. The chunks before it
                have come.
        """
        return Ahead(lambda: self._made(epoch, wanted), _WAITING)

    def totals(self) -> Totals:
        """Counts for one pass."""
        return Totals(_REMEMBERED)

    def report_of(self, totals: Totals) -> Report:
        """The report of what was counted."""
        return totals.report(self.job)

    def job_of(self, chunk: Chunk) -> Job:
        """The job that made a chunk, without its rows."""
        return replace(self.job, schema=chunk.schema)

    def rows_of(self, table: pa.Table) -> list[dict[str, Any]]:
        """Prepared rows as a collator takes them; images are read here."""
        columns: dict[str, list[Any]] = table.to_pydict()
        if "images" in columns:
            processor: Any = self.job.processor
            columns = ImageRows(processor, processor.image_token_id)(columns)
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    def _made(self, epoch: int, wanted: Callable[[int], bool]) -> Iterator[Chunk]:
        arrange = self._arrange()
        for number, batch, schema in self._batches(epoch, wanted):
            yield _chunk(number, batch, schema, arrange)

    def _batches(self, epoch: int, wanted: Callable[[int], bool]) -> Iterator[tuple[int, Batch, Schema]]:
        numbered = ((number, rows) for number, rows in enumerate(self.source.chunks(epoch)) if wanted(number))
        if self._pool is None:
            for number, rows in numbered:
                yield (number, *_prepared(self.job, number, rows))
            return
        waiting: deque[tuple[int, Future[tuple[Batch, Schema]]]] = deque()
        error: TetherError | None = None
        try:
            for number, rows in numbered:
                waiting.append((number, self._pool.submit(_prepared_by_worker, number, rows)))
                if len(waiting) > cast(int, self.job.options.num_proc):
                    number, future = waiting.popleft()
                    yield (number, *future.result())
        except TetherError as one:
            error = one  # the chunks before the one that cannot be read come first
        for number, future in waiting:
            yield (number, *future.result())
        if error is not None:
            raise error


def _chunk(number: int, batch: Batch, schema: Schema, arrange: Arrange) -> Chunk:
    return Chunk(number, arrange(batch.table) if batch.table.num_rows else batch.table, batch, schema)


def _prepared(job: Job, number: int, rows: Dataset) -> tuple[Batch, Schema]:
    made = job.continued(rows, number * BATCH_ROWS)
    return made.batch(0), made.schema


def _prepared_by_worker(number: int, rows: Dataset) -> tuple[Batch, Schema]:
    return _prepared(held_job(), number, rows)
