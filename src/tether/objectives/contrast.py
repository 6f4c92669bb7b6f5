"""Reference-free trainers' losses: a contrast of pairs, and the likelihood of the chosen text averaged over tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from tether.objectives.losses.reference_free import log_odds
from tether.objectives.losses.transforms import EXPONENT_LIMIT
from tether.objectives.metrics import preference_metrics
from tether.objectives.registry import OBJECTIVES
from tether.types import LossOutput, LossTerm, PerExample, Scores

# The losses of CPO and ORPO by name.
CONTRASTS = {**OBJECTIVES["cpo"], **OBJECTIVES["orpo"]}


def shaped_reward(logps: Float[Tensor, "*shape"], alpha: float) -> Float[Tensor, "*shape"]:
    """AlphaPO's reward of a log-probability, `(1 - p^-alpha) / alpha`; `log p` at alpha 0.

    Args:
        logps: any shape, nats.
        alpha: shape; above 0 the reward of unlikely completions falls faster.

    Returns:
        The same shape. Exponents are clipped at 40, where gradients end.

    Reference:
        Gupta et al., AlphaPO: Reward Shape Matters for LLM Alignment, eq. 4, arXiv:2501.03884.

    Example:
        >>> shaped_reward(torch.tensor([-1.0]), 0.5)
        tensor([-1.2974])
    """
    return -torch.expm1((-alpha * logps).clamp(max=EXPONENT_LIMIT)) / alpha if alpha else logps


def contrast_loss(
    policy: Scores,
    *,
    loss: str,
    pairs: int,
    likelihood: float = 1.0,
    alpha: float = 0.0,
    values: Mapping[str, PerExample] | None = None,
    **options: float,
) -> LossOutput:
    """Losses of a batch of pairs without a reference, with TRL's metrics.

    Args:
        policy: scores of the 2B completions of the pairs, chosen and rejected in turn; and, where the prompts' tokens
            belong to the likelihood, of the B prompts after them (`tether.scoring.with_prompts`).
        loss: a name in `CONTRASTS`.
        pairs: B.
        likelihood: weight of the negative log-likelihood of the chosen texts; 0 leaves it out.
        alpha: see `shaped_reward`.
        values: `[B]` each: `weight` multiplies the contrast of a pair.
        options: the loss's own.

    Returns:
        A term over pairs `[B]`, one over the tokens of the chosen texts `[M]`, and the metrics.
    """
    row = CONTRASTS[loss]
    judged = _first(policy, 2 * pairs)
    logps = judged.mean_logps if row.per_token else judged.logps
    rewards = shaped_reward(logps, alpha)
    per_example = row(rewards[0::2], rewards[1::2], **options)
    if values and "weight" in values:
        per_example = per_example * values["weight"]
    index = policy.completion_index
    tokens = -policy.token_logps[(index % 2 == 0) | (index >= 2 * pairs)] if likelihood else None
    with torch.no_grad():
        sizes = torch.full((pairs,), 2, device=index.device)
        metrics = preference_metrics(
            judged, None, logps.detach(), ({**row.defaults, **options}["beta"] or 0.0) * rewards.detach(), None, sizes
        )
        count = torch.tensor(float(pairs), device=index.device)
        if tokens is not None:
            metrics["nll_loss"] = (tokens.detach().sum(), torch.tensor(float(len(tokens)), device=index.device))
        if row.algorithm == "orpo":
            odds = log_odds(rewards.detach())
            lead = odds[0::2] - odds[1::2]
            metrics["log_odds_chosen"] = (lead.sum(), count)
            metrics["log_odds_ratio"] = (torch.nn.functional.logsigmoid(lead).sum(), count)
    terms = (LossTerm(per_example), *([] if tokens is None else [LossTerm(likelihood * tokens, "tokens")]))
    return LossOutput(terms, metrics)


def _first(scores: Scores, completions: int) -> Scores:
    """Scores of the first completions alone."""
    tokens = scores.completion_index < completions
    parts = {
        name: value[tokens]
        for name, value in vars(scores).items()
        if isinstance(value, Tensor) and len(value) == len(tokens)
    }
    return replace(scores, num_completions=completions, **parts)
