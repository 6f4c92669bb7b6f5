"""What is reported of a batch of pairs or lists: TRL's names, and a few more, all from numbers that are there anyway.

| name | mean of | over |
|---|---|---|
| `rewards/chosen`, `rewards/rejected` | beta times the log-ratio of policy and reference | pairs |
| `rewards/margins`, `rewards/accuracies` | their difference; how often it is above 0 | pairs |
| `rewards/margins_std` | standard deviation of the margins; evaluation only | pairs |
| `rewards/margins/1-64_tokens`, … | the same, by the tokens of the longer completion | pairs of that length |
| `logps/chosen`, `logps/rejected` | log-probability of a completion under the policy, in nats | pairs |
| `slopes/chosen`, `slopes/rejected` | derivative of a pair's loss by that log-probability; training only | pairs |
| `kl/k1`, `kl/k3` | `r` and `exp(-r) - 1 + r`, with `r` the log-ratio of a token | completion tokens |
| `logits/chosen`, `logits/rejected` | mean logit over the vocabulary | their tokens |
| `entropy` | entropy of the policy's distribution, in nats | completion tokens |
| `mean_token_accuracy` | whether the token is the policy's most likely one | chosen tokens |

`kl/k1` and `kl/k3` are Schulman's estimators of KL(policy, reference). They are unbiased on what the policy itself has
sampled; on a data set's completions they say how far the policy has moved there.

For a ranked list, chosen is the best completion and rejected stands for the mean of the others; the accuracy is the
share of its ordered pairs that the rewards order alike.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tether.objectives.losses.transforms import EXPONENT_LIMIT
from tether.types import Metrics, PerCompletion, PerExample, PerToken, Scores, Sum

# Tokens of the longer completion at which a bucket ends.
LENGTH_BUCKETS = (64, 256, 1024)


def preference_metrics(
    policy: Scores,
    reference: Scores | None,
    logps: PerCompletion,
    rewards: PerCompletion,
    slopes: PerCompletion | None,
    sizes: Int[Tensor, " B"],
) -> Metrics:
    """Sums and counts of one micro-batch, by name.

    Args:
        policy: scores of K completions.
        reference: scores of the same under the reference; None where there is none, and then no KL.
        logps: `[K]` nats, as the losses took them.
        rewards: `[K]`.
        slopes: `[K]`, derivative of the loss by `logps`; None where there is no gradient.
        sizes: int64 `[B]`, completions of each example.

    Returns:
        Name to `(sum, count)`.
    """
    starts = sizes.cumsum(0) - sizes
    sides = _Sides(starts, sizes, policy.num_completions)
    chosen, rejected = sides.split(rewards)
    margins, accuracies = chosen - rejected, sides.accuracies(rewards)
    found = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": accuracies,
        "rewards/margins": margins,
    }
    if not policy.token_logps.requires_grad:
        # An evaluation makes their standard deviation of it.
        found["rewards/margins_square"] = margins.double().square()
    for name, values in (("logps", logps), ("slopes", slopes)):
        if values is not None:
            found[f"{name}/chosen"], found[f"{name}/rejected"] = sides.split(values)
    metrics = {name: (values.sum(), _count(values)) for name, values in found.items()}
    longest = policy.lengths.new_zeros(len(sizes)).scatter_reduce(0, sides.example, policy.lengths, "amax")
    metrics |= _by_length("rewards/margins", margins, longest)
    metrics |= _by_length("rewards/accuracies", accuracies, longest)
    metrics |= _per_token(policy, sides.is_first[policy.completion_index])
    if reference is not None:
        logratios = (policy.token_logps - reference.token_logps).detach()
        k3 = torch.expm1((-logratios).clamp(max=EXPONENT_LIMIT)) + logratios
        metrics |= {name: (r.sum(), _count(r)) for name, r in (("kl/k1", logratios), ("kl/k3", k3))}
    return metrics


class _Sides:
    """Which completions are the first of their example; 2 an example in the case of pairs."""

    def __init__(self, starts: Int[Tensor, " B"], sizes: Int[Tensor, " B"], completions: int) -> None:
        self._starts, self._others = starts, (sizes - 1).clamp(min=1)
        self.example = torch.repeat_interleave(torch.arange(len(sizes), device=sizes.device), sizes)
        self.is_first = torch.zeros(completions, dtype=torch.bool, device=sizes.device).index_fill(0, starts, True)

    def split(self, values: PerCompletion) -> tuple[PerExample, PerExample]:
        """The first completion's value and the mean of the others': `[B]` each."""
        first = values[self._starts]
        total = values.new_zeros(len(first)).index_add(0, self.example, values.masked_fill(self.is_first, 0.0))
        return first, total / self._others

    def accuracies(self, rewards: PerCompletion) -> PerExample:
        """Share of the ordered pairs of each example that the rewards order alike: `[B]`; a tie is not."""
        place = torch.arange(len(rewards), device=rewards.device)
        ordered = (self.example[:, None] == self.example) & (place[:, None] < place)
        right = ordered & (rewards[:, None] > rewards)
        zeros = rewards.new_zeros(len(self._starts))
        counts = zeros.index_add(0, self.example, ordered.sum(1).to(zeros.dtype))
        return zeros.index_add(0, self.example, right.sum(1).to(zeros.dtype)) / counts.clamp(min=1)


def _by_length(name: str, values: PerExample, lengths: Int[Tensor, " B"]) -> Metrics:
    metrics, low = {}, 0
    for high in (*LENGTH_BUCKETS, None):
        inside = (lengths > low) if high is None else (lengths > low) & (lengths <= high)
        label = f"above_{low}_tokens" if high is None else f"{low + 1}-{high}_tokens"
        metrics[f"{name}/{label}"] = ((values * inside).sum(), inside.sum())
        low = high or low
    return metrics


def _per_token(policy: Scores, of_first: Bool[Tensor, " N"]) -> Metrics:
    metrics = {}
    if policy.mean_logits is not None:
        metrics["logits/chosen"] = _where(policy.mean_logits, of_first)
        metrics["logits/rejected"] = _where(policy.mean_logits, ~of_first)
    if policy.entropy is not None:
        metrics["entropy"] = (policy.entropy.sum(), _count(policy.entropy))
    if policy.top1 is not None:
        metrics["mean_token_accuracy"] = _where(policy.top1.float(), of_first)
    return metrics


def _where(values: PerToken, mask: Bool[Tensor, " N"]) -> Sum:
    return (values * mask).sum(), mask.sum()


def _count(values: Tensor) -> Tensor:
    return torch.tensor(float(len(values)), device=values.device)
