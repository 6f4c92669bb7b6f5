"""Estimates of the KL divergence of the policy from its reference at sampled tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tether.objectives.losses.transforms import EXPONENT_LIMIT
from tether.types import PerToken


def k1(policy: PerToken, reference: PerToken) -> PerToken:
    """`policy - reference`: its mean is the divergence; a single one may be negative."""
    return policy - reference


def k2(policy: PerToken, reference: PerToken) -> PerToken:
    """`(policy - reference)^2 / 2`: its gradient on tokens of the policy is that of the divergence."""
    return (policy - reference).square() / 2


def k3(policy: PerToken, reference: PerToken) -> PerToken:
    """`exp(x) - 1 - x` with `x = reference - policy`: never negative; exponents are clipped at 40.

    >>> k3(torch.tensor([-1.0]), torch.tensor([-2.0]))
    tensor([0.3679])
    """
    x = reference - policy
    return torch.expm1(x.clamp(max=EXPONENT_LIMIT)) - x


# All in nats per token; Schulman, Approximating KL Divergence (2020).
KL: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}
