"""The losses of supervised fine-tuning: from token log-probabilities to one value per token."""

from __future__ import annotations

from tether.types import PerToken


def nll(token_logps: PerToken) -> PerToken:
    """Negative log-likelihood, `-log p` of each token.

    Args:
        token_logps: `[N]` nats.

    Returns:
        `[N]` nats.

    Reference:
        Ouyang et al., Training language models to follow instructions with human feedback, section 3.5,
        arXiv:2203.02155.

    Example:
        >>> import torch
        >>> nll(torch.tensor([-0.5, -2.0]))
        tensor([0.5000, 2.0000])
    """
    return -token_logps


def dft(token_logps: PerToken) -> PerToken:
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
