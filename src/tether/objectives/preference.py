"""From the scores of a batch of pairs to its losses and what is reported of them."""

from __future__ import annotations

import torch
from torch import Tensor

from tether.objectives.table import OBJECTIVES
from tether.types import LossOutput, Scores


def preference_loss(policy: Scores, reference: Scores, *, loss: str, **options: float) -> LossOutput:
    """Loss of each pair of a batch, with TRL's metrics.

    Args:
        policy: scores of 2B completions, chosen and rejected in turn; `entropy`, `top1` and `mean_logits` are reported
            where they are there.
        reference: scores of the same completions under the reference.
        loss: a name in the table of objectives.
        options: the objective's own, such as `beta`.

    Returns:
        `per_example [B]` and the metrics.
    """
    logratios = policy.logps - reference.logps
    chosen, rejected = logratios[0::2], logratios[1::2]
    per_example = OBJECTIVES[loss].function(chosen, rejected, **options)
    with torch.no_grad():
        metrics = _pair_metrics(policy, options.get("beta", 1.0) * logratios.detach())
    return LossOutput(per_example, metrics)


def _pair_metrics(policy: Scores, rewards: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    chosen, rejected = rewards[0::2], rewards[1::2]
    logps = policy.logps.detach()
    per_pair = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": (chosen > rejected).float(),
        "rewards/margins": chosen - rejected,
        "logps/chosen": logps[0::2],
        "logps/rejected": logps[1::2],
    }
    is_chosen = policy.completion_index % 2 == 0
    per_token = {}
    if policy.mean_logits is not None:
        per_token["logits/chosen"] = policy.mean_logits[is_chosen]
        per_token["logits/rejected"] = policy.mean_logits[~is_chosen]
    if policy.entropy is not None:
        per_token["entropy"] = policy.entropy
    if policy.top1 is not None:
        per_token["mean_token_accuracy"] = policy.top1[is_chosen].float()
    return {
        name: (values.sum(), torch.tensor(float(len(values)), device=values.device))
        for name, values in {**per_pair, **per_token}.items()
    }
