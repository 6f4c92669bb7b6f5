"""Training on rows that are prepared while it goes on: what is otherwise asked of a data set in memory."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tether.data import example_from_row
from tether.data.prepare.stream import Chunk, PreparedStream
from tether.data.rows.columns import BATCH_ROWS
from tether.errors import DataError
from tether.training.evaluation import EvaluationLoop
from tether.training.stream_loader import Order, Position, StreamLoader, Walk
from tether.types import Example

if TYPE_CHECKING:
    from tether.training.config import PreferenceConfig
    from tether.training.datasets import RunData

logger = logging.getLogger("tether")
REPORT = "data.json"


def order_of(args: PreferenceConfig, batch_size: int, processes: int, *, split_batches: bool = False) -> Order:
    """How the rows of a stream become batches in a run.

    Args:
        args: of the run.
        batch_size: of one process; of all together with `split_batches`.
        processes: that share the rows.
        split_batches: see accelerate.
    """
    drawn = args.train_sampling_strategy == "random"
    return Order(
        batch_size // processes if split_batches else batch_size,
        processes,
        buffer_size=args.dataset_buffer_size if drawn else 0,
        seed=args.seed if args.data_seed is None else args.data_seed,
        drop_last=args.dataloader_drop_last,
    )


class StreamReport(TrainerCallback):
    """Counts rows as they come to be trained on, and writes and says what was counted when a pass over them ends.

    Args:
        data: the reports of the run.
        stream: the rows.
        folder: where the report is kept.
        main: whether this process writes and speaks.
    """

    def __init__(self, data: RunData, stream: PreparedStream, folder: Path, *, main: bool) -> None:
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
        self._data.reports["train"] = {**report.to_dict(), "streamed": read, "audit": self._audit}
        for name, (rows, prompts) in self._shared.items():
            self._data.say_overlap(name, rows, prompts, report.kept)
        if self._main:
            for line in report.lines():
                logger.info(line.replace("train:", f"train (pass {self._epoch + 1}, up to here):", 1))
            write_reports(self._folder, self._data.reports)


def write_reports(folder: Path, reports: dict[str, Any]) -> None:
    """Keep the reports on the data in the run folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / REPORT).write_text(json.dumps(reports, indent=2) + "\n", encoding="utf-8")


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


class StreamedTraining(EvaluationLoop):
    """What `TetherTrainer` does otherwise where its training rows are a `PreparedStream`."""

    args: PreferenceConfig  # type: ignore[assignment]
    _loader: StreamLoader | None = None
    _stream_report: StreamReport | None = None

    def follow_stream(self, folder: Path) -> None:
        """Count the rows of a stream as they come; nothing for rows in memory."""
        if isinstance(self.train_dataset, PreparedStream):
            main = self.is_world_process_zero()
            self._stream_report = StreamReport(self.data, self.train_dataset, folder, main=main)
            self.add_callback(self._stream_report)
            self.add_callback(StreamProgress(lambda: self._loader))

    def get_train_dataloader(self) -> DataLoader:
        """Of a stream, what deals its rows; see `tether.training.stream_loader`."""
        if not isinstance(self.train_dataset, PreparedStream):
            return super().get_train_dataloader()
        report = cast(StreamReport, self._stream_report)
        self.close_stream()
        self._loader = StreamLoader(
            self.train_dataset,
            self._order(),
            self.accelerator.process_index,
            self.data_collator,
            began=report.began,
            came=report.came,
        )
        return cast(DataLoader, self._loader)

    def _order(self) -> Order:
        return order_of(
            self.args,
            cast(int, self._train_batch_size),
            self.accelerator.num_processes,
            split_batches=self.accelerator.split_batches,
        )

    def close_stream(self) -> None:
        """Prepare no more rows."""
        if self._loader is not None:
            self._loader.close()

    def planned_examples(self, stream: PreparedStream) -> Iterator[list[Example]]:
        """The rows of the first pass that the run will train on, in its order, some at a time."""
        order, position = self._order(), Position()
        walk = Walk(stream, order, position)
        planned = self.args.max_steps * self.args.gradient_accumulation_steps * order.round_size
        rows = islice(walk.rows(), planned)
        try:
            while part := list(islice(rows, BATCH_ROWS)):
                yield [example_from_row(row) for table in part for row in stream.rows_of(table)]
        finally:
            walk.close()

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: Any,
        trial: Any,
    ) -> tuple[int, int]:
        found = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if resume_from_checkpoint is None or self._loader is None:
            return found
        if self.state.global_step >= max_steps:
            return num_train_epochs, 0
        position = Position.read(Path(resume_from_checkpoint))
        self._loader.resume(position, skip=not self.args.ignore_data_skip)
        # The loader begins where the checkpoint stands: the loop has nothing to skip.
        return position.epoch, 0

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The batches of a step; before an error in the rows leaves, the steps before it are kept in a checkpoint."""
        loader = self._loader
        if loader is None:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        before, rounds = loader.position, loader.position.rounds
        try:
            batches, counts = super().get_batch_samples(epoch_iterator, num_batches, device)
        except DataError as error:
            loader.rewind(before, rounds)
            raise DataError(f"{error}{self._kept_steps()}") from error
        if batches:
            # The loop counts as many batches for every step; those that the end of a pass lacks are none.
            batches = [{"absent": True}] * (num_batches - len(batches)) + batches
        return batches, counts

    def _kept_steps(self) -> str:
        """Save the last finished step, where that was not done already, and say so."""
        step = self.state.global_step
        if not step:
            return ""
        folder = Path(self._get_output_dir(None)) / f"checkpoint-{step}"
        if not folder.is_dir():
            self._save_checkpoint(cast(nn.Module, self.model), None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        return f" The {step} steps before it are kept in {folder}: resume from there when the row is corrected."

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self._loader is not None and self.is_world_process_zero():
            self._loader.position.write(Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}")
