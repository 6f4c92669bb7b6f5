"""Losses of single judged completions: a log-ratio and whether it is desirable, to one value per row."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tether.types import LossOutput, LossTerm, Scores

# Ratio of the two classes' total weight that the KTO paper recommends, eq. 8: from 1 to 4/3 for desirable over
# undesirable.
_BALANCE = (1.0, 4 / 3)


def kto(
    logratios: Tensor,
    desirable: Tensor,
    baseline: Tensor | float,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """The KTO loss, `w (1 - s(d))` with `d = beta (logratio - baseline)` for a desirable row, its negative for another.

    Args:
        logratios: `[B]` nats, log-probability of the completion under the policy minus under the reference.
        desirable: bool `[B]`.
        baseline: nats, the paper's z0: an estimate of the KL divergence from the reference, at least 0.
        beta: how strongly the policy is held to the reference, per nat.
        desirable_weight: w of desirable rows.
        undesirable_weight: w of the others.

    Returns:
        `[B]` between 0 and w; half of w at the baseline.

    Reference:
        Ethayarajh et al., KTO: Model Alignment as Prospect Theoretic Optimization, eq. 7 and 8, arXiv:2402.01306.

    Example:
        >>> kto(torch.tensor([3.0, 3.0]), torch.tensor([True, False]), 3.0, undesirable_weight=2.0)
        tensor([0.5000, 1.0000])
    """
    # 1 - s(d) as s(-d), which keeps its digits where s(d) is almost 1.
    losses = torch.sigmoid(-_signed(logratios - baseline, desirable, beta))
    return _weighted(losses, desirable, desirable_weight, undesirable_weight)


def apo_zero_unpaired(
    logratios: Tensor,
    desirable: Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """APO-zero on single completions, `w (1 - s(d))` with `d = beta logratio`, its negative for an undesirable row.

    It raises the likelihood of desirable completions and lowers that of others, whatever the divergence so far.

    Args:
        logratios: `[B]` nats.
        desirable: bool `[B]`.
        beta: how strongly the policy is held to the reference, per nat.
        desirable_weight: w of desirable rows.
        undesirable_weight: w of the others.

    Returns:
        `[B]` between 0 and w; half of w at a log-ratio of 0.

    Reference:
        D'Oosterlinck et al., Anchored Preference Optimization, eq. 7, arXiv:2408.06266; unpaired as in TRL 1.16.
    """
    losses = torch.sigmoid(-_signed(logratios, desirable, beta))
    return _weighted(losses, desirable, desirable_weight, undesirable_weight)


def bco(
    logratios: Tensor,
    desirable: Tensor,
    baseline: Tensor | float,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """The BCO loss, `-w log s(d)` with `d = beta (logratio - baseline)` for a desirable row, its negative for another.

    Args:
        logratios: `[B]` nats.
        desirable: bool `[B]`.
        baseline: nats; `beta` times it is the paper's reward shift, a running mean of rewards.
        beta: how strongly the policy is held to the reference, per nat.
        desirable_weight: w of desirable rows.
        undesirable_weight: w of the others.

    Returns:
        `[B]` nats; `w log 2` at the baseline.

    Reference:
        Jung et al., Binary Classifier Optimization for Large Language Model Alignment, eq. 10, arXiv:2404.04656.
        Matching of the classes' prompt distributions (UDM) is not part of this.
    """
    losses = -F.logsigmoid(_signed(logratios - baseline, desirable, beta))
    return _weighted(losses, desirable, desirable_weight, undesirable_weight)


UNPAIRED: dict[str, Callable[..., Tensor]] = {"kto": kto, "apo_zero_unpaired": apo_zero_unpaired, "bco": bco}


def _signed(logratios: Tensor, desirable: Tensor, beta: float) -> Tensor:
    return beta * torch.where(desirable.bool(), logratios, -logratios)


def _weighted(losses: Tensor, desirable: Tensor, desirable_weight: float, undesirable_weight: float) -> Tensor:
    return losses * torch.where(desirable.bool(), desirable_weight, undesirable_weight).to(losses)


def unpaired_loss(
    policy: Scores,
    reference: Scores | None,
    desirable: Tensor,
    *,
    loss: str,
    baseline: Tensor | float = 0.0,
    branches: int = 1,
    weights: Tensor | None = None,
    **options: float,
) -> LossOutput:
    """Loss of each judged completion of a batch, with TRL's metrics.

    Args:
        policy: scores of `branches` completions for each of B prompts, of which the first is judged; `entropy` and
            `mean_logits` are reported where they are there.
        reference: scores of the same completions under the reference; None: a flat one, whose log-probs are 0.
        desirable: bool `[B]`.
        loss: a name in `UNPAIRED`.
        baseline: nats, for the losses that have one.
        branches: completions of each prompt.
        weights: `[B]`, factor of the loss of each row; None for 1.
        options: the loss's own.

    Returns:
        A term over rows `[B]`, and the metrics, those of a class that is not there with a count of 0.
    """
    desirable = desirable.bool()
    logratios = log_ratios(policy, reference)[::branches]
    anchored = () if loss == "apo_zero_unpaired" else (baseline,)
    per_example = UNPAIRED[loss](logratios, desirable, *anchored, **options)
    per_example = per_example if weights is None else per_example * weights
    with torch.no_grad():
        metrics = _metrics(policy, options.get("beta", 0.1) * logratios.detach(), desirable, branches)
    return LossOutput((LossTerm(per_example),), metrics)


def log_ratios(policy: Scores, reference: Scores | None) -> Tensor:
    """Log-probability of each completion under the policy minus under the reference, `[K]` nats."""
    return policy.logps if reference is None else policy.logps - reference.logps


def _metrics(policy: Scores, rewards: Tensor, desirable: Tensor, branches: int) -> dict[str, tuple[Tensor, Tensor]]:
    logps = policy.logps.detach()[::branches]
    judged = policy.completion_index % branches == 0
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name, chosen in (("chosen", desirable), ("rejected", ~desirable)):
        found[f"rewards/{name}"] = _masked(rewards, chosen)
        found[f"logps/{name}"] = _masked(logps, chosen)
        if policy.mean_logits is not None:
            found[f"logits/{name}"] = _masked(policy.mean_logits, judged & chosen[policy.completion_index // branches])
    if policy.entropy is not None:
        found["entropy"] = _masked(policy.entropy, judged)
    return found


def _masked(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return torch.where(mask, values, 0.0).sum(), mask.sum()


def suggested_weights(desirable: int, undesirable: int) -> tuple[tuple[float, float], tuple[float, float]] | None:
    """Weights that would balance the classes as the KTO paper recommends, each with the other weight at 1.

    The paper's eq. 8 wants `desirable_weight * desirable` to be 1 to 4/3 times `undesirable_weight * undesirable`.

    Args:
        desirable: rows of that class; `undesirable`: of the other.

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
