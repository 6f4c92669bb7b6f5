"""The loss of a reward model: from the rewards of a pair to one value per pair."""

from __future__ import annotations

import torch.nn.functional as F

from tether.types import PerExample


def bradley_terry(
    chosen_rewards: PerExample,
    rejected_rewards: PerExample,
    margins: PerExample | None = None,
    *,
    center_rewards_coefficient: float | None,
) -> PerExample:
    """The Bradley-Terry loss, `-log s(chosen - rejected - margin) + c (chosen + rejected)^2`.

    Args:
        chosen_rewards: `[B]`.
        rejected_rewards: `[B]`.
        margins: `[B]`, by how much the chosen reward should be larger, from the column `margin`; None for 0.
        center_rewards_coefficient: c, weight of a term that draws the mean of the rewards to 0; None: 0.

    Returns:
        `[B]` nats; `log 2` where the difference is the margin and c is 0.

    Reference:
        Ouyang et al., Training language models to follow instructions, eq. 1, arXiv:2203.02155; margin: Touvron et al.,
        Llama 2, eq. 2, arXiv:2307.09288; center: Eisenstein et al., Helping or Herding, eq. 2, arXiv:2312.09244.

    Example:
        >>> import torch
        >>> bradley_terry(torch.tensor([1.0]), torch.tensor([1.0]), center_rewards_coefficient=0.5)
        tensor([2.6931])
    """
    difference = chosen_rewards - rejected_rewards
    loss = -F.logsigmoid(difference if margins is None else difference - margins)
    c = center_rewards_coefficient
    return loss + c * (chosen_rewards + rejected_rewards) ** 2 if c else loss
