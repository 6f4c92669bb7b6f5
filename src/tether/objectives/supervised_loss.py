"""From the scores of whatever is imitated to a loss of each token."""

from __future__ import annotations

import torch

from tether.objectives.registry import OBJECTIVES
from tether.types import LossOutput, LossTerm, Scores


def supervised_loss(policy: Scores, *, loss: str) -> LossOutput:
    """Loss of each scored token of a batch, with TRL's metrics.

    Args:
        policy: scores of whatever is imitated; `entropy` and `top1` are reported where they are there.
        loss: a loss of the algorithm `sft`.

    Returns:
        A term over tokens `[N]`, and the metrics.
    """
    per_token = OBJECTIVES["sft"][loss](policy.token_logps)
    count = torch.tensor(float(len(per_token)), device=per_token.device)
    metrics = {}
    if policy.entropy is not None:
        metrics["entropy"] = (policy.entropy.sum(), count)
    if policy.top1 is not None:
        metrics["mean_token_accuracy"] = (policy.top1.float().sum(), count)
    return LossOutput((LossTerm(per_token, "tokens"),), metrics)
