"""Losses of ranked lists: from the numbers of K completions, the best first, to one value per list."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from tether.types import PerExample


def plackett_luce(logratios: Float[Tensor, "B K"], *, beta: float) -> PerExample:
    """DPO for a whole ranking: `-sum_k log(exp(r_k) / sum_{j >= k} exp(r_j))`, with the rewards `r = beta logratios`.

    Args:
        logratios: `[B, K]` nats, the best completion first.
        beta: inverse temperature, per nat; larger keeps the policy closer to the reference.

    Returns:
        `[B]` nats; `log K!` where policy and reference are the same. With K = 2 it is `sigmoid`.

    Reference:
        Rafailov et al., Direct Preference Optimization, eq. 20 (appendix A.3), arXiv:2305.18290.

    Example:
        >>> import torch
        >>> plackett_luce(torch.zeros(1, 3), beta=0.1)
        tensor([1.7918])
    """
    rewards = beta * logratios
    rest = rewards.flip(-1).logcumsumexp(-1).flip(-1)
    return (rest - rewards)[..., :-1].sum(-1)
