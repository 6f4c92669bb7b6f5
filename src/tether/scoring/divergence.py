"""KL between the distributions of two models at each token, from their hidden states, in chunks.

A log-probability needs one number of a distribution; this needs all of both. The reference's `[N, vocabulary]` never
exists as a whole: what is kept of its pass are the hidden states before its head, and each chunk is projected by both
heads.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tether.errors import ScoringError
from tether.scoring.head import CHUNK, Head
from tether.types import PerToken, Scores


def with_frozen_head(scores: Scores) -> Scores:
    """Scores whose head stays as it is now: a reference's, whose weights may be exchanged when its pass is over.

    A frozen head is used as it is; of one that trains, weight and bias are copied.

    Raises:
        ScoringError: the head is not a plain linear layer (an adapter on it, quantised), so that turning the adapter
            on again would change it.
    """
    head: Head = scores.head.__self__  # type: ignore[union-attr]
    return replace(scores, head=frozen_head(head).logits)


def frozen_head(head: Head) -> Head:
    """The same head, which no longer changes; see `with_frozen_head`."""
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
    return replace(head, module=copy)


def token_divergence(reference: Scores, policy: Scores, *, chunk: int = CHUNK) -> PerToken:
    """KL(reference, policy) of the next-token distribution at each scored position.

    Costs a projection by each head, and both once more in the backward; memory is a few times
    `chunk * vocabulary * 4` bytes.

    Args:
        reference: scored with the output `hidden`, its head frozen; no gradient.
        policy: scored with the output `hidden`.
        chunk: tokens whose logits exist at once.

    Returns:
        `[N]` nats, at least 0, float32 or better; differentiable in the policy's hidden states and its head's trainable
        tensors.
    """
    if reference.hidden is None or policy.hidden is None:
        raise ScoringError("token_divergence() needs both scored with outputs=('hidden',).")
    states = reference.hidden.to(policy.hidden.device)
    parts = []
    for theirs, ours in zip(states.split(chunk), policy.hidden.split(chunk), strict=True):
        arguments = (reference.head, theirs, policy.head, ours)
        if torch.is_grad_enabled():
            parts.append(checkpoint(_divergence, *arguments, use_reentrant=False))
        else:
            parts.append(_divergence(*arguments))
    return torch.cat(parts)


def _divergence(
    reference_head: Any, reference: Float[Tensor, "M hidden"], policy_head: Any, policy: Float[Tensor, "M hidden_size"]
) -> Float[Tensor, " M"]:
    with torch.no_grad():
        expected = reference_head(reference).log_softmax(-1)
    found = policy_head(policy).log_softmax(-1)
    return (expected.exp() * (expected - found)).sum(-1)
