"""Losses of pairs: from two log-ratios to one value per pair. No reduction, no configuration, no device."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def sigmoid(
    chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> Tensor:
    """The DPO loss, `-(1 - e) log s(d) - e log s(-d)` with `d = beta (chosen - rejected)` and s the logistic function.

    Args:
        chosen_logratios: `[B]` nats, log-probability of the chosen completion under the policy minus under the
            reference.
        rejected_logratios: `[B]` nats, the same of the rejected completion.
        beta: inverse temperature, per nat; larger keeps the policy closer to the reference.
        label_smoothing: probability e in [0, 0.5) that a label is wrong (conservative DPO).

    Returns:
        `[B]` nats; `log 2` at zero margin.

    Reference:
        Rafailov et al., Direct Preference Optimization, eq. 7, arXiv:2305.18290; label smoothing: Mitchell, A note on
        DPO with noisy preferences, eq. 3 (2023).

    Example:
        >>> import torch
        >>> sigmoid(torch.tensor([2.0]), torch.tensor([2.0]))
        tensor([0.6931])
    """
    logits = beta * (chosen_logratios - rejected_logratios)
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)
