"""Between what the engine sampled from and what the trainer computes: weights of importance, and what they cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from tether.objectives.losses.policy_gradient import ratio
from tether.types import PerCompletion, PerToken, Scores

Mode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
MODES: tuple[Mode, ...] = get_args(Mode)


@dataclass(frozen=True)
class Correction:
    """How the difference of engine and trainer is corrected for.

    Args:
        mode: weights of tokens or of whole completions (`sequence`); outside the bounds they are cut to them
            (`truncate`) or set to 0 (`mask`).
        low: lower bound; None: none.
        high: upper bound; None: none.
    """

    mode: Mode = "sequence_mask"
    low: float | None = None
    high: float | None = 3.0

    @property
    def by_sequence(self) -> bool:
        """Whether a completion has one weight."""
        return self.mode.startswith("sequence")


@dataclass(frozen=True)
class Corrected:
    """Weights of importance.

    Args:
        factors: `[N]`, or `[K]` by completion, after the bounds.
        raw: the same before them.
        differences: `[N]` nats, proximal minus rollout; NaN where the engine reported none.
    """

    factors: Float[Tensor, " F"]
    raw: Float[Tensor, " F"]
    differences: PerToken


def corrected(
    proximal: PerToken, rollout: PerToken, mask: PerToken, scores: Scores, correction: Correction
) -> Corrected:
    """Weights of importance of the policy at the start of the updates over what the engine sampled from.

    Args:
        proximal: `[N]` nats, of the policy as it began these updates.
        rollout: `[N]` nats, as the engine reported them; NaN for a token that it did not score, which is not corrected.
        mask: float `[N]`, 1 for tokens that are trained on.
        scores: any of the batch, for which token belongs to which completion.
        correction: mode and bounds.

    Reference:
        Yao et al., Your Efficient RL Framework Secretly Brings You Off-Policy RL Training (2025); modes as in TRL 1.16.
    """
    differences = proximal - rollout
    logs = (differences * mask).nan_to_num(nan=0.0)
    raw = ratio(scores.sum_by_completion(logs) if correction.by_sequence else logs)
    low = -torch.inf if correction.low is None else correction.low
    high = torch.inf if correction.high is None else correction.high
    inside = (raw >= low) & (raw <= high)
    factors = torch.where(inside, raw, 0.0) if correction.mode.endswith("mask") else raw.clamp(low, high)
    return Corrected(factors, raw, differences)


def kept_on_policy(
    advantages: PerCompletion, policy: PerToken, rollout: PerToken, mask: PerToken, scores: Scores, threshold: float
) -> PerCompletion:
    """Float `[K]`, 0 for completions that are left out: a negative advantage, and too far from where they were sampled.

    Args:
        advantages: `[K]`.
        policy: `[N]` nats, the policy's.
        rollout: `[N]` nats, of what they were sampled from.
        mask: float `[N]`, 1 for tokens that are trained on.
        scores: any of the batch, for which token belongs to which completion.
        threshold: largest mean of `rollout - policy` per token.

    Reference:
        DeepSeek-V3.2, off-policy sequence masking, arXiv:2512.02556.
    """
    drift = ((rollout - policy.detach()) * mask).nan_to_num(nan=0.0)
    mean = scores.sum_by_completion(drift) / scores.sum_by_completion(mask).clamp(min=1)
    return ((advantages >= 0) | (mean <= threshold)).float()
