"""The losses of supervised fine-tuning: from token log-probabilities to one value per token."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tether.types import LossOutput, LossTerm, Scores


def nll(token_logps: Tensor) -> Tensor:
    """Negative log-likelihood, `-log p` of each token.

    Args:
        token_logps: `[N]` nats.

    Returns:
        `[N]` nats.

    Reference:
        Ouyang et al., Training language models to follow instructions with human feedback, section 3.5,
        arXiv:2203.02155.

    Example:
        >>> nll(torch.tensor([-0.5, -2.0]))
        tensor([0.5000, 2.0000])
    """
    return -token_logps


def dft(token_logps: Tensor) -> Tensor:
    """Dynamic fine-tuning, `-p log p` of each token with a constant p: rare tokens no longer dominate the gradient.

    Args:
        token_logps: `[N]` nats.

    Returns:
        `[N]`.

    Reference:
        Wu et al., On the Generalization of SFT: a Reinforcement Learning Perspective with Reward Rectification, eq. 9,
        arXiv:2508.05629.
    """
    return -token_logps * token_logps.detach().exp()


SUPERVISED: dict[str, Callable[[Tensor], Tensor]] = {"nll": nll, "dft": dft}


def supervised_loss(policy: Scores, *, loss: str) -> LossOutput:
    """Loss of each scored token of a batch, with TRL's metrics.

    Args:
        policy: scores of whatever is imitated; `entropy` and `top1` are reported where they are there.
        loss: a name in `SUPERVISED`.

    Returns:
        A term over tokens `[N]`, and the metrics.
    """
    per_token = SUPERVISED[loss](policy.token_logps)
    count = torch.tensor(float(len(per_token)), device=per_token.device)
    metrics = {}
    if policy.entropy is not None:
        metrics["entropy"] = (policy.entropy.sum(), count)
    if policy.top1 is not None:
        metrics["mean_token_accuracy"] = (policy.top1.float().sum(), count)
    return LossOutput((LossTerm(per_token, "tokens"),), metrics)
