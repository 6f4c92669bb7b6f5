"""A sample of a run's rows as token ids: how many tokens an epoch has, and its largest micro-batch."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, cast

from tether.data import example_from_row, load_rows, prepare
from tether.data.sources.stream import is_streamed
from tether.data.split import is_split, split_rows
from tether.errors import ConfigError
from tether.scoring import pack
from tether.training import PreferenceConfig
from tether.training.budget import TokenBudget
from tether.types import Example, ScoringBatch

SAMPLE = 1000


@dataclass(frozen=True)
class Sample:
    """What a sample of rows says of all.

    Args:
        examples: the prepared ones.
        rows: of the whole set that would be trained on, estimated from the share that the sample kept.
        shared: tokens of an epoch with each prompt computed once in a row.
        unshared: the same with each completion's prompt computed for itself.
        complete: whether the sample is the set.
    """

    examples: list[Example]
    rows: int
    shared: int
    unshared: int
    complete: bool


def sample_rows(train: Any, evaluation: Any, tokenizer: Any, args: PreferenceConfig, *, apart: bool) -> Sample:
    """Read a set, prepare some rows of it, and count.

    Args:
        train: what the trainer would take.
        evaluation: the same, of evaluation; a share of the training rows leaves fewer to train on.
        tokenizer: or processor.
        args: lengths, truncation, boundary.
        apart: whether prompts are read by an encoder.

    Raises:
        ConfigError: rows that are streamed, whose number no one knows.
        DataError: rows that cannot be read.
    """
    if args.stream_dataset or is_streamed(train):
        raise ConfigError(
            "The rows are streamed, so that no one knows how many there are. Plan a file of some of them."
        )
    rows = load_rows(train, kind=args.kind, name="train")
    if is_split(evaluation):
        rows, _ = split_rows(rows, cast(Any, evaluation), kind=args.kind)
    chosen = sorted(random.Random(0).sample(range(len(rows)), min(SAMPLE, len(rows))))
    found = prepare(
        rows.select(chosen),
        tokenizer,
        max_length=args.max_length,
        kind=args.kind,
        turns=args.turns,
        truncation_mode=args.truncation_mode,
        boundary=args.prompt_boundary,
        encoder_decoder=apart,
    ).dataset
    examples = [example_from_row(found[i]) for i in range(len(found))]
    share = len(rows) / len(chosen)
    prompts = [len(one.prompt_ids) for one in examples]
    answers = [[len(ids) for ids in one.completion_ids] for one in examples]
    shared = sum(prompts) + sum(map(sum, answers))
    unshared = sum(prompt * max(len(own), 1) + sum(own) for prompt, own in zip(prompts, answers, strict=True))
    counts = [round(share * one) for one in (len(examples), shared, unshared)]
    return Sample(examples, *counts, complete=len(chosen) == len(rows))


def largest_batch(examples: list[Example], size: int, tokens: int | None) -> tuple[ScoringBatch, int]:
    """The largest micro-batch of some steps, and how many micro-batches its batch has.

    Args:
        examples: prepared rows.
        size: rows of a batch on one device.
        tokens: of a forward at most; None for no limit.
    """
    order = list(examples)
    random.Random(0).shuffle(order)
    budget = TokenBudget(tokens)
    split = [budget.split(pack(order[start : start + size])) for start in range(0, len(order), size)]
    parts = max(split, key=lambda parts: parts[0].batch.forest.length)
    return parts[0].batch, len(parts)
