"""KL between the distributions of two models at each token, from their hidden states, in chunks.

A log-probability needs one number of a distribution; this needs all of both. The reference's `[N, vocabulary]` never
exists as a whole: what is kept of its pass are the hidden states before its head, and each chunk is projected by both
heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tether.errors import ScoringError
from tether.scoring.head import CHUNK, Head


def frozen_head(head: Head) -> Head:
    """A head that stays as it is now: a reference's, whose weights may be exchanged when its pass is over.

    A frozen head is used as it is; of one that trains, weight and bias are copied.

    Raises:
        ScoringError: the head is not a plain linear layer (an adapter on it, quantised), so that turning the adapter
            on again would change it.
    """
    if not head.is_plain:
        raise ScoringError(
            f"The head is a {type(head.module).__name__} and no plain linear layer; the reference's distribution "
            "cannot be kept apart from the policy's. Leave the head out of the adapter, or take a loss without a KL "
            "per token."
        )
    module: Any = head.module
    if not any(parameter.requires_grad for parameter in module.parameters()):
        return head
    copy = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
    copy.weight = nn.Parameter(module.weight.detach().clone(), requires_grad=False)
    if module.bias is not None:
        copy.bias = nn.Parameter(module.bias.detach().clone(), requires_grad=False)
    return Head(copy, head.scale, head.softcap)


def token_divergence(
    reference_hidden: Tensor, reference_head: Head, policy_hidden: Tensor, policy_head: Head, *, chunk: int = CHUNK
) -> Tensor:
    """KL(reference, policy) of the next-token distribution at each scored position.

    Costs a projection by each head, and both once more in the backward; memory is a few times
    `chunk * vocabulary * 4` bytes.

    Args:
        reference_hidden: `[N, hidden_size]`, before the reference's head; no gradient.
        reference_head: see `frozen_head`.
        policy_hidden: `[N, hidden_size]`, before the policy's head.
        policy_head: the policy's.
        chunk: tokens whose logits exist at once.

    Returns:
        `[N]` nats, at least 0, float32 or better; differentiable in the policy's hidden states and its head's trainable
        tensors.
    """
    parts = []
    for reference, policy in zip(reference_hidden.split(chunk), policy_hidden.split(chunk), strict=True):
        arguments = (reference_head, reference, policy_head, policy)
        if torch.is_grad_enabled():
            parts.append(checkpoint(_divergence, *arguments, use_reentrant=False))
        else:
            parts.append(_divergence(*arguments))
    return torch.cat(parts)


def _divergence(reference_head: Head, reference: Tensor, policy_head: Head, policy: Tensor) -> Tensor:
    with torch.no_grad():
        expected = reference_head.finish(reference_head.module(reference)).log_softmax(-1)
    found = policy_head.finish(policy_head.module(policy)).log_softmax(-1)
    return (expected.exp() * (expected - found)).sum(-1)
