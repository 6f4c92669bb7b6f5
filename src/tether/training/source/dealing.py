"""Batches of a training set that is prepared while it is read, for one process of a run, from any step on.

Every process reads and prepares all rows and takes its share of them, so that none waits for another and nothing is
sent between them. The rows of a round (a batch for each process) are dealt as accelerate deals those of a set in
memory.

By hand, since what libraries keep does not give the same batches after resuming:
- `datasets.IterableDataset.state_dict` (5.2) is the place of the last row that was read. Its docstring says that rows
  in shuffle buffers are lost and the buffers filled with new ones, and that batched `map` over Arrow may skip a batch.
- `torchdata.stateful_dataloader` (0.11) counts batches and fast-forwards the data set, which prepares every row again,
  or asks the data set for a state of its own, which is the one above; it knows workers, and not several processes.
- Neither notices that rows, tokenizer or batch size are others, nor deals the last round.
So a checkpoint has how many rows each chunk gave and what they are told apart by, and draws are played again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import count, islice
from pathlib import Path
from random import Random
from typing import Any, TypeVar

import pyarrow as pa

from tether.data.prepare.prefetch import Ahead
from tether.data.prepare.stream import Chunk, PreparedStream
from tether.errors import ConfigError, DataError, TetherError
from tether.training.step import Filler

POSITION = "stream.json"
Item = TypeVar("Item")


@dataclass(frozen=True)
class Order:
    """How rows become batches; a resumed run must have the same.

    Args:
        batch_size: rows of a batch of one process.
        processes: that share the rows.
        buffer_size: rows among which each next one is drawn; 0: in the order in which they come.
        seed: of the draws.
        drop_last: leave out rows at the end of an epoch that do not fill a batch for every process.
    """

    batch_size: int
    processes: int = 1
    buffer_size: int = 0
    seed: int = 0
    drop_last: bool = False

    @property
    def round_size(self) -> int:
        """Rows of one batch of every process."""
        return self.batch_size * self.processes


@dataclass
class Position:
    """Where in its stream a run stands; checkpoints hold it.

    Args:
        epoch: passes that are behind it.
        rounds: batches, of every process, that it has had in this pass.
        rows: prepared rows of each chunk of this pass that was come to.
        marks: what those chunks are told apart by.
        complete: these chunks are all that there are.
        lengths: rounds of each earlier pass.
        order: how rows become batches.
    """

    epoch: int = 0
    rounds: int = 0
    rows: list[int] = field(default_factory=list)
    marks: list[str] = field(default_factory=list)
    complete: bool = False
    lengths: list[int] = field(default_factory=list)
    order: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Keep it in a checkpoint."""
        (folder / POSITION).write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Position:
        """What `write` kept.

        Raises:
            ConfigError: the checkpoint has none.
        """
        path = folder / POSITION
        if not path.is_file():
            raise ConfigError(
                f"The checkpoint {folder} has no {POSITION}: it is of a run that read all its rows at the start, so "
                "that no one knows where in a stream it stands. Resume without streaming, or set ignore_data_skip=True "
                "to begin the stream anew."
            )
        return cls(**json.loads(path.read_text(encoding="utf-8")))


@dataclass
class Row:
    """A prepared row, by its chunk and its place there; `values` is a table of this row alone, None until needed."""

    chunk: int
    place: int
    values: pa.Table | None = None


def shuffled(items: Iterator[Item], buffer: list[Item], size: int, draw: Callable[[], float]) -> Iterator[Item]:
    """Each item once, drawn from a buffer in which the next one takes its place.

    Args:
        items: in any order.
        buffer: an empty list; it holds the items that have come and not been drawn.
        size: of the buffer.
        draw: random numbers from 0, below 1.

    Example:
        >>> sorted(shuffled(iter(range(5)), [], 2, Random(0).random))
        [0, 1, 2, 3, 4]
    """
    for item in items:
        if len(buffer) < size:
            buffer.append(item)
            continue
        place = int(draw() * size)
        drawn, buffer[place] = buffer[place], item
        yield drawn
    while buffer:
        place = int(draw() * len(buffer))
        buffer[place], buffer[-1] = buffer[-1], buffer[place]
        yield buffer.pop()


