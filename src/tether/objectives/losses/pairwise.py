"""Losses of the difference of a pair: from two numbers per pair to one value per pair, without reduction.

`chosen_logratios [B]` and `rejected_logratios [B]` are nats: the log-probability of a completion under the policy minus
that under the reference, or what an f-divergence makes of it. The names with `mean_` are divided by the completion's
tokens. `beta` times a log-ratio is the implicit reward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tether.objectives.losses.transforms import EXPONENT_LIMIT
from tether.types import PerExample


def sigmoid(
    chosen_logratios: PerExample,
    rejected_logratios: PerExample,
    margins: PerExample | None = None,
    *,
    beta: float,
    label_smoothing: float,
) -> PerExample:
    """The DPO loss: `-(1 - e) log s(d) - e log s(-d)`, with `d = beta (chosen - rejected) - margin`.

    Args:
        chosen_logratios: `[B]` nats.
        rejected_logratios: `[B]` nats.
        margins: `[B]`, how far the chosen reward should lead, from the column `margin`; None: 0.
        beta: inverse temperature, per nat; larger keeps the policy closer to the reference.
        label_smoothing: probability e that a label is wrong (conservative DPO).

    Returns:
        `[B]` nats; `log 2` at zero margin.

    Reference:
        Rafailov et al., Direct Preference Optimization, eq. 7, arXiv:2305.18290; label smoothing: Mitchell, A note on
        DPO with noisy preferences, eq. 3 (2023); margins: Amini et al., Direct Preference Optimization with an
        Offset, arXiv:2402.10571.

    Example:
        >>> sigmoid(torch.tensor([2.0]), torch.tensor([2.0]), beta=0.1, label_smoothing=0.0)
        tensor([0.6931])
    """
    logits = beta * (chosen_logratios - rejected_logratios)
    return _smoothed(logits if margins is None else logits - margins, label_smoothing)


def sigmoid_norm(
    chosen_mean_logratios: PerExample, rejected_mean_logratios: PerExample, *, beta: float, label_smoothing: float
) -> PerExample:
    """DPO with log-ratios averaged over tokens: `-(1 - e) log s(d) - e log s(-d)`, `d = beta (chosen - rejected)`.

    Args:
        chosen_mean_logratios: `[B]` nats per token.
        rejected_mean_logratios: `[B]` nats per token.
        beta: inverse temperature, per nat per token; values of 2 to 10, not 0.1, give the strength that DPO has.
        label_smoothing: probability e that a label is wrong.

    Returns:
        `[B]` nats; `log 2` at zero margin.

    Reference:
        Lambert et al., Tülu 3: Pushing Frontiers in Open Language Model Post-Training (length-normalised DPO),
        arXiv:2411.15124.
    """
    return _smoothed(beta * (chosen_mean_logratios - rejected_mean_logratios), label_smoothing)


def hinge(
    chosen_logratios: PerExample, rejected_logratios: PerExample, margins: PerExample | None = None, *, beta: float
) -> PerExample:
    """SLiC's hinge on DPO's reward: `max(0, 1 + margin - beta (chosen - rejected))`.

    Args:
        chosen_logratios: `[B]` nats.
        rejected_logratios: `[B]` nats.
        margins: `[B]`, a further lead of the chosen reward, from the column `margin`; None: 0.
        beta: inverse of the difference in nats at which a pair stops to count.

    Returns:
        `[B]`; 1 at zero margin.

    Reference:
        Zhao et al., SLiC-HF (rank calibration loss), arXiv:2305.10425; with DPO's reward: Liu et al., Statistical
        Rejection Sampling Improves Preference Optimization (hinge-norm), arXiv:2309.06657.
    """
    logits = beta * (chosen_logratios - rejected_logratios)
    return torch.relu(1 - (logits if margins is None else logits - margins))


def ipo(chosen_mean_logratios: PerExample, rejected_mean_logratios: PerExample, *, beta: float) -> PerExample:
    """A squared distance to a fixed lead: `(chosen - rejected - 1 / (2 beta))^2`.

    Log-ratios are averaged over tokens, as the authors confirmed to TRL; the paper's sum grows with length.

    Args:
        chosen_mean_logratios: `[B]` nats per token.
        rejected_mean_logratios: `[B]` nats per token.
        beta: the paper's tau: the difference aimed at is `1 / (2 beta)` nats per token.

    Returns:
        `[B]` squared nats; `1 / (4 beta^2)` at zero margin.

    Reference:
        Azar et al., A General Theoretical Paradigm to Understand Learning from Human Preferences, eq. 17,
        arXiv:2310.12036.
    """
    return (chosen_mean_logratios - rejected_mean_logratios - 1 / (2 * beta)) ** 2


def exo_pair(
    chosen_logratios: PerExample, rejected_logratios: PerExample, *, beta: float, label_smoothing: float
) -> PerExample:
    """The reverse KL from the policy's preference to a smoothed label: `KL((s(d), s(-d)) || (1 - e, e))`.

    Args:
        chosen_logratios: `[B]` nats.
        rejected_logratios: `[B]` nats.
        beta: inverse temperature of the policy's preference, per nat.
        label_smoothing: e above 0; the paper uses 1e-3. Larger values weaken the pull.

    Returns:
        `[B]` nats; 0 where the policy's preference is the smoothed label.

    Reference:
        Ji et al., Towards Efficient Exact Optimization of Language Model Alignment, eq. 16, arXiv:2402.00856.
    """
    logits = beta * (chosen_logratios - rejected_logratios)
    smoothing = torch.as_tensor(label_smoothing, dtype=logits.dtype, device=logits.device)
    right = logits.sigmoid() * (F.logsigmoid(logits) - torch.log1p(-smoothing))
    return right + (-logits).sigmoid() * (F.logsigmoid(-logits) - smoothing.log())


def robust(
    chosen_logratios: PerExample, rejected_logratios: PerExample, *, beta: float, label_smoothing: float
) -> PerExample:
    """DPO's loss without bias from labels flipped at a known rate: `(-(1 - e) log s(d) + e log s(-d)) / (1 - 2 e)`.

    Args:
        chosen_logratios: `[B]` nats.
        rejected_logratios: `[B]` nats.
        beta: inverse temperature, per nat, as in DPO.
        label_smoothing: the rate e at which labels are flipped; 0 is DPO.

    Returns:
        `[B]` nats; `log 2` at zero margin. Not bounded from below.

    Reference:
        Chowdhury et al., Provably Robust DPO, arXiv:2403.00409.
    """
    logits = beta * (chosen_logratios - rejected_logratios)
    clean, flipped = -F.logsigmoid(logits), -F.logsigmoid(-logits)
    return ((1 - label_smoothing) * clean - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def discopop(
    chosen_logratios: PerExample, rejected_logratios: PerExample, *, beta: float, discopop_tau: float
) -> PerExample:
    """A blend that a search discovered: `(1 - m) (-log s(d)) + m exp(-d)`, with `m = s(d / tau)`.

    Args:
        chosen_logratios: `[B]` nats.
        rejected_logratios: `[B]` nats.
        beta: inverse temperature, per nat; the paper uses 0.05.
        discopop_tau: temperature of the blend.

    Returns:
        `[B]`; `(log 2 + 1) / 2` at zero margin.

    Reference:
        Lu et al., Discovering Preference Optimization Algorithms with and for Large Language Models, eq. 5 (LRML),
        arXiv:2406.08414.
    """
    logits = beta * (chosen_logratios - rejected_logratios)
    # One exponent in place of a product of which one factor may overflow while the other vanishes.
    exponential = (F.logsigmoid(logits / discopop_tau) - logits).clamp(max=EXPONENT_LIMIT).exp()
    return -F.logsigmoid(logits) * (-logits / discopop_tau).sigmoid() + exponential


def dpop(
    chosen_logratios: PerExample, rejected_logratios: PerExample, *, beta: float, dpop_lambda: float
) -> PerExample:
    """DPO that does not let the chosen completion become less likely: `-log s(beta (d - lambda max(0, -chosen)))`.

    Args:
        chosen_logratios: `[B]` nats.
        rejected_logratios: `[B]` nats.
        beta: inverse temperature, per nat; the paper uses 0.3.
        dpop_lambda: weight of the penalty on a chosen completion that is less likely than under the reference.

    Returns:
        `[B]` nats; `log 2` at zero margin with the chosen completion as likely as under the reference.

    Reference:
        Pal et al., Smaug: Fixing Failure Modes of Preference Optimisation with DPO-Positive, arXiv:2402.13228.
    """
    penalty = dpop_lambda * torch.relu(-chosen_logratios)
    return -F.logsigmoid(beta * (chosen_logratios - rejected_logratios - penalty))


def rpo(
    chosen_logratios: PerExample, rejected_logratios: PerExample, margins: PerExample, *, beta: float, rpo_eta: float
) -> PerExample:
    """Fits the reward gap that the data gives: `KL(s(eta gap) || s(beta (chosen - rejected)))`.

    Args:
        chosen_logratios: `[B]` nats.
        rejected_logratios: `[B]` nats.
        margins: `[B]`, the gap between the rewards of chosen and rejected, from the column `margin`.
        beta: turns log-ratios into rewards, per nat.
        rpo_eta: scale of the given gap.

    Returns:
        `[B]` nats; 0 where the policy's gap is the given one.

    Reference:
        Adler et al., Nemotron-4 340B Technical Report, section 3.3.2 (reward-aware preference optimization),
        arXiv:2406.11704.
    """
    logits, gap = beta * (chosen_logratios - rejected_logratios), rpo_eta * margins
    right = gap.sigmoid() * (F.logsigmoid(gap) - F.logsigmoid(logits))
    return right + (-gap).sigmoid() * (F.logsigmoid(-gap) - F.logsigmoid(-logits))


def tdpo1(
    chosen_logratios: PerExample,
    rejected_logratios: PerExample,
    chosen_reference_kl: PerExample,
    rejected_reference_kl: PerExample,
    *,
    beta: float,
) -> PerExample:
    """Token-level DPO: `-log s(beta (chosen - rejected - (KL rejected - KL chosen)))`, KL(reference, policy) of tokens.

    Args:
        chosen_logratios: `[B]` nats.
        rejected_logratios: `[B]` nats.
        chosen_reference_kl: `[B]` nats, summed over the completion's tokens.
        rejected_reference_kl: `[B]` nats, summed over the completion's tokens.
        beta: inverse temperature, per nat, as in DPO.

    Returns:
        `[B]` nats; `log 2` where policy and reference are the same.

    Reference:
        Zeng et al., Token-level Direct Preference Optimization, TDPO1, arXiv:2404.11999.
    """
    lead = rejected_reference_kl - chosen_reference_kl
    return -F.logsigmoid(beta * (chosen_logratios - rejected_logratios - lead))


def tdpo2(
    chosen_logratios: PerExample,
    rejected_logratios: PerExample,
    chosen_reference_kl: PerExample,
    rejected_reference_kl: PerExample,
    *,
    beta: float,
    tdpo_alpha: float,
) -> PerExample:
    """Token-level DPO, weighed: `-log s(beta (chosen - rejected - alpha (KL rejected - KL chosen)))`.

    KL(reference, policy) of tokens, that of the chosen completion without gradient.

    Args:
        chosen_logratios: `[B]` nats.
        rejected_logratios: `[B]` nats.
        chosen_reference_kl: `[B]` nats, summed over the completion's tokens.
        rejected_reference_kl: `[B]` nats, summed over the completion's tokens.
        beta: inverse temperature, per nat, as in DPO.
        tdpo_alpha: weight of the difference of KLs.

    Returns:
        `[B]` nats; `log 2` where policy and reference are the same.

    Reference:
        Zeng et al., Token-level Direct Preference Optimization, TDPO2, arXiv:2404.11999.
    """
    lead = tdpo_alpha * (rejected_reference_kl - chosen_reference_kl.detach())
    return -F.logsigmoid(beta * (chosen_logratios - rejected_logratios - lead))


def aot(
    chosen_logps: PerExample,
    rejected_logps: PerExample,
    chosen_reference_logps: PerExample,
    rejected_reference_logps: PerExample,
    *,
    beta: float,
    label_smoothing: float,
) -> PerExample:
    """The policy's margins against the reference's, each sorted over the micro-batch (paired AOT): `-log s(beta d_i)`.

    The i-th value compares the i-th smallest of each, so that one distribution is pushed above the other. What is
    sorted is what is scored at once: another micro-batch size is another loss.

    Args:
        chosen_logps: `[B]` nats, under the policy.
        rejected_logps: `[B]` nats, under the policy.
        chosen_reference_logps: `[B]` nats, under the reference.
        rejected_reference_logps: `[B]` nats, under the reference.
        beta: inverse temperature, per nat, as in DPO.
        label_smoothing: probability that the order is wrong.

    Returns:
        `[B]` nats in sorted order, no longer that of the pairs; `log 2` where policy and reference are the same.

    Reference:
        Melnyk et al., Distributional Preference Alignment of LLMs via Optimal Transport (paired), arXiv:2406.05882.
    """
    policy = (chosen_logps - rejected_logps).sort().values
    reference = (chosen_reference_logps - rejected_reference_logps).sort().values
    return _smoothed(beta * (policy - reference), label_smoothing)


def aot_unpaired(
    chosen_logratios: PerExample, rejected_logratios: PerExample, *, beta: float, label_smoothing: float
) -> PerExample:
    """Chosen log-ratios against rejected ones, each sorted over the micro-batch (unpaired AOT): `-log s(beta d_i)`.

    Which chosen belongs to which rejected does not matter. Another micro-batch size is another loss.

    Args:
        chosen_logratios: `[B]` nats.
        rejected_logratios: `[B]` nats.
        beta: inverse temperature, per nat, as in DPO.
        label_smoothing: probability that the order is wrong.

    Returns:
        `[B]` nats in sorted order; `log 2` where the two are the same.

    Reference:
        Melnyk et al., Distributional Preference Alignment of LLMs via Optimal Transport (unpaired), arXiv:2406.05882.
    """
    return _smoothed(beta * (chosen_logratios.sort().values - rejected_logratios.sort().values), label_smoothing)


def _smoothed(logits: PerExample, label_smoothing: float) -> PerExample:
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)
