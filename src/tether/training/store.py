"""Training with a store: opened and verified at the start, filled ahead on request, written and shared as it grows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tether.compat.launcher import processes_here
from tether.data import example_from_row
from tether.errors import ConfigError
from tether.progress import counted
from tether.reference import Reference, Resolved, StoreCheck, StoredReference, numerics_class
from tether.reference.methods.shards import is_sharded
from tether.scoring import pack
from tether.training.config import PreferenceConfig
from tether.training.saving.shared_folder import processes_apart
from tether.training.source import Source
from tether.training.source.dealing import Order
from tether.types import Example

logger = logging.getLogger("tether")
FOLDER = "reference_store"
_VERIFIED_ROWS = 8
_CHUNK = 256
# What sets the arithmetic that a namespace of the store names behind the dtype of the weights.
_PRECISIONS = {
    "": "bf16=False",
    "under bfloat16": "bf16=True",
    "under float16": "fp16=True",
    "by tf32": "tf32=True",
}


def with_store(
    resolved: Resolved, args: PreferenceConfig, accelerator: Accelerator, policy: Callable[[], nn.Module]
) -> tuple[StoredReference | None, str]:
    """The store that the arguments ask for, in front of a reference, or None; and the line that says what that is.

    Args:
        resolved: the reference.
        args: where its store is.
        accelerator: of the run.
        policy: the model in training, as it is at the time; once it is in shards, all processes pass together.

    Raises:
        ConfigError: the store cannot be reached, or the reference has nothing to keep.
    """
    if not args.wants_store():
        return None, resolved.line
    path = args.reference_store or str(Path(str(args.output_dir)) / FOLDER)
    _require_shared(path, args)
    stored = open_store(resolved.reference, path, args, accelerator, policy)
    held = f"{len(stored.store)} completions of this reference in {stored.store.namespace.numerics}"
    if not len(stored.store):
        _say_other_precisions(stored)
    return stored, f"{resolved.line}; kept in the store {path}, which has {held}"


def _require_shared(path: str, args: PreferenceConfig) -> None:
    if args.world_size > processes_here() and "://" not in path and (apart := processes_apart(Path(path))):
        raise ConfigError(
            f"The store is '{path}', which for {apart[0]} is another folder than for rank 0; what one node computes, "
            "the others must be able to read. Name a folder that all nodes share, or an object store (s3://…)."
        )


def _say_other_precisions(stored: StoredReference) -> None:
    """Where nothing but the arithmetic keeps a run from what a store holds, name the setting that would read it."""
    for space in stored.in_other_precisions():
        own, kept = stored.store.namespace, f"{space.numerics}, kept as {space.dtype}"
        settings = [_PRECISIONS[space.numerics.partition(" ")[2]]] * (space.numerics != own.numerics)
        settings += [f"reference_store_dtype={space.dtype}"] * (space.dtype != own.dtype)
        logger.warning(
            f"store: it has log-probs of this very reference in {kept}, and none in {own.numerics}, kept as "
            f"{own.dtype}, which is what this run computes. Nothing else keeps it from reading them. Set "
            f"{' and '.join(settings)} to use them; they are computed again otherwise."
        )


def open_store(
    live: Reference, path: str, args: PreferenceConfig, accelerator: Accelerator, policy: Callable[[], nn.Module]
) -> StoredReference:
    """A store in front of a reference, in the run's arithmetic.

    Raises:
        ConfigError: the store cannot be reached, or the reference has nothing to keep.
    """
    with accelerator.autocast():
        numerics = numerics_class(live.identity, accelerator.device.type)

    def agree(here: bool) -> bool:
        # Before training the policy is whole, and processes fill the store in as many passes as each needs.
        if accelerator.num_processes == 1 or not is_sharded(policy()):
            return here
        flag = torch.tensor(float(here), device=accelerator.device)
        together: Tensor = accelerator.reduce(flag, reduction="sum")  # type: ignore[assignment]
        return bool(together > 0)

    options = {"dtype": args.reference_store_dtype, "device": accelerator.device, "agree": agree}
    return StoredReference(live, path, numerics, **options)


def fill_ahead(
    stored: StoredReference | None,
    source: Source,
    evaluation: Any,
    args: PreferenceConfig,
    accelerator: Accelerator,
    order: Order,
    part: tuple[int, int] | None = None,
) -> StoreFill:
    """Compute what the store lacks of the training set and every evaluation set.

    Args:
        stored: the run's reference with its store; the processes each take their share of the rows.
        source: the training rows.
        evaluation: the prepared evaluation rows, or several sets by name.
        args: of the run.
        accelerator: of the run.
        order: how training rows become batches.
        part: see `fill_store`.

    Returns:
        How many completions were there already, and how many were computed, over all processes.

    Raises:
        ConfigError: the run has no store.
    """
    if stored is None:
        raise ConfigError("There is no store to fill. Set `reference_store` (in a run file `reference.store`).")
    planned = source.planned(order, args.max_steps * args.gradient_accumulation_steps)
    sets: dict[str, Any] = {"train": planned, **evaluation_sets(evaluation)}
    sizes = dict.fromkeys(sets, args.precompute_ref_batch_size or args.per_device_eval_batch_size)
    sizes["train"] = args.precompute_ref_batch_size or args.per_device_train_batch_size
    filled = fill_store(stored, sets, accelerator, sizes, part)
    logger.info(f"store: {filled.present} completions were there, {filled.computed} were computed")
    return filled


def evaluation_sets(prepared: Any) -> dict[str, Dataset]:
    """A run's prepared evaluation rows: `eval`, or `eval NAME` for each set."""
    named = prepared if isinstance(prepared, dict) else {"": prepared}
    return {f"eval {name}".strip(): rows for name, rows in named.items() if rows is not None}


