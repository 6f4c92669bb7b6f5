"""The one place where losses are reduced, with a global denominator."""

from __future__ import annotations

from torch import Tensor


def reduce_loss(per_example: Tensor, total: int | Tensor, processes: int) -> Tensor:
    """Share of one micro-batch in the mean over all examples of an optimizer step.

    The shares of all micro-batches add up to the mean over the step, however the step is split; data parallelism
    averages gradients over processes, hence the factor.

    Args:
        per_example: `[B]`, this micro-batch's losses.
        total: examples of the whole step, over all micro-batches and processes.
        processes: processes whose gradients are averaged.

    Example:
        >>> import torch
        >>> halves = torch.tensor([1.0, 2.0, 5.0]), torch.tensor([4.0])
        >>> sum(reduce_loss(half, 4, 1).item() for half in halves)
        3.0
    """
    return per_example.sum() * (processes / total)
