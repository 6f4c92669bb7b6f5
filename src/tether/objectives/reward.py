"""The loss of a reward model: from the scores of pairs to one value per pair."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tether.types import LossOutput


def bradley_terry(chosen: Tensor, rejected: Tensor, *, margin: Tensor | None = None, center: float = 0.0) -> Tensor:
    """The Bradley-Terry loss, `-log s(chosen - rejected - margin) + center (chosen + rejected)^2`.

    Args:
        chosen: `[B]`, reward of the chosen completion.
        rejected: `[B]`, of the rejected one.
        margin: `[B]`, by how much the chosen reward should at least be larger; None for 0.
        center: weight of a term that draws the mean of the rewards to 0.

    Returns:
        `[B]` nats; `log 2` where the difference is the margin and there is no `center`.

    Reference:
        Ouyang et al., Training language models to follow instructions, eq. 1, arXiv:2203.02155; margin: Touvron et al.,
        Llama 2, eq. 2, arXiv:2307.09288; center: Eisenstein et al., Helping or Herding, eq. 2, arXiv:2312.09244.

    Example:
        >>> bradley_terry(torch.tensor([1.0]), torch.tensor([1.0]), center=0.5)
        tensor([2.6931])
    """
    difference = chosen - rejected if margin is None else chosen - rejected - margin
    loss = -F.logsigmoid(difference)
    return loss if not center else loss + center * (chosen + rejected) ** 2


def reward_loss(
    rewards: Tensor, *, margin: Tensor | None = None, weight: Tensor | None = None, center: float = 0.0
) -> LossOutput:
    """Loss of each pair of a batch, with TRL's metrics.

    Args:
        rewards: `[2B]`, those of the chosen and the rejected completion in turn.
        margin: `[B]`, see `bradley_terry`; also `center`.
        weight: `[B]`, factor of the loss of each pair; None for 1.

    Returns:
        `per_example [B]` and the metrics.
    """
    chosen, rejected = rewards[0::2], rewards[1::2]
    per_example = bradley_terry(chosen, rejected, margin=margin, center=center)
    per_example = per_example if weight is None else weight * per_example
    with torch.no_grad():
        pairs, completions = (torch.tensor(float(len(part)), device=rewards.device) for part in (chosen, rewards))
        metrics = {
            "accuracy": ((chosen > rejected).float().sum(), pairs),
            "margin": ((chosen - rejected).sum(), pairs),
            "mean_reward": (rewards.detach().sum(), completions),
            "min_reward": (rewards.detach().min(), completions),
            "max_reward": (rewards.detach().max(), completions),
        }
    return LossOutput(per_example, metrics)
