"""What gives a run its batches, whatever they are made from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback, TrainingArguments

from tether.data import example_from_row, longest_row
from tether.training.source.dealing import Order
from tether.types import Example

_FRONT = 32
Collate = Callable[[list[dict[str, Any]]], Any]


class Source(ABC):
    """Training rows, and where in them a run stands.

    Attributes:
        rows: what transformers is given as the training set.
        known: rows that are there before training: all of a set in memory, the first ones of a stream.
        complete: whether `known` is all there is.
        keeps_position: whether it knows by itself where a checkpoint stands; else the loop skips batches.
    """

    rows: Any
    known: Dataset
    complete: bool
    keeps_position: bool = False

    def probe(self, count: int, *, longest: bool = False) -> list[Example]:
        """A few real rows for a check: the shortest near the front, so that it is cheap; with a long one on request.

        Args:
            count: how many, at least 2 with `longest`.
            longest: begin with the longest row of all, for what depends on length, such as sliding windows.
        """
        rows = self.known
        front = [example_from_row(rows[i]) for i in range(min(_FRONT, len(rows)))]
        front.sort(key=lambda example: len(example.prompt_ids) + sum(len(ids) for ids in example.completion_ids))
        return [example_from_row(rows[longest_row(rows)]), *front[: count - 1]] if longest else front[:count]

    @abstractmethod
    def planned(self, order: Order, batches: int) -> Dataset | Iterator[list[Example]]:
        """The rows that a run will train on: a set, or examples in the run's order, some at a time.

        Args:
            order: how rows become batches.
            batches: that the run has of each process.
        """

    def order(self, args: TrainingArguments, batch_size: int, processes: int, *, split_batches: bool = False) -> Order:
        """How rows become batches in a run.

        Args:
            args: of the run.
            batch_size: of one process; of all together with `split_batches`.
            processes: that share the rows.
            split_batches: see accelerate.
        """
        return Order(batch_size // processes if split_batches else batch_size, processes)

    def loader(self, order: Order, index: int, collate: Collate) -> Any:
        """What deals the batches of one process, by its index; None: transformers' own loader."""

    def callbacks(self, data: Any, folder: Path, *, main: bool) -> list[TrainerCallback]:
        """What follows the rows during a run: `data` has its reports, `folder` is the run's, `main` writes."""
        return []

    def mark(self) -> Any:
        """Where the batches that have come end."""

    def rewind(self, mark: Any) -> None:
        """Go back to a mark: what has come since was not trained on."""

    def resume(self, folder: Path, *, skip: bool) -> int:
        """Go on from where a checkpoint stands, or without `skip` from the beginning of its epoch; gives the epoch."""
        raise TypeError(f"{type(self).__name__} keeps no position.")

    def save(self, folder: Path, process: int) -> None:
        """Keep in a checkpoint where the run stands; every process calls, with its number."""

    def evaluated(self, loader: Iterable[Any]) -> Iterator[Any]:
        """Batches of an evaluation set, from transformers' loader of it."""
        # A pass through a loader takes a number of torch's generator: dropout would be another one afterwards.
        with torch.random.fork_rng(devices=[]):
            yield from loader

    def close(self) -> None:
        """Prepare no more rows."""
