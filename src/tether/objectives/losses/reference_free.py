"""Losses of pairs that compare with no reference: from the policy's own log-probs to one value per pair.

`chosen_logps [B]` is a completion's log-probability in nats, `chosen_mean_logps [B]` that per token, both at most 0.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from tether.types import PerExample, PerToken

# The largest log-probability whose odds are computed: odds of 1e7, the last that float32 tells from certainty.
_CERTAIN = -1e-7


def sft(chosen_token_logps: PerToken) -> PerToken:
    """Likelihood of the chosen completions: `-log p` of each of their tokens, averaged over all tokens of a step.

    Args:
        chosen_token_logps: `[M]` nats, of all tokens of the chosen completions.

    Returns:
        `[M]` nats, one per token.

    Reference:
        Ouyang et al., Training language models to follow instructions with human feedback, section 3.5,
        arXiv:2203.02155; beside a preference loss: Wang et al., Enhancing the Reasoning Ability of Multimodal Large
        Language Models via Mixed Preference Optimization, arXiv:2411.10442.
    """
    return -chosen_token_logps


def simpo(
    chosen_mean_logps: PerExample,
    rejected_mean_logps: PerExample,
    *,
    beta: float,
    simpo_gamma: float,
    label_smoothing: float,
) -> PerExample:
    """Mean log-probs with a target margin: `-(1 - e) log s(d) - e log s(-d)`, `d = beta (chosen - rejected) - gamma`.

    Args:
        chosen_mean_logps: `[B]` nats per token.
        rejected_mean_logps: `[B]` nats per token.
        beta: turns mean log-probs into rewards, per nat per token; the paper uses 2 to 2.5.
        simpo_gamma: the lead that the chosen reward should have; the paper uses 0.3 to 0.8 times beta.
        label_smoothing: probability e that a label is wrong.

    Returns:
        `[B]` nats; `log(1 + exp(gamma))` at zero margin.

    Reference:
        Meng et al., SimPO: Simple Preference Optimization with a Reference-Free Reward, eq. 6, arXiv:2405.14734.
    """
    logits = beta * (chosen_mean_logps - rejected_mean_logps) - simpo_gamma
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def cpo(
    chosen_logps: PerExample,
    rejected_logps: PerExample,
    chosen_mean_logps: PerExample,
    *,
    beta: float,
    label_smoothing: float,
    cpo_alpha: float,
) -> PerExample:
    """DPO with a flat reference, and a likelihood: `-(1 - e) log s(d) - e log s(-d) - alpha mean log p(chosen)`.

    `d = beta (chosen - rejected)`, log-probs summed over tokens; the likelihood is per token of each completion.

    Args:
        chosen_logps: `[B]` nats.
        rejected_logps: `[B]` nats.
        chosen_mean_logps: `[B]` nats per token.
        beta: inverse temperature, per nat.
        label_smoothing: probability e that a label is wrong.
        cpo_alpha: weight of the likelihood of the chosen completion; 0 leaves it out.

    Returns:
        `[B]` nats; `log 2` plus the likelihood at zero margin.

    Reference:
        Xu et al., Contrastive Preference Optimization, arXiv:2401.08417.
    """
    logits = beta * (chosen_logps - rejected_logps)
    contrast = -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)
    return contrast - cpo_alpha * chosen_mean_logps


def odds_ratio(chosen_mean_logps: PerExample, rejected_mean_logps: PerExample, *, beta: float) -> PerExample:
    """ORPO's preference part alone: `-beta log s(log odds(chosen) - log odds(rejected))`, `odds(p) = p / (1 - p)`.

    Args:
        chosen_mean_logps: `[B]` nats per token.
        rejected_mean_logps: `[B]` nats per token.
        beta: the paper's lambda, a weight.

    Returns:
        `[B]` nats; `beta log 2` at zero margin.

    Reference:
        Hong et al., ORPO: Monolithic Preference Optimization without Reference Model, eq. 7, arXiv:2403.07691.
    """
    return -beta * F.logsigmoid(log_odds(chosen_mean_logps) - log_odds(rejected_mean_logps))


def orpo(chosen_mean_logps: PerExample, rejected_mean_logps: PerExample, *, beta: float) -> PerExample:
    """Likelihood and odds ratio: `-mean log p(chosen) - beta log s(log odds(chosen) - log odds(rejected))`.

    The likelihood is per token of each completion, then averaged over pairs.

    Args:
        chosen_mean_logps: `[B]` nats per token.
        rejected_mean_logps: `[B]` nats per token.
        beta: the paper's lambda: weight of the odds ratio beside the likelihood.

    Returns:
        `[B]` nats; `beta log 2` plus the likelihood at zero margin.

    Reference:
        Hong et al., ORPO: Monolithic Preference Optimization without Reference Model, eq. 6, arXiv:2403.07691.
    """
    return odds_ratio(chosen_mean_logps, rejected_mean_logps, beta=beta) - chosen_mean_logps


def log1mexp(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """`log(1 - exp(x))` for x below 0, without cancellation at either end.

    >>> log1mexp(torch.tensor([-1e-6, -50.0], dtype=torch.float64))
    tensor([-1.3816e+01, -1.9287e-22], dtype=torch.float64)
    """
    # Each branch gets an argument that is safe for it: a gradient of the branch not taken would be NaN.
    near = x > -math.log(2)
    return torch.where(
        near,
        (-torch.expm1(torch.where(near, x, -1.0))).log(),
        torch.log1p(-torch.where(near, -1.0, x).exp()),
    )


def log_odds(mean_logps: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """`log(p / (1 - p))` of mean log-probs, clipped at odds of 1e7."""
    certain = mean_logps.clamp(max=_CERTAIN)
    return certain - log1mexp(certain)
