"""From the scores of sampled completions and their advantages to the loss of a policy gradient, with TRL's metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tether.objectives.losses.policy_gradient import HIGHEST_LOG_WEIGHT, LOWEST_LOG_WEIGHT, ratio, vespo_phi
from tether.objectives.objective import Level, Objective
from tether.objectives.online.correction import Corrected, Correction, corrected, kept_on_policy
from tether.objectives.online.kl import KL
from tether.types import LossOutput, LossTerm, Metrics, PerCompletion, PerToken, Scores, Sum


@dataclass(frozen=True)
class PolicyGradient:
    """What is done to sampled completions.

    Args:
        row: the surrogate, and over what its losses are averaged.
        options: the surrogate's.
        level: of ratios; None: the row's own.
        beta: weight of the KL divergence in the loss; 0 where there is none, or where it is a part of the reward.
        kl: its estimate, in the loss `k2` or `k3`, and in what is reported.
        kl_ratio: whether the estimate is multiplied by the ratio, so that its gradient is right off policy.
        correction: of the difference between engine and trainer; None: none.
        off_policy_threshold: see `kept_on_policy`; None: none is left out.
        top_entropy: share of a step's tokens, those of the highest entropy, that have a policy gradient.
        longest: the most tokens that a completion may have.
    """

    row: Objective
    options: Mapping[str, float | None] = field(default_factory=dict)
    level: Literal["token", "sequence"] | None = None
    beta: float = 0.0
    kl: str = "k3"
    kl_ratio: bool = True
    correction: Correction | None = None
    off_policy_threshold: float | None = None
    top_entropy: float = 1.0
    longest: int = 1

    @property
    def of_ratio(self) -> Level:
        """The level of its ratios."""
        return self.level or self.row.level


@dataclass(frozen=True)
class Sampled:
    """What is constant about the completions of a micro-batch.

    Args:
        advantages: `[K]`.
        weights: `[K]`, 0 for completions that are left out, else 1.
        proximal: `[N]` nats, of the policy as it began the updates of this rollout; None: as it is now.
        rollout: `[N]` nats, as the engine reported them; None: the same as `proximal`.
        reference: `[N]` nats; None where there is none.
    """

    advantages: PerCompletion
    weights: PerCompletion
    proximal: PerToken | None = None
    rollout: PerToken | None = None
    reference: PerToken | None = None


@dataclass(frozen=True)
class HighEntropy:
    """Which tokens have the highest entropy, of all that are trained on together.

    Args:
        floor: scalar, nats; tokens of less have no policy gradient.
        share: scalar, of the tokens those that have one.

    Example:
        >>> HighEntropy.among(torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5]), 0.4)
        HighEntropy(floor=tensor(0.3400), share=tensor(0.4000))
    """

    floor: Tensor
    share: Tensor

    @classmethod
    def among(cls, entropies: Tensor, share: float) -> HighEntropy:
        """The highest `share` of `entropies [M]` nats, as `torch.quantile` has it; of none, none.

        Reference:
            Wang et al., Beyond the 80/20 Rule, arXiv:2506.01939.
        """
        if not len(entropies):
            return cls(entropies.new_tensor(torch.inf), entropies.new_tensor(1.0))
        # The token at the floor itself must not be lost to the rounding of another pass.
        floor = torch.quantile(entropies, 1 - share) - 1e-6
        return cls(floor, (entropies >= floor).to(entropies.dtype).mean())


def policy_gradient_loss(
    policy: Scores,
    sampled: Sampled,
    objective: PolicyGradient,
    *,
    high: HighEntropy | None = None,
    bonus: float | None = None,
) -> LossOutput:
    """Loss of the sampled completions of a batch, with TRL's metrics.

    Args:
        policy: scores of the K completions at the temperature that they were sampled at; `entropy` is reported where it
            is there.
        sampled: what is constant.
        objective: what is done to it.
        high: the tokens of the step that have a policy gradient; None: they are chosen among those of this batch.
        bonus: what the mean entropy of the tokens that have a policy gradient is multiplied by and subtracted; None:
            the entropy is no part of the loss.

    Returns:
        A term over tokens or completions, with a bonus one more over tokens, and the metrics.
    """
    index, mask = policy.completion_index, sampled.weights[policy.completion_index]
    advantages = sampled.advantages[index]
    proximal = policy.token_logps.detach() if sampled.proximal is None else sampled.proximal
    differences = policy.token_logps - proximal
    log_ratios = _at_level(differences, mask, policy, objective.of_ratio)
    found = None
    if objective.correction is not None and sampled.rollout is not None:
        found = corrected(proximal, sampled.rollout, mask, policy, objective.correction)
    numbers = {"log_ratios": log_ratios, "advantages": advantages, "token_logps": policy.token_logps}
    metrics = _metrics(policy, sampled, objective, log_ratios.detach(), mask)
    if objective.row.takes("log_weights"):
        numbers["log_weights"] = _log_weights(differences, found, mask, policy)
        metrics["vespo/phi_seq_mean"] = _mean_phi(numbers["log_weights"], sampled, objective, policy)
    losses = objective.row(*(numbers[one.quantity] for one in objective.row.inputs), **objective.options)
    if objective.off_policy_threshold is not None:
        losses = losses * _kept(policy, sampled, proximal, mask, objective.off_policy_threshold)[index]
    chosen = mask
    if objective.top_entropy < 1:
        high = high or HighEntropy.among(_entropy(policy).detach()[mask > 0], objective.top_entropy)
        chosen = mask * (_entropy(policy) >= high.floor).to(mask.dtype)
        losses = losses * chosen
        metrics["entropy/high"] = _mean(_entropy(policy).detach(), chosen)
    if found is not None and not objective.row.takes("log_weights"):
        losses = losses * (found.factors[index] if len(found.factors) == policy.num_completions else found.factors)
    if sampled.reference is not None:
        estimate = _divergence(policy, sampled.reference, objective, log_ratios)
        losses = losses + objective.beta * estimate if objective.beta else losses
        metrics["kl"] = _mean(estimate.detach(), mask)
        metrics["kl/k1"] = _mean((policy.token_logps - sampled.reference).detach(), mask)
    if found is not None:
        metrics |= _correction_metrics(found, mask, sampled.weights)
    term = _term(losses * mask, mask, policy, objective)
    if bonus is None:
        return LossOutput((term,), metrics)
    count = mask.sum() if term.over == "tokens" else mask.new_tensor(float(len(term.values)))
    metrics["policy_loss"] = term.values.detach().sum(), count
    return LossOutput((term, _bonus(policy, chosen, bonus, high)), metrics)


def _bonus(policy: Scores, chosen: PerToken, bonus: float, high: HighEntropy | None) -> LossTerm:
    """A mean over the chosen tokens of a step, where terms are divided by all of its trained tokens."""
    return LossTerm(-bonus * _entropy(policy) * chosen / (1.0 if high is None else high.share), "tokens")


def _divergence(policy: Scores, reference: PerToken, objective: PolicyGradient, log_ratios: PerToken) -> PerToken:
    """The estimate of the KL divergence at each token, times the ratio where its gradient is to be right off policy."""
    estimate = KL[objective.kl](policy.token_logps, reference)
    return estimate * ratio(log_ratios) if objective.kl_ratio and objective.beta else estimate


def _kept(policy: Scores, sampled: Sampled, proximal: PerToken, mask: PerToken, threshold: float) -> PerCompletion:
    origin = proximal if sampled.rollout is None else sampled.rollout
    return kept_on_policy(sampled.advantages, policy.token_logps, origin, mask, policy, threshold)


def _at_level(differences: PerToken, mask: PerToken, scores: Scores, level: Level) -> PerToken:
    """Log-ratios `[N]`: of each token, or of its completion at each of its tokens."""
    if level == "token":
        return differences
    total = scores.sum_by_completion(differences * mask)
    if level == "sequence":
        total = total / scores.sum_by_completion(mask).clamp(min=1)
    return total[scores.completion_index]


def _log_weights(differences: PerToken, found: Corrected | None, mask: PerToken, scores: Scores) -> PerToken:
    total = scores.sum_by_completion(differences.detach().clamp(-HIGHEST_LOG_WEIGHT, HIGHEST_LOG_WEIGHT) * mask)
    if found is not None:
        logs = found.factors.log().clamp(LOWEST_LOG_WEIGHT, HIGHEST_LOG_WEIGHT)
        total = total + (logs if len(logs) == len(total) else scores.sum_by_completion(logs * mask))
    return total[scores.completion_index]


def _mean_phi(log_weights: PerToken, sampled: Sampled, objective: PolicyGradient, scores: Scores) -> Sum:
    """VESPO's weight, a mean over completions."""
    options = {**objective.row.defaults, **objective.options}
    places = (scores.lengths.cumsum(0) - scores.lengths).clamp(max=len(log_weights) - 1)
    by_name = {name: options[f"vespo_{name}"] or 0.0 for name in ("k_pos", "lambda_pos", "k_neg", "lambda_neg")}
    return _mean(vespo_phi(log_weights[places], sampled.advantages, **by_name), sampled.weights)


