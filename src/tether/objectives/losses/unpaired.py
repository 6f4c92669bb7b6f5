"""Losses of single judged completions: a log-ratio and whether it is desirable, to one value per row."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from tether.types import PerExample


def kto(
    logratios: PerExample,
    desirable: Bool[Tensor, " B"],
    baseline: Float[Tensor, ""] | float,
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> PerExample:
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
        >>> weights = {"desirable_weight": 1.0, "undesirable_weight": 2.0}
        >>> kto(torch.tensor([3.0, 3.0]), torch.tensor([True, False]), 3.0, beta=0.1, **weights)
        tensor([0.5000, 1.0000])
    """
    # 1 - s(d) as s(-d), which keeps its digits where s(d) is almost 1.
    losses = torch.sigmoid(-_signed(logratios - baseline, desirable, beta))
    return _weighted(losses, desirable, desirable_weight, undesirable_weight)


def apo_zero_unpaired(
    logratios: PerExample,
    desirable: Bool[Tensor, " B"],
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> PerExample:
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
    logratios: PerExample,
    desirable: Bool[Tensor, " B"],
    baseline: Float[Tensor, ""] | float,
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> PerExample:
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


def _signed(logratios: PerExample, desirable: Bool[Tensor, " B"], beta: float) -> PerExample:
    return beta * torch.where(desirable.bool(), logratios, -logratios)


def _weighted(
    losses: PerExample, desirable: Bool[Tensor, " B"], desirable_weight: float, undesirable_weight: float
) -> PerExample:
    return losses * torch.where(desirable.bool(), desirable_weight, undesirable_weight).to(losses)
