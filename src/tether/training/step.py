"""The records that pass through transformers' training loop, and the one place where losses are reduced."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from tether.compat.accelerate import rows_of_last_round
from tether.data import example_from_row
from tether.errors import ConfigError
from tether.scoring import pack
from tether.types import LossOutput, LossTerm, Scores, ScoringBatch


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """What one forward computes.

    Args:
        batch: some examples of a step.
        counts: False: they are computed only so that every process makes the same number of forwards; they add nothing
            to the gradient and to what is reported.
    """

    batch: ScoringBatch
    counts: bool = True

    def to(self, device: torch.device | str) -> MicroBatch:
        """The same with its tensors on `device`."""
        return replace(self, batch=self.batch.to(device))


@dataclass(frozen=True)
class Context:
    """What an algorithm found out about a step, or an evaluation, before its micro-batches are computed.

    Algorithms derive theirs from it.

    Args:
        references: scores of micro-batches that the reference has computed already.
        metrics: to report beside those of the losses, see `LossOutput`.
    """

    references: Mapping[MicroBatch, Scores | None] = field(default_factory=dict)
    metrics: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """This process' share in one optimizer step.

    Args:
        shares: for each batch of the data loader the micro-batches that it is split into; none for one that the end of
            a stream lacks.
        totals: `[3]`, the examples, completions and loss tokens of the whole step, over all processes.
        context: what the algorithm found out when the step began.
        evaluates: it is a micro-batch of an evaluation, which counts in no training log.
    """

    shares: tuple[tuple[MicroBatch, ...], ...]
    totals: Tensor
    context: Context = field(default_factory=Context)
    evaluates: bool = False

    @property
    def parts(self) -> tuple[MicroBatch, ...]:
        """All micro-batches."""
        return tuple(part for share in self.shares for part in share)


def collate(rows: list[dict[str, Any]]) -> dict[str, ScoringBatch]:
    """Pack prepared rows; a dictionary because transformers' `Trainer` expects one."""
    return {"batch": pack([example_from_row(row) for row in rows])}


def batch_of(inputs: Any) -> ScoringBatch:
    """The batch inside what a collator returned.

    Raises:
        ConfigError: there is none.
    """
    batch = inputs.get("batch") if isinstance(inputs, Mapping) else None
    if not isinstance(batch, ScoringBatch):
        raise ConfigError(
            f"The data collator returned {type(inputs).__name__}; it must return a dictionary with a "
            "ScoringBatch under 'batch', as tether.training.step.collate does. Leave data_collator out to pack rows."
        )
    return batch


@dataclass(frozen=True)
class Filler:
    """What a collator returned of rows that a process is given only so that it has some."""

    inputs: Any


def own_rows(inputs: Any, accelerator: Accelerator, *, last: bool) -> MicroBatch:
    """A process' share of a data loader's round, without rows of other steps.

    Every process must get a batch in every step, so that accelerate gives rows of the epoch's beginning once more where
    the last ones do not suffice. They would count twice.

    Args:
        inputs: what the collator returned, a filler, or a micro-batch.
        accelerator: knows whether the round is the last of the epoch, and how many rows its processes have together.
        last: whether this is the last of the rounds so far.

    Returns:
        The batch's own rows, which come first; where it has none, one that does not count.
    """
    if isinstance(inputs, MicroBatch):
        return inputs
    if isinstance(inputs, Filler):
        return MicroBatch(batch_of(inputs.inputs), counts=False)
    batch, rows = batch_of(inputs), rows_of_last_round(accelerator)
    if not last or accelerator.num_processes == 1 or rows is None:
        return MicroBatch(batch)
    own = rows - accelerator.process_index * batch.num_examples
    if own >= batch.num_examples:
        return MicroBatch(batch)
    return MicroBatch(pack(batch.examples[: max(own, 1)]), counts=own > 0)


_OVER = ("examples", "completions", "tokens")


def reduce_loss(output: LossOutput, totals: Tensor, processes: int) -> Tensor:
    """Share of one micro-batch in the loss of an optimizer step: the mean of each term over the whole step.

    The shares of all micro-batches add up to the loss of the step, however the step is split; data parallelism
    averages gradients over processes, hence the factor.

    Args:
        output: of this micro-batch.
        totals: `[3]`, see `Step`.
        processes: processes whose gradients are averaged.

    Example:
        >>> halves = torch.tensor([1.0, 2.0, 5.0]), torch.tensor([4.0])
        >>> sum(reduce_loss(LossOutput((LossTerm(half),), {}), torch.tensor([4, 8, 0]), 1).item() for half in halves)
        3.0
    """
    shares = [term.values.sum() * (processes / _denominator(term, totals)) for term in output.terms]
    return sum(shares[1:], shares[0])


def _denominator(term: LossTerm, totals: Tensor) -> Tensor | float:
    return 1.0 if term.over == "constant" else totals[_OVER.index(term.over)].clamp(min=1)


def with_term(output: LossOutput, name: str, value: Tensor, weight: float, examples: int) -> LossOutput:
    """Add a term of the whole micro-batch to the loss of each of its examples, and report its mean over examples.

    Micro-batches then enter the step by their share of its examples, as every other part of the loss does.

    Args:
        output: the objective's answer.
        name: what the term is reported as, without its weight.
        value: scalar, differentiable.
        weight: what it is multiplied by in the loss.
        examples: of the micro-batch.
    """
    count = value.new_tensor(float(examples))
    term = LossTerm((weight * value).expand(examples))
    return LossOutput((*output.terms, term), {**output.metrics, name: (value.detach() * count, count)})
