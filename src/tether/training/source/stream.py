"""Rows that are prepared while training goes on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tether.data import example_from_row
from tether.data.prepare.report import write_reports
from tether.data.prepare.stream import Chunk, PreparedStream
from tether.data.rows.columns import BATCH_ROWS
from tether.training.source.base import Collate, Source
from tether.training.source.dealing import Order, Position, StreamLoader, Walk
from tether.types import Example

logger = logging.getLogger("tether")


class StreamSource(Source):
    """A stream, dealt by a loader of its own that goes on exactly where a checkpoint stands.

    Args:
        stream: the rows.
    """

    complete = False
    keeps_position = True

    def __init__(self, stream: PreparedStream) -> None:
        self.rows, self.known = stream, stream.first
        self._loader: StreamLoader | None = None
        self._report: StreamReport | None = None

    def order(self, args: TrainingArguments, batch_size: int, processes: int, *, split_batches: bool = False) -> Order:
        """Drawn from a buffer, unless rows come in their order; see `Source.order`."""
        drawn = args.train_sampling_strategy == "random"
        return Order(
            batch_size // processes if split_batches else batch_size,
            processes,
            buffer_size=getattr(args, "dataset_buffer_size", 0) if drawn else 0,
            seed=args.seed if args.data_seed is None else args.data_seed,
            drop_last=args.dataloader_drop_last,
        )

    def planned(self, order: Order, batches: int) -> Iterator[list[Example]]:
        """The rows of the first pass that the run will train on."""
        walk = Walk(self.rows, order, Position())
        rows = islice(walk.rows(), batches * order.round_size)
        try:
            while part := list(islice(rows, BATCH_ROWS)):
                yield [example_from_row(row) for table in part for row in self.rows.rows_of(table)]
        finally:
            walk.close()

    def loader(self, order: Order, index: int, collate: Collate) -> StreamLoader:
        """See `tether.training.source.dealing`."""
        self.close()
        began = self._report.began if self._report else lambda epoch, row: None
        came = self._report.came if self._report else lambda chunk: None
        self._loader = StreamLoader(self.rows, order, index, collate, began=began, came=came)
        return self._loader

    def callbacks(self, data: Any, folder: Path, *, main: bool) -> list[TrainerCallback]:
        """Counts rows as they come, and the share of a pass that is done."""
        self._report = StreamReport(data, self.rows, folder, main=main)
        return [self._report, StreamProgress(lambda: self._loader)]

    def mark(self) -> tuple[Position, int] | None:
        """The loader's position."""
        return None if self._loader is None else (self._loader.position, self._loader.position.rounds)

    def rewind(self, mark: tuple[Position, int] | None) -> None:
        """See `Source.rewind`."""
        if self._loader is not None and mark is not None:
            self._loader.rewind(*mark)

    def resume(self, folder: Path, *, skip: bool) -> int:
        """See `Source.resume`."""
        position = Position.read(folder)
        if self._loader is not None:
            self._loader.resume(position, skip=skip)
        return position.epoch

    def save(self, folder: Path, process: int) -> None:
        """Keep the position in a checkpoint."""
        if self._loader is not None and process == 0:
            self._loader.position.write(folder)

    def close(self) -> None:
        """Prepare no more rows."""
        if self._loader is not None:
            self._loader.close()


class StreamReport(TrainerCallback):
    """Counts rows as they come to be trained on, and writes and says what was counted when a pass over them ends.

    Args:
        data: the reports of the run.
        stream: the rows.
        folder: where the report is kept.
        main: whether this process writes and speaks.
    """

    def __init__(self, data: Any, stream: PreparedStream, folder: Path, *, main: bool) -> None:
        self._data, self._stream, self._folder, self._main = data, stream, folder, main
        self._audit = data.reports["train"].get("audit")
        self.began(0, 0)

    def began(self, epoch: int, row: int) -> None:
        """A pass begins; on resuming, not with its first row."""
        self._totals = self._stream.totals()
        self._epoch, self._from = epoch, row
        self._shared = {name: [0, 0] for name in self._data.evaluated}

    def came(self, chunk: Chunk) -> None:
        """Count a chunk."""
        self._totals.add(chunk.batch, self._stream.job_of(chunk))
        for name, sets in self._data.evaluated.items():
            for place, (known, digests) in enumerate(zip(sets, chunk.batch.digests, strict=True)):
                self._shared[name][place] += sum(digest in known for digest in digests)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Say and keep what a pass over the rows found, or what of it the run came to."""
        if not self._totals.kept:
            return
        report = self._stream.report_of(self._totals)
        read = {"pass": self._epoch + 1, "from_kept_row": self._from}
        said = {"lines": report.lines(), "streamed": read, "audit": self._audit}
        self._data.reports["train"] = {**report.to_dict(), **said}
        for name, (rows, prompts) in self._shared.items():
            self._data.say_overlap(name, rows, prompts, report.kept)
        if self._main:
            for line in report.lines():
                logger.info(line.replace("train:", f"train (pass {self._epoch + 1}, up to here):", 1))
            write_reports(self._folder, self._data.reports)


class StreamProgress(TrainerCallback):
    """`epoch` in logs: passes over the stream; in the first, whose length no one knows, the share of all steps."""

    def __init__(self, loader: Callable[[], StreamLoader | None]) -> None:
        self._loader = loader

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Set it."""
        loader = self._loader()
        if loader is not None:
            share = loader.position.rounds / (state.max_steps * args.gradient_accumulation_steps)
            state.epoch = loader.position.epoch + share if loader.progress is None else loader.progress