def _entropy(policy: Scores) -> PerToken:
    if policy.entropy is None:
        raise ValueError('The entropy is asked for; score with outputs=("entropy",) or ("entropy_gradient",).')
    return policy.entropy


def _term(losses: PerToken, mask: PerToken, scores: Scores, objective: PolicyGradient) -> LossTerm:
    averaged = objective.row.averaged
    if averaged == "tokens":
        return LossTerm(losses, "tokens")
    total = scores.sum_by_completion(losses)
    if averaged == "completions":
        total = total / scores.sum_by_completion(mask).clamp(min=1)
    elif averaged == "longest":
        total = total / objective.longest
    return LossTerm(total, "completions")


def _metrics(
    policy: Scores, sampled: Sampled, objective: PolicyGradient, log_ratios: PerToken, mask: PerToken
) -> Metrics:
    metrics: Metrics = {}
    if policy.entropy is not None:
        metrics["entropy"] = _mean(policy.entropy.detach(), mask)
    options, advantages = {**objective.row.defaults, **objective.options}, sampled.advantages[policy.completion_index]
    r = ratio(log_ratios)
    if "epsilon" in options:
        low = options["epsilon"] or 0.0
        high = low if options["epsilon_high"] is None else options["epsilon_high"]
        r = r if options["delta"] is None else r.clamp(max=options["delta"])
        below, above = (r < 1 - low) & (advantages < 0), (r > 1 + high) & (advantages > 0)
        for name, clipped, extreme in (
            ("low", below, "low_min"),
            ("high", above, "high_max"),
            ("region", below | above, ""),
        ):
            each = _by_completion(clipped.float(), mask, policy)
            by_token = objective.of_ratio == "token"
            metrics[f"clip_ratio/{name}_mean"] = (
                _mean(clipped.float(), mask) if by_token else _mean(each, sampled.weights)
            )
            real = each[sampled.weights > 0]
            if extreme and len(real):
                metrics[f"clip_ratio/{extreme}"] = (
                    real.amin() if extreme == "low_min" else real.amax(),
                    mask.new_ones(()),
                )
    elif (largest := options.get("epsilon_high")) is not None:
        metrics["cispo_clip_ratio"] = _mean(((r > largest) & (advantages > 0)).float(), mask)
    return metrics


