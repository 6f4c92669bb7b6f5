"""From the scores of single judged completions to their losses, and the weights of the two classes."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tether.objectives.objective import Objective
from tether.objectives.registry import OBJECTIVES
from tether.types import LossOutput, LossTerm, Metrics, PerCompletion, PerExample, Scores, Sum

# Ratio of the two classes' total weight that the KTO paper recommends, eq. 8: from 1 to 4/3 for desirable over
# undesirable.
_BALANCE = (1.0, 4 / 3)


def unpaired_loss(
    policy: Scores,
    reference: Scores | None,
    desirable: Bool[Tensor, " B"],
    *,
    loss: str,
    baseline: Float[Tensor, ""] | float = 0.0,
    branches: int = 1,
    weights: PerExample | None = None,
    **options: float,
) -> LossOutput:
    """Loss of each judged completion of a batch, with TRL's metrics.

    Args:
        policy: scores of `branches` completions for each of B prompts, of which the first is judged; `entropy` and
            `mean_logits` are reported where they are there.
        reference: scores of the same completions under the reference; None: a flat one, whose log-probs are 0.
        desirable: bool `[B]`.
        loss: a loss of the algorithm `kto`.
        baseline: nats, for the losses that have one.
        branches: completions of each prompt.
        weights: `[B]`, factor of the loss of each row; None for 1.
        options: the loss's own.

    Returns:
        A term over rows `[B]`, and the metrics, those of a class that is not there with a count of 0.
    """
    desirable = desirable.bool()
    logratios = log_ratios(policy, reference)[::branches]
    row = OBJECTIVES["kto"][loss]
    per_example = row(logratios, desirable, *((baseline,) if _has_baseline(row) else ()), **options)
    per_example = per_example if weights is None else per_example * weights
    with torch.no_grad():
        metrics = _metrics(
            policy, ({**row.defaults, **options}["beta"] or 0.0) * logratios.detach(), desirable, branches
        )
    return LossOutput((LossTerm(per_example),), metrics)


def _has_baseline(row: Objective) -> bool:
    return row.takes("mismatched_mean") or row.takes("running_mean")


def log_ratios(policy: Scores, reference: Scores | None) -> PerCompletion:
    """Log-probability of each completion under the policy minus under the reference, `[K]` nats."""
    return policy.logps if reference is None else policy.logps - reference.logps


def _metrics(policy: Scores, rewards: PerExample, desirable: Bool[Tensor, " B"], branches: int) -> Metrics:
    logps = policy.logps.detach()[::branches]
    judged = policy.completion_index % branches == 0
    found: Metrics = {}
    for name, chosen in (("chosen", desirable), ("rejected", ~desirable)):
        found[f"rewards/{name}"] = _masked(rewards, chosen)
        found[f"logps/{name}"] = _masked(logps, chosen)
        if policy.mean_logits is not None:
            found[f"logits/{name}"] = _masked(policy.mean_logits, judged & chosen[policy.completion_index // branches])
    if policy.entropy is not None:
        found["entropy"] = _masked(policy.entropy, judged)
    return found


def _masked(values: Float[Tensor, " V"], mask: Bool[Tensor, " V"]) -> Sum:
    return torch.where(mask, values, 0.0).sum(), mask.sum()


def suggested_weights(desirable: int, undesirable: int) -> tuple[tuple[float, float], tuple[float, float]] | None:
    """Weights that would balance the classes as the KTO paper recommends, each with the other weight at 1.

    The paper's eq. 8 wants `desirable_weight * desirable` to be 1 to 4/3 times `undesirable_weight * undesirable`.

    Args:
        desirable: rows of that class.
        undesirable: rows of the other.

    Returns:
        Lowest and highest `desirable_weight`, then the same of `undesirable_weight`; None where a class is empty.

    Example:
        >>> suggested_weights(30, 60)
        ((2.0, 2.666...), (0.375, 0.5))
        >>> suggested_weights(30, 0) is None
        True
    """
    if not desirable or not undesirable:
        return None
    low, high = _BALANCE
    ratio = undesirable / desirable
    return (low * ratio, high * ratio), (1 / (high * ratio), 1 / (low * ratio))


def is_balanced(desirable: int, undesirable: int, desirable_weight: float, undesirable_weight: float) -> bool:
    """Whether weights are within what `suggested_weights` recommends; True where a class is empty.

    Example:
        >>> is_balanced(30, 60, 1.0, 1.0), is_balanced(30, 60, 2.0, 1.0), is_balanced(10, 10, 1.0, 1.0)
        (False, True, True)
    """
    if not desirable or not undesirable:
        return True
    low, high = _BALANCE
    ratio = desirable_weight * desirable / (undesirable_weight * undesirable)
    return low * (1 - 1e-9) <= ratio <= high * (1 + 1e-9)