def verify_store(stored: StoredReference, rows: Dataset) -> StoreCheck | None:
    """Compare stored values of a few rows, evenly spread, with the live reference, and say so.

    Raises:
        StoreError: they differ.
    """
    places = sorted({len(rows) * i // _VERIFIED_ROWS for i in range(_VERIFIED_ROWS)})
    check = stored.verify([example_from_row(rows[i]) for i in places])
    if check is not None:
        logger.info(
            f"store: {check.completions} stored completions of the training set were computed again, at most "
            f"{check.max_difference:.1e} nats apart (allowed {check.tolerance:.0e})"
        )
    return check


@dataclass(frozen=True)
class StoreFill:
    """Completions of the data sets: how many were in the store already, and how many were computed now."""

    present: int
    computed: int


def fill_store(
    stored: StoredReference,
    sets: Mapping[str, Dataset | Iterator[list[Example]]],
    accelerator: Accelerator,
    batch_sizes: Mapping[str, int],
    part: tuple[int, int] | None = None,
) -> StoreFill:
    """Compute what the store lacks of data sets; every process takes its share of the rows.

    What is computed is written every half minute, so that after a kill the same call goes on from there.

    Args:
        stored: the reference with its store.
        sets: name to prepared rows, or to examples, some at a time, the same on every process.
        accelerator: of the run.
        batch_sizes: examples per pass, by name of the set.
        part: which of how many parts of the rows to take; None: what this process takes of them.

    Returns:
        The counts, over all processes.
    """
    stored.store.refresh()
    before, present = stored.computed, 0
    part = part or (accelerator.process_index, accelerator.num_processes)
    for name, rows in sets.items():
        waiting: list[Example] = []
        total, mine = _share(rows, *part)
        with counted(f"reference log-probs of {name}", total, shown=accelerator.is_main_process) as advance:
            for examples in mine:
                for example in examples:
                    missing = int((~stored.store.holds(example.keys)).sum())
                    present += len(example.keys) - missing
                    if missing:
                        waiting.append(example)
                    else:
                        advance(1)
                    if len(waiting) == batch_sizes[name]:
                        _score(stored, waiting, accelerator)
                        advance(len(waiting))
                        waiting = []
            if waiting:
                _score(stored, waiting, accelerator)
                advance(len(waiting))
    share(stored, accelerator)
    counts = torch.tensor([present, stored.computed - before], device=accelerator.device)
    present, computed = accelerator.reduce(counts, reduction="sum").tolist()  # type: ignore[union-attr]
    return StoreFill(present, computed)


def _score(stored: StoredReference, examples: list[Example], accelerator: Accelerator) -> None:
    stored.score(pack(examples).to(accelerator.device))


def _share(
    rows: Dataset | Iterator[list[Example]], index: int, processes: int
) -> tuple[int | None, Iterator[list[Example]]]:
    """The rows that one of several processes takes, and how many they are where that is known."""
    if isinstance(rows, Dataset):
        mine = range(index, len(rows), processes)
        return len(mine), _chunks(rows, mine)
    # A chunk may have any number of rows; each process takes its part of each.
    return None, (examples[index::processes] for examples in rows)


def _chunks(rows: Dataset, places: range) -> Iterator[list[Example]]:
    if rows.format["type"] == "custom":  # it reads the images of a row that is asked for, and `to_list` leaves it out
        for place in places:
            yield [example_from_row(rows[place])]
        return
    for start in range(0, len(places), _CHUNK):
        chunk: list[Any] = rows.select(places[start : start + _CHUNK]).to_list()
        yield [example_from_row(row) for row in chunk]


def share(stored: StoredReference, accelerator: Accelerator, *, release: bool = False) -> None:
    """Write what this process computed, and after all have, find what the others did."""
    stored.store.flush()
    accelerator.wait_for_everyone()
    stored.settle(release=release)


class StoreCallback(TrainerCallback):
    """Writes and shares the store at the moments of a run, and lets the reference's weights go once it is full.

    Args:
        stored: the reference with its store.
        source: the training rows; of a stream no one knows whether the store has it all, before its first pass ends.
        accelerator: of the run.
    """

    def __init__(self, stored: StoredReference, source: Source, accelerator: Accelerator) -> None:
        self._stored, self._source, self._accelerator = stored, source, accelerator
        self._full = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """A store that has every training row needs no weights; the guards have run."""
        if self._stored.may_release and self._source.complete:
            rows = self._source.known
            self._full = all(
                self._stored.store.holds([key for example in examples for key in example.keys]).all()
                for examples in _chunks(rows, range(len(rows)))
            )
        self._stored.settle(release=self._full)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Rows come to other processes in the next epoch; whatever one computed, all can read."""
        self._full = True
        share(self._stored, self._accelerator, release=True)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """A run that resumes from this checkpoint finds the values of the steps before it."""
        self._stored.store.flush()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """An evaluation set that came back from the live reference is stored now."""
        self._stored.settle(release=self._full)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Say what was computed."""
        share(self._stored, self._accelerator)
        logger.info(
            f"store: {len(self._stored.store)} completions kept; this process computed {self._stored.computed} of them "
            f"in {self._stored.forwards} passes of the reference"
        )
