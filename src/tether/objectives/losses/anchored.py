"""Losses that judge each completion of a pair against the reference on its own, besides or instead of the difference.

Shapes and units as in `pairwise`.
"""

from __future__ import annotations

import torch.nn.functional as F

from tether.types import PerExample


def nca_pair(chosen_logratios: PerExample, rejected_logratios: PerExample, *, beta: float) -> PerExample:
    """Noise contrastive alignment of a pair: `-log s(c) - log s(-c) / 2 - log s(-r) / 2`, the rewards `c` and `r`.

    Args:
        chosen_logratios: `[B]` nats.
        rejected_logratios: `[B]` nats.
        beta: turns log-ratios into rewards, per nat; the paper uses 0.01.

    Returns:
        `[B]` nats; `2 log 2` where policy and reference are the same.

    Reference:
        Chen et al., Noise Contrastive Alignment of Language Models with Explicit Rewards, NCA with two responses,
        arXiv:2402.05369.
    """
    chosen, rejected = beta * chosen_logratios, beta * rejected_logratios
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def bco_pair(chosen_logratios: PerExample, rejected_logratios: PerExample, *, beta: float) -> PerExample:
    """A binary classifier of pairs: `-log s(c) - log s(-r)`, the rewards `c` and `r`, without a shift.

    Args:
        chosen_logratios: `[B]` nats.
        rejected_logratios: `[B]` nats.
        beta: turns log-ratios into rewards, per nat.

    Returns:
        `[B]` nats; `2 log 2` where policy and reference are the same.

    Reference:
        Jung et al., Binary Classifier Optimization for Large Language Model Alignment, with a shift of 0,
        arXiv:2404.04656.
    """
    return -F.logsigmoid(beta * chosen_logratios) - F.logsigmoid(-beta * rejected_logratios)


def sppo_hard(chosen_logratios: PerExample, rejected_logratios: PerExample, *, beta: float) -> PerExample:
    """Self-play with certain wins: `(chosen - 1 / (2 beta))^2 + (rejected + 1 / (2 beta))^2`.

    Args:
        chosen_logratios: `[B]` nats.
        rejected_logratios: `[B]` nats.
        beta: inverse of the paper's eta: log-ratios of `1 / (2 beta)` nats either way are aimed at; the paper uses
            0.001.

    Returns:
        `[B]` squared nats; `1 / (2 beta^2)` where policy and reference are the same.

    Reference:
        Wu et al., Self-Play Preference Optimization for Language Model Alignment, eq. 4.7 with probabilities 1 and 0,
        arXiv:2405.00675.
    """
    return (chosen_logratios - 0.5 / beta) ** 2 + (rejected_logratios + 0.5 / beta) ** 2


def apo_zero(chosen_logratios: PerExample, rejected_logratios: PerExample, *, beta: float) -> PerExample:
    """Chosen up and rejected down, each from the reference: `s(-c) + s(r)`, the rewards `c` and `r`.

    Args:
        chosen_logratios: `[B]` nats.
        rejected_logratios: `[B]` nats.
        beta: turns log-ratios into rewards, per nat.

    Returns:
        `[B]`, from 0 to 2; 1 where policy and reference are the same.

    Reference:
        D'Oosterlinck et al., Anchored Preference Optimization and Contrastive Revisions, eq. 7, arXiv:2408.06266.
    """
    # s(-c) is 1 - s(c) without the cancellation at large rewards.
    return (-beta * chosen_logratios).sigmoid() + (beta * rejected_logratios).sigmoid()


def apo_down(chosen_logratios: PerExample, rejected_logratios: PerExample, *, beta: float) -> PerExample:
    """Both down, the rejected more: `s(c) + s(-(c - r))`, the rewards `c` and `r`.

    Args:
        chosen_logratios: `[B]` nats.
        rejected_logratios: `[B]` nats.
        beta: turns log-ratios into rewards, per nat.

    Returns:
        `[B]`, from 0 to 2; 1 where policy and reference are the same.

    Reference:
        D'Oosterlinck et al., Anchored Preference Optimization and Contrastive Revisions, eq. 8, arXiv:2408.06266.
    """
    return (beta * chosen_logratios).sigmoid() + (-beta * (chosen_logratios - rejected_logratios)).sigmoid()
