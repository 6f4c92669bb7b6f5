"""The loss of a reward model: from the scores of pairs to one value per pair."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tether.types import LossOutput, LossTerm


def bradley_terry(
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    margins: Tensor | None = None,
    *,
    center_rewards_coefficient: float = 0.0,
) -> Tensor:
    """The Bradley-Terry loss, `-log s(chosen - rejected - margin) + c (chosen + rejected)^2`.

    Args:
        chosen_rewards: `[B]`.
        rejected_rewards: `[B]`.
        margins: `[B]`, by how much the chosen reward should be larger, from the column `margin`; None for 0.
        center_rewards_coefficient: c, weight of a term that draws the mean of the rewards to 0.

    Returns:
        `[B]` nats; `log 2` where the difference is the margin and c is 0.

    Reference:
        Ouyang et al., Training language models to follow instructions, eq. 1, arXiv:2203.02155; margin: Touvron et al.,
        Llama 2, eq. 2, arXiv:2307.09288; center: Eisenstein et al., Helping or Herding, eq. 2, arXiv:2312.09244.

    Example:
        >>> bradley_terry(torch.tensor([1.0]), torch.tensor([1.0]), center_rewards_coefficient=0.5)
        tensor([2.6931])
    """
    difference = chosen_rewards - rejected_rewards
    loss = -F.logsigmoid(difference if margins is None else difference - margins)
    c = center_rewards_coefficient
    return loss + c * (chosen_rewards + rejected_rewards) ** 2 if c else loss


def reward_loss(
    rewards: Tensor,
    *,
    margins: Tensor | None = None,
    weights: Tensor | None = None,
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
