"""The one place where losses are reduced, with a global denominator."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tether.types import LossOutput


def reduce_loss(losses: Tensor, total: int | Tensor, processes: int) -> Tensor:
    """Share of one micro-batch in the mean over all examples, or all tokens, of an optimizer step.

    The shares of all micro-batches add up to the mean over the step, however the step is split; data parallelism
    averages gradients over processes, hence the factor.

    Args:
        losses: `[B]`, this micro-batch's losses of its examples (or of its tokens).
        total: examples (or tokens) of the whole step, over all micro-batches and processes.
        processes: processes whose gradients are averaged.

    Example:
        >>> halves = torch.tensor([1.0, 2.0, 5.0]), torch.tensor([4.0])
        >>> sum(reduce_loss(half, 4, 1).item() for half in halves)
        3.0
    """
    return losses.sum() * (processes / total)


def sum_and_count(values: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and number of values, detached: the parts of a mean over several batches."""
    return values.detach().sum(), torch.tensor(float(len(values)), device=values.device)


def add_to_each(output: LossOutput, name: str, value: Tensor, weight: float) -> LossOutput:
    """Add a term of the whole micro-batch to the loss of each of its examples, and report its mean over examples.

    Micro-batches then enter the step by their share of its examples, as every other part of the loss does.

    Args:
        output: the objective's answer.
        name: what the term is reported as, without its weight.
        value: scalar, differentiable.
        weight: what it is multiplied by in the loss.
    """
    count = value.new_tensor(float(len(output.per_example)))
    metrics = {**output.metrics, name: (value.detach() * count, count)}
    return replace(output, per_example=output.per_example + weight * value, metrics=metrics)