class Walk:
    """The rows of one pass in training order, from any row on.

    Rows before the first that is asked for are not prepared again: how many each chunk had is known, and which rows
    were drawn follows from the seed. Only chunks of which rows are still waiting in the buffer are.

    Args:
        stream: the rows.
        order: how they are ordered.
        position: which pass, and what is known of it; it is kept up to date.
        came: is told each chunk that comes to be known.

    Raises:
        DataError: the rows are not those that `position` knows.
    """

    def __init__(
        self,
        stream: PreparedStream,
        order: Order,
        position: Position,
        came: Callable[[Chunk], None] = lambda chunk: None,
    ) -> None:
        self.stream, self.order, self.position, self._came = stream, order, position, came
        self._chunks: Ahead[Chunk] | None = None
        self._at = 0
        self._last: Chunk | None = None
        self._buffer: list[Row] = []
        draw = Random(f"{order.seed} {position.epoch}").random
        rows = self._numbered()
        self._rows = shuffled(rows, self._buffer, order.buffer_size, draw) if order.buffer_size else rows
        # For processes without a row in the last round.
        self._front: list[Row] = []
        try:
            self._replay(position.rounds * order.round_size)
        except BaseException:
            self.close()
            raise

    def rounds(self) -> Iterator[list[pa.Table]]:
        """The rows of one batch of every process after the other; the last round may be short."""
        size = self.order.round_size
        while rows := self._take(size):
            if len(rows) < size:
                self.position.complete = True
                if self.order.drop_last:
                    return
            yield [row.values for row in rows if row.values is not None]

    @property
    def front(self) -> list[pa.Table]:
        """The first row of the pass, where several processes share the rows."""
        return [row.values for row in self._front if row.values is not None]

    def rows(self) -> Iterator[pa.Table]:
        """One row after the other, each once."""
        for row in self._rows:
            if row.values is not None:
                yield row.values

    def close(self) -> None:
        """Prepare no more."""
        if self._chunks is not None:
            self._chunks.close()

    def _take(self, size: int) -> list[Row]:
        rows = list(islice(self._rows, size))
        if self.order.processes > 1 and not self._front:
            self._front = rows[:1]
        return rows

    def _numbered(self) -> Iterator[Row]:
        known = self.position.rows
        for number in count():
            if self._chunks is None and number < len(known):
                size, table = known[number], None
            elif self._chunks is None:  # replayed to the end of the stream
                return
            else:
                chunk = self._chunk(number)
                if chunk is None:
                    self.position.complete = True
                    return
                size, table = len(chunk.table), chunk.table
            self._at = number
            for place in range(size):
                if table is None and self._chunks is not None:
                    table = self._known_chunk(number).table
                # A copy, so that a row that waits long does not keep its chunk.
                yield Row(number, place, None if table is None else table.take([place]))

    def _replay(self, rows: int) -> None:
        """Go on to a row without preparing those before it; then prepare what has come and not been drawn."""
        size = self.order.round_size
        for start in range(0, rows, size):
            if len(self._take(min(size, rows - start))) < min(size, rows - start) and not self.position.complete:
                raise DataError(self._another_stream("it has fewer rows than were trained on"))
        waiting = [row for row in (*self._front, *self._buffer) if row.values is None]
        needed = {row.chunk for row in waiting}
        at = self._at if rows else 0
        # Arranging a chunk may need the one before it that has rows.
        wanted = needed | {self._before(number) for number in (at, *needed)}
        self._chunks = self.stream.chunks(self.position.epoch, lambda number: number >= at or number in wanted)
        for number in sorted(needed):
            table = self._known_chunk(number).table
            for row in waiting:
                if row.chunk == number:
                    row.values = table.take([row.place])

    def _before(self, number: int) -> int:
        """The last chunk with rows before another one."""
        return next((n for n in reversed(range(number)) if self.position.rows[n]), 0)

    def _known_chunk(self, number: int) -> Chunk:
        chunk = self._chunk(number)
        if chunk is None:
            raise DataError(self._another_stream("it has fewer rows than were trained on"))
        return chunk

    def _chunk(self, number: int) -> Chunk | None:
        """A chunk by its number, which never goes back; None after the last."""
        while self._last is None or self._last.number < number:
            self._last = next(self._chunks, None) if self._chunks is not None else None
            if self._last is None:
                return None
            self._check(self._last)
        return self._last

    def _check(self, chunk: Chunk) -> None:
        """Compare a chunk with what a checkpoint knows of it; note one that is new."""
        position, number = self.position, chunk.number
        if number < len(position.rows):
            if position.marks[number] != chunk.mark:
                raise DataError(
                    self._another_stream(f"chunk {number + 1} of it was prepared from other rows or options")
                )
        elif number == len(position.rows):
            position.rows.append(len(chunk.table))
            position.marks.append(chunk.mark)
            self._came(chunk)

    def _another_stream(self, why: str) -> str:
        return (
            f"{self.stream.source.name}: the rows are not those that the checkpoint was trained on: {why}. Give it the "
            "same rows, tokenizer and lengths, or set ignore_data_skip=True to begin this pass over the rows anew."
        )


