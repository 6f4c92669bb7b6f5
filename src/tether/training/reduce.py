"""The one place where losses are reduced, with a global denominator."""

from __future__ import annotations

import torch
from torch import Tensor


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
