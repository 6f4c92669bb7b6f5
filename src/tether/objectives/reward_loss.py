"""From the rewards of a batch of pairs to their losses."""

from __future__ import annotations

import torch

from tether.objectives.losses.reward import bradley_terry
from tether.types import LossOutput, LossTerm, PerCompletion, PerExample


def reward_loss(
    rewards: PerCompletion,
    *,
    margins: PerExample | None = None,
    weights: PerExample | None = None,
    center_rewards_coefficient: float = 0.0,
) -> LossOutput:
    """Loss of each pair of a batch, with TRL's metrics.

    Args:
        rewards: `[2B]`, those of the chosen and the rejected completion in turn.
        margins: `[B]`, see `bradley_terry`; also `center_rewards_coefficient`.
        weights: `[B]`, factor of the loss of each pair; None for 1.

    Returns:
        A term over pairs `[B]`, and the metrics.
    """
    chosen, rejected = rewards[0::2], rewards[1::2]
    per_example = bradley_terry(chosen, rejected, margins, center_rewards_coefficient=center_rewards_coefficient)
    per_example = per_example if weights is None else weights * per_example
    with torch.no_grad():
        pairs, completions = (torch.tensor(float(len(part)), device=rewards.device) for part in (chosen, rewards))
        metrics = {
            "accuracy": ((chosen > rejected).float().sum(), pairs),
            "margin": ((chosen - rejected).sum(), pairs),
            "mean_reward": (rewards.detach().sum(), completions),
            "min_reward": (rewards.detach().min(), completions),
            "max_reward": (rewards.detach().max(), completions),
        }
    return LossOutput((LossTerm(per_example),), metrics)