class StreamLoader:
    """What a trainer iterates over in place of a `DataLoader`: one pass after the other, each from its first batch on,
    but for the one that a run resumes in.

    Args:
        stream: the rows.
        order: how they become batches.
        index: of this process.
        collate: makes a batch of prepared rows.
        began: is told the epoch and the first row of a pass.
        came: is told each chunk that comes to be known in it.
    """

    def __init__(
        self,
        stream: PreparedStream,
        order: Order,
        index: int,
        collate: Callable[[list[dict[str, Any]]], Any],
        *,
        began: Callable[[int, int], None] = lambda epoch, row: None,
        came: Callable[[Chunk], None] = lambda chunk: None,
    ) -> None:
        self.stream, self.order, self.index, self.collate = stream, order, index, collate
        self._began, self._came = began, came
        self._now = Position(order=asdict(order))
        self._start = self._now
        self._walk: Walk | None = None
        self.exhausted = False

    def resume(self, position: Position, *, skip: bool = True) -> None:
        """Go on from where a checkpoint stands; without `skip`, from the beginning of that pass.

        Raises:
            ConfigError: rows became batches otherwise then.
        """
        if skip and position.order != asdict(self.order):
            changed = [name for name, value in asdict(self.order).items() if position.order.get(name) != value]
            said = ", ".join(
                f"{name} {position.order.get(name)} then and {asdict(self.order)[name]} now" for name in changed
            )
            raise ConfigError(
                f"A stream is resumed with its rows in another order: {said}. Give what the run began with, or set "
                "ignore_data_skip=True to begin this pass over the rows anew."
            )
        self._start = position if skip else Position(position.epoch, lengths=position.lengths)
        self._start.order = asdict(self.order)
        self._now = self._start

    @property
    def position(self) -> Position:
        """Where the batches that have come end: in this pass, or before the next."""
        now = self._now
        if not self.exhausted:
            return now
        return Position(now.epoch + 1, lengths=[*now.lengths, now.rounds], order=now.order)

    @property
    def progress(self) -> float | None:
        """Passes that are done; None in the first, whose length no one knows."""
        if self.exhausted:
            return self._now.epoch + 1.0
        return self._now.epoch + self._now.rounds / self._now.lengths[-1] if self._now.lengths else None

    def rewind(self, position: Position, rounds: int) -> None:
        """Go back to an earlier `position`, and its `rounds` then: what has come since was not trained on."""
        position.rounds = rounds
        self._now, self.exhausted = position, False

    def set_epoch(self, epoch: int) -> None:
        """Begin another pass with the next iteration."""
        if epoch != self._now.epoch:
            self._start = Position(epoch, lengths=self.position.lengths, order=self._now.order)

    def __iter__(self) -> Iterator[Any]:
        self.close()
        now, self._start = self._start, Position(self._start.epoch, order=self._start.order)
        self._now, self.exhausted = now, False
        self._began(now.epoch, sum(now.rows))
        self._walk = Walk(self.stream, self.order, now, self._came)
        rounds = self._walk.rounds()
        following, error = self._next(self._walk, rounds)
        if following is None and error is None and not now.rounds:
            what = "too few rows for a batch of every process" if self.order.drop_last else "no rows"
            raise DataError(f"{self.stream.source.name}: the stream gave {what} in pass {now.epoch + 1} over it.")
        while following is not None:
            rows, repeated = following
            # One round ahead, to know the last one; what is wrong there is said in its turn.
            following, error = self._next(self._walk, rounds)
            now.rounds += 1
            self.exhausted = following is None and error is None
            batch = self.collate(self.stream.rows_of(pa.concat_tables(rows, promote_options="default")))
            yield Filler(batch) if repeated else batch
        if error is not None:
            raise error

    def _next(
        self, walk: Walk, rounds: Iterator[list[pa.Table]]
    ) -> tuple[tuple[list[pa.Table], bool] | None, TetherError | None]:
        """This process' rows of the next round, and whether they are there only so that it has some."""
        try:
            tables = next(rounds, None)
        except TetherError as error:
            return None, error
        if tables is None:
            return None, None
        size = self.order.batch_size
        mine = tables[self.index * size : (self.index + 1) * size]
        return ((mine, False) if mine else (walk.front, True)), None

    def close(self) -> None:
        """Prepare no more."""
        if self._walk is not None:
            self._walk.close()
            self._walk = None
