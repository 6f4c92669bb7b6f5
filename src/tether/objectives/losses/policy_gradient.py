"""Surrogates of policy gradients: a log-ratio and an advantage for each token, to one loss for each token.

A ratio of a whole completion stands at each of its tokens; the gradient is the same as that of one value a completion.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

from tether.objectives.losses.transforms import EXPONENT_LIMIT
from tether.types import PerToken


def ratio(log_ratios: PerToken) -> PerToken:
    """`exp`, with exponents clipped at 40, where gradients end."""
    return log_ratios.clamp(max=EXPONENT_LIMIT).exp()


def clipped(
    log_ratios: PerToken, advantages: PerToken, *, epsilon: float, epsilon_high: float | None, delta: float | None
) -> PerToken:
    """The clipped surrogate, `-min(min(r, delta) A, clip(r, 1 - epsilon, 1 + epsilon_high) A)` for ratios r.

    Args:
        log_ratios: `[N]` nats, log-probability under the policy minus under the policy that began these updates.
        advantages: `[N]`.
        epsilon: how far below 1 a ratio still counts.
        epsilon_high: how far above 1 it does; unset: as `epsilon`.
        delta: bound of the ratio where the advantage is negative (dual clip), above `1 + epsilon_high`; unset: none.

    Returns:
        `[N]`.

    Reference:
        Schulman et al., Proximal Policy Optimization Algorithms, eq. 7, arXiv:1707.06347; asymmetric as in Yu et al.,
        DAPO, eq. 10, arXiv:2503.14476; two-sided as in INTELLECT-2, section 3.4, arXiv:2505.07291.

    Example:
        >>> options = {"epsilon": 0.2, "epsilon_high": None, "delta": None}
        >>> clipped(torch.tensor([1.5, 0.5]).log(), torch.tensor([1.0, 1.0]), **options)
        tensor([-1.2000, -0.5000])
    """
    r = ratio(log_ratios)
    bounded = r.clamp(1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high))
    free = r if delta is None else r.clamp(max=delta)
    return -torch.minimum(free * advantages, bounded * advantages)


def cispo(log_ratios: PerToken, advantages: PerToken, token_logps: PerToken, *, epsilon_high: float | None) -> PerToken:
    """A clipped weight of importance without gradient, `-min(r, epsilon_high) A log p` with `r = exp(log_ratio)`.

    Args:
        log_ratios: `[N]` nats, log-probability under the policy minus under the policy that began these updates.
        advantages: `[N]`.
        token_logps: `[N]` nats, of the policy; what the gradient goes through.
        epsilon_high: the largest weight, as TRL counts it: the bound itself and not its distance from 1.

    Returns:
        `[N]`.

    Reference:
        MiniMax-M1, eq. 4 and 5, arXiv:2506.13585.

    Example:
        >>> cispo(torch.tensor([8.0]).log(), torch.tensor([1.0]), torch.tensor([-2.0]), epsilon_high=5.0)
        tensor([10.])
    """
    return -ratio(log_ratios).clamp(max=epsilon_high).detach() * advantages * token_logps


def sapo(
    log_ratios: PerToken, advantages: PerToken, *, sapo_temperature_pos: float, sapo_temperature_neg: float
) -> PerToken:
    """A soft gate in place of the clip, `-A (4 / t) s(t (r - 1))` for ratios r, with the logistic function s.

    Args:
        log_ratios: `[N]` nats, log-probability under the policy minus under the policy that began these updates.
        advantages: `[N]`.
        sapo_temperature_pos: t where the advantage is above 0.
        sapo_temperature_neg: t elsewhere.

    Returns:
        `[N]`; `-2 A / t` at a ratio of 1, where the gradient is that of the ratio itself.

    Reference:
        Soft Adaptive Policy Optimization, eq. 5 and 6, arXiv:2511.20347.

    Example:
        >>> sapo(torch.zeros(2), torch.tensor([1.0, -1.0]), sapo_temperature_pos=1.0, sapo_temperature_neg=2.0)
        tensor([-2.,  1.])
    """
    temperature = _by_sign(advantages > 0, sapo_temperature_pos, sapo_temperature_neg, log_ratios)
    return -torch.sigmoid(temperature * (ratio(log_ratios) - 1)) * 4 / temperature * advantages


def vespo(
    log_weights: PerToken,
    advantages: PerToken,
    token_logps: PerToken,
    *,
    vespo_k_pos: float,
    vespo_lambda_pos: float,
    vespo_k_neg: float,
    vespo_lambda_neg: float,
) -> PerToken:
    """A smooth weight of the whole completion without gradient, `-phi A log p` with `log phi = l + k log w - l w`.

    Args:
        log_weights: `[N]` nats, log w of a token's completion: its log-ratio, summed over tokens, to the policy that
            sampled it.
        advantages: `[N]`.
        token_logps: `[N]` nats, of the policy; what the gradient goes through.
        vespo_k_pos: k where the advantage is at least 0.
        vespo_lambda_pos: l there.
        vespo_k_neg: k where the advantage is negative.
        vespo_lambda_neg: l there.

    Returns:
        `[N]`; phi is 1 at a weight of 1.

    Reference:
        VESPO: Variational Sequence-Level Soft Policy Optimization, arXiv:2602.10693; bounds of log w as in TRL 1.16.

    Example:
        >>> options = {"vespo_k_pos": 2.0, "vespo_lambda_pos": 3.0, "vespo_k_neg": 3.0, "vespo_lambda_neg": 2.0}
        >>> vespo(torch.zeros(1), torch.tensor([0.5]), torch.tensor([-2.0]), **options)
        tensor([1.])
    """
    options = {
        "k_pos": vespo_k_pos,
        "lambda_pos": vespo_lambda_pos,
        "k_neg": vespo_k_neg,
        "lambda_neg": vespo_lambda_neg,
    }
    return -vespo_phi(log_weights, advantages, **options) * advantages * token_logps


def vespo_phi(
    log_weights: PerToken, advantages: PerToken, *, k_pos: float, lambda_pos: float, k_neg: float, lambda_neg: float
) -> PerToken:
    """The weight of `vespo`, without gradient: the shape of its arguments."""
    log_w = log_weights.detach().clamp(LOWEST_LOG_WEIGHT, HIGHEST_LOG_WEIGHT)
    positive = advantages >= 0
    k = _by_sign(positive, k_pos, k_neg, log_w)
    scale = _by_sign(positive, lambda_pos, lambda_neg, log_w).clamp(min=1e-4)
    return (scale + k * log_w - scale * log_w.exp()).exp().nan_to_num(nan=0.0, posinf=0.0)


def _by_sign(positive: Bool[Tensor, " N"], there: float, elsewhere: float, like: PerToken) -> PerToken:
    """One number where something is positive, the other elsewhere."""
    return torch.where(positive, like.new_tensor(there), like.new_tensor(elsewhere))


# Bounds of VESPO's log w: log 1e-8, and 20 nats above.
LOWEST_LOG_WEIGHT, HIGHEST_LOG_WEIGHT = -18.420680743952367, 20.0


def reinforce(advantages: PerToken, token_logps: PerToken) -> PerToken:
    """The score function's gradient, `-A log p`, which knows no ratio.

    Args:
        advantages: `[N]`.
        token_logps: `[N]` nats, of the policy.

    Returns:
        `[N]`.

    Reference:
        Williams, Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning (1992).

    Example:
        >>> reinforce(torch.tensor([2.0]), torch.tensor([-3.0]))
        tensor([6.])
    """
    return -advantages * token_logps