def _by_completion(values: PerToken, mask: PerToken, scores: Scores) -> PerCompletion:
    return scores.sum_by_completion(values * mask) / scores.sum_by_completion(mask).clamp(min=1)


def _correction_metrics(found: Corrected, mask: PerToken, weights: PerCompletion) -> Metrics:
    """How far engine and trainer are apart, before and after the bounds."""
    trained = (mask if len(found.raw) == len(mask) else weights) > 0
    known = (mask > 0) & ~found.differences.isnan()
    metrics: Metrics = {}
    one = mask.new_ones(())
    if known.any():
        apart = found.differences[known].abs()
        metrics["sampling/sampling_logp_difference/mean"] = apart.sum(), one * len(apart)
        metrics["sampling/sampling_logp_difference/max"] = apart.amax(), one
    if trained.any():
        raw, kept = found.raw[trained], found.factors[trained]
        name = "sampling/importance_sampling_ratio"
        metrics |= {f"{name}/min": (kept.amin(), one), f"{name}/max": (kept.amax(), one)}
        metrics[f"{name}/mean"] = kept.sum(), one * len(kept)
        metrics |= {"sampling/raw_ratio/min": (raw.amin(), one), "sampling/raw_ratio/max": (raw.amax(), one)}
        metrics["sampling/cut_fraction"] = (raw != kept).float().sum(), one * len(raw)
    return metrics


def _mean(values: Float[Tensor, " V"], mask: Float[Tensor, " V"]) -> Sum:
    return (values * mask).sum(), mask.sum()
