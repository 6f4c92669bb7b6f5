"""Surrogates, advantages, KL, correction and reductions of sampled completions, against formulae written a second time
on plain numbers (R9, R11, R12, R13)."""

from __future__ import annotations

import itertools
import math
import statistics
from dataclasses import replace

import pytest
import torch

from tether.objectives import OBJECTIVES, check_options
from tether.objectives.online.advantages import (
    group_advantages,
    leave_one_out,
    normalize_then_sum,
    weighted_sum,
    without_variance,
)
from tether.objectives.online.correction import MODES, Correction
from tether.objectives.online.kl import KL
from tether.objectives.online.policy_gradient_loss import HighEntropy, PolicyGradient, Sampled, policy_gradient_loss
from tether.training.step import reduce_loss
from tether.types import Scores

nan = math.nan
ROWS = {**OBJECTIVES["grpo"], **OBJECTIVES["rloo"]}
LENGTHS = (3, 1, 2, 4)
INDEX = torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))
OPTIONS = {"cispo": {"epsilon_high": 1.1}}


def drawn(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    n = sum(LENGTHS)

    def near(base):
        return base + 0.4 * torch.randn(n, generator=generator, dtype=dtype)

    policy = -torch.rand(n, generator=generator, dtype=dtype) * 3 - 1
    advantages = torch.tensor([1.3, -0.7, 0.4, -1.0], dtype=dtype)
    return policy, Sampled(advantages, torch.ones(4, dtype=dtype), near(policy), near(policy), near(policy))


def scored(logps, entropy=None):
    return Scores(logps, INDEX, 4, entropy=entropy)


def objective(name, **changes):
    return PolicyGradient(ROWS[name], OPTIONS.get(name, {}), longest=7, **changes)


def loss_of(name, policy, sampled, **changes):
    """The loss of a step that is this batch."""
    output = policy_gradient_loss(scored(policy), sampled, objective(name, **changes))
    tokens = sampled.weights[INDEX].sum()
    return reduce_loss(output, torch.tensor([4.0, 4.0, tokens]), 1)


def by_hand(name, policy, sampled, *, level=None, beta=0.0, kl_ratio=True, correction=None):
    """The whole loss with `math` on lists."""
    starts = list(itertools.accumulate((0, *LENGTHS)))
    level = level or {"gspo": "sequence", "luspo": "sequence", "rloo": "sum"}.get(name, "token")
    sums, tokens = [], 0
    for k, length in enumerate(LENGTHS):
        if not sampled.weights[k]:
            sums.append((0.0, 1))
            continue
        at = range(starts[k], starts[k + 1])
        p, q = [policy[t].item() for t in at], [sampled.proximal[t].item() for t in at]
        d = [x - y for x, y in zip(p, q, strict=True)]
        if level != "token":
            d = [sum(d) / (length if level == "sequence" else 1)] * length
        w = 1.0
        ws = [1.0] * length
        if correction:
            gaps = [y - sampled.rollout[t].item() for y, t in zip(q, at, strict=True)]
            if correction.by_sequence:
                gaps = [sum(gaps)] * length
            for i, gap in enumerate(gaps):
                low, high = correction.low or -math.inf, correction.high or math.inf
                c = math.exp(gap)
                ws[i] = (c if low <= c <= high else 0.0) if "mask" in correction.mode else min(max(c, low), high)
        total, a = 0.0, sampled.advantages[k].item()
        for i in range(length):
            r = math.exp(d[i])
            if name == "cispo":
                x = -min(r, 1.1) * a * p[i]
            elif name == "sapo":
                tau = 1.0 if a > 0 else 1.05
                x = -a * 4 / tau / (1 + math.exp(-tau * (r - 1)))
            elif name == "vespo":
                log_w = sum(x - y for x, y in zip(p, q, strict=True))
                if correction:
                    logs = [max(math.log(c) if c else -math.inf, math.log(1e-8)) for c in ws]
                    log_w += logs[0] if correction.by_sequence else sum(logs)
                log_w = min(max(log_w, math.log(1e-8)), 20)
                power, decay = (2, 3) if a >= 0 else (3, 2)
                x = -math.exp(decay + power * log_w - decay * math.exp(log_w)) * a * p[i]
            elif name == "reinforce":
                x = -a * p[i]
            else:
                x = -min(r * a, min(max(r, 0.8), 1.2) * a)
            x *= 1.0 if name == "vespo" else ws[i] * w
            gap = sampled.reference[at[i]].item() - p[i]
            total += x + beta * (math.exp(gap) - 1 - gap) * (r if kl_ratio else 1)
        sums.append((total, length))
        tokens += length
    if name in ("dapo", "bnpo", "cispo", "vespo", "reinforce"):
        return sum(total for total, _ in sums) / tokens
    if name == "dr_grpo":
        return sum(total for total, _ in sums) / (4 * 7)
    if name == "luspo":
        return sum(total for total, _ in sums) / 4
    return sum(total / length for total, length in sums) / 4


CASES = [
    {},
    {"beta": 0.3},
    {"beta": 0.3, "kl_ratio": False},
    {"level": "token"},
    {"level": "sequence"},
    *({"correction": Correction(mode, 0.7, 1.6)} for mode in MODES),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", ROWS)
def test_losses_are_the_formula(name, case):
    policy, sampled = drawn()
    for weights in ([1, 1, 1, 1], [1, 1, 0, 1]):
        made = replace(sampled, weights=torch.tensor(weights, dtype=torch.float64))
        expected = by_hand(name, policy, made, **case)
        assert loss_of(name, policy, made, **case).item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("name", ROWS)
def test_gradient_on_policy_is_the_score_function(name):
    """At a ratio of 1 every surrogate has the gradient of `-A log p`, reduced as it is (REINFORCE); in float64."""
    policy, sampled = drawn()
    policy.requires_grad_()
    on_policy = replace(sampled, proximal=None, rollout=None, reference=None)
    (found,) = torch.autograd.grad(loss_of(name, policy, on_policy), policy)
    weights = torch.tensor([1 / length for length in LENGTHS], dtype=torch.float64)[INDEX]
    advantage = sampled.advantages[INDEX]
    expected = {
        "completions": -advantage * weights / 4,
        "tokens": -advantage / 10,
        "longest": -advantage / 28,
        "completion_sums": -advantage / 4,
    }[ROWS[name].averaged]
    # A sum of log-probs is in RLOO's one ratio whole: each token has the gradient of its completion.
    expected = -advantage / 4 if name == "rloo" else expected
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", sorted(ROWS.keys() - {"cispo", "vespo"}))
def test_the_gradient_of_the_surrogate_is_right(name):
    """R11: central differences, of those whose weight has a gradient; the test above has the others, at a weight of
    1."""
    row = ROWS[name]
    policy, sampled = drawn(1)
    inputs = {
        "log_ratios": (policy - sampled.proximal).requires_grad_(),
        "advantages": sampled.advantages[INDEX],
        "token_logps": policy.clone().requires_grad_(),
    }
    taken = [inputs[one.quantity] for one in row.inputs]
    assert torch.autograd.gradcheck(lambda *given: row(*given, **OPTIONS.get(name, {})), taken)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ROWS)
def test_extremes_are_finite(name, dtype):
    """R11: log-ratios of 10,000 nats either way, probabilities of 0 and 1, values and gradients, KL and correction."""
    for gap in (-1e4, 0.0, 1e4):
        policy = torch.full((10,), -1e4 if gap < 0 else -1e-9, dtype=dtype, requires_grad=True)
        other = (policy - gap).detach()
        sampled = Sampled(torch.tensor([1.0, -1.0, 0.0, 2.0]), torch.ones(4), other, other + 5e3, other - 5e3)
        output = policy_gradient_loss(scored(policy), sampled, objective(name, beta=0.1, correction=Correction()))
        output.terms[0].values.sum().backward()
        assert output.terms[0].values.isfinite().all()
        assert policy.grad.isfinite().all()


@pytest.mark.parametrize("name", ROWS)
def test_left_out_completions_have_no_gradient_and_are_in_no_token_count(name):
    """R13: nothing about their tokens changes anything; completions still count."""
    policy, sampled = drawn()
    sampled = replace(sampled, weights=torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64))
    moved = policy + 5 * (sampled.weights[INDEX] == 0)
    options = {"beta": 0.2, "correction": Correction()}
    assert loss_of(name, moved, sampled, **options).item() == loss_of(name, policy, sampled, **options).item()
    policy.requires_grad_()
    (grad,) = torch.autograd.grad(loss_of(name, policy, sampled, **options), policy)
    assert not grad[sampled.weights[INDEX] == 0].any()
    assert grad[sampled.weights[INDEX] == 1].any()


def test_every_surrogate_gives_another_number():
    """R12; `bnpo` is `dapo` over a step, and `gspo` is `grpo` with another level of ratios."""
    policy, sampled = drawn()
    found = {name: round(loss_of(name, policy, sampled).item(), 9) for name in ROWS}
    assert found.pop("bnpo") == found["dapo"]
    assert len(set(found.values())) == len(found)
    assert found["gspo"] == round(loss_of("grpo", policy, sampled, level="sequence").item(), 9)


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [(row.name, one.name, 0.5 if one.name != "delta" else 1.05) for row in ROWS.values() for one in row.options],
)
def test_every_option_changes_the_number(name, option, value):
    policy, sampled = drawn()
    before = policy_gradient_loss(scored(policy), sampled, objective(name)).terms[0].values
    changed = replace(objective(name), options={**OPTIONS.get(name, {}), option: value})
    after = policy_gradient_loss(scored(policy), sampled, changed).terms[0].values
    assert not torch.equal(before, after)
    assert check_options((ROWS[name],), {option: value}) is None


def test_dual_clip_bounds_what_a_negative_advantage_costs():
    """INTELLECT-2: ratio 5, advantage -1: a loss of 5 without, of `delta` with it."""
    clipped = ROWS["grpo"]
    inputs = torch.tensor([5.0, 5.0]).log(), torch.tensor([-1.0, 1.0])
    assert clipped(*inputs).tolist() == pytest.approx([5.0, -1.2])
    assert clipped(*inputs, delta=4.0).tolist() == pytest.approx([4.0, -1.2])
    assert clipped(*inputs, epsilon_high=0.28).tolist() == pytest.approx([5.0, -1.28])


def test_estimates_of_the_divergence():
    """Schulman's three, and that the mean of k1 and of k3 over the policy's own tokens is the divergence."""
    policy, reference = torch.tensor([[0.2, 0.3, 0.5], [0.5, 0.25, 0.25]], dtype=torch.float64)
    exact = (policy * (policy / reference).log()).sum().item()
    for name in ("k1", "k3"):
        assert (policy * KL[name](policy.log(), reference.log())).sum().item() == pytest.approx(exact, abs=1e-12)
    x = math.log(0.5 / 0.2)
    assert KL["k1"](policy.log(), reference.log())[0].item() == pytest.approx(-x)
    assert KL["k2"](policy.log(), reference.log())[0].item() == pytest.approx(x * x / 2)
    assert KL["k3"](policy.log(), reference.log())[0].item() == pytest.approx(2.5 - 1 - x)
    assert KL["k3"](torch.tensor([-200.0]), torch.tensor([0.0])).isfinite().all(), "exp(200) is no float32"


def test_high_entropy_tokens_alone_have_a_policy_gradient():
    policy, sampled = drawn()
    policy.requires_grad_()
    entropy = torch.arange(10.0, dtype=torch.float64)
    output = policy_gradient_loss(scored(policy, entropy), sampled, objective("reinforce", top_entropy=0.25))
    output.terms[0].values.sum().backward()
    assert policy.grad.nonzero().flatten().tolist() == [7, 8, 9]


@pytest.mark.parametrize("name", ["dapo", "grpo", "dr_grpo", "luspo"])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_a_bonus_is_the_mean_entropy_of_the_tokens_with_a_gradient(name, share):
    """Whatever the loss divides by, and however the step is split; at 0 it adds nothing."""
    policy, sampled = drawn()
    sampled = replace(sampled, weights=torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=torch.float64))
    entropy = torch.linspace(0.1, 2.0, 10, dtype=torch.float64).flip(0)
    trained = entropy[sampled.weights[INDEX] > 0]
    high = HighEntropy.among(trained, share)
    chosen = trained[trained >= trained.quantile(1 - share)]

    def total(bonus):
        spec = objective(name, top_entropy=share)
        output = policy_gradient_loss(scored(policy, entropy), sampled, spec, high=high, bonus=bonus)
        return reduce_loss(output, torch.tensor([4.0, 4.0, len(trained)]), 1).item(), output.metrics

    plain, metrics = total(None)
    assert "policy_loss" not in metrics
    assert total(0.0)[0] == pytest.approx(plain)
    found, metrics = total(0.7)
    assert found == pytest.approx(plain - 0.7 * chosen.mean().item())
    said, count = metrics["policy_loss"]
    assert (said / count).item() == pytest.approx(plain)


def test_far_completions_with_a_negative_advantage_are_left_out():
    """DeepSeek-V3.2: the mean of rollout - policy decides, above a threshold, where the advantage is negative."""
    policy = torch.full((10,), -2.0)
    rollout = policy + torch.tensor([0.6, 0.1, 0.6, 0.6])[INDEX]
    sampled = Sampled(torch.tensor([1.0, -1.0, -1.0, 0.0]), torch.ones(4), policy.clone(), rollout)
    output = policy_gradient_loss(scored(policy), sampled, objective("grpo", off_policy_threshold=0.5))
    assert output.terms[0].values.tolist() == pytest.approx([-1.0, 1.0, 0.0, 0.0])


def test_metrics_are_what_they_say():
    policy = torch.full((10,), -1.0)
    ratios = torch.tensor([1.5, 1.0, 0.7, 0.7, 1.3, 1.3, 1.0, 1.0, 1.0, 0.5])
    weights = torch.tensor([1.0, 1.0, 1.0, 0.0])
    sampled = Sampled(torch.tensor([1.0, -1.0, 1.0, -1.0]), weights, policy - ratios.log(), reference=policy - 0.5)
    metrics = policy_gradient_loss(scored(policy, torch.arange(10.0)), sampled, objective("dapo", beta=0.1)).metrics
    found = {name: (total / count).item() for name, (total, count) in metrics.items()}
    # Clipped: the first token above, the only token of the second below, both of the third above; the fourth is out.
    assert found["clip_ratio/high_mean"] == pytest.approx(3 / 6)
    assert found["clip_ratio/low_mean"] == pytest.approx(1 / 6)
    assert found["clip_ratio/region_mean"] == pytest.approx(4 / 6)
    assert (found["clip_ratio/low_min"], found["clip_ratio/high_max"]) == (0.0, 1.0)
    assert found["entropy"] == pytest.approx(15 / 6)
    assert found["kl/k1"] == pytest.approx(0.5)
    assert found["kl"] == pytest.approx((math.exp(-0.5) - 0.5) * ratios[:6].mean().item())


def test_correction_reports_what_it_cut():
    proximal = torch.full((10,), -1.0)
    rollout = proximal - torch.tensor([0.0, 0.0, 2.0, 0.0])[INDEX]
    rollout[1] = nan
    sampled = Sampled(torch.ones(4), torch.ones(4), proximal, rollout)
    metrics = policy_gradient_loss(scored(proximal), sampled, objective("grpo", correction=Correction())).metrics
    found = {name: (total / count).item() for name, (total, count) in metrics.items()}
    assert found["sampling/cut_fraction"] == 0.25
    assert found["sampling/raw_ratio/max"] == pytest.approx(math.exp(4.0))
    assert found["sampling/importance_sampling_ratio/max"] == 1.0
    assert found["sampling/importance_sampling_ratio/min"] == 0.0
    assert found["sampling/sampling_logp_difference/max"] == 2.0
    assert found["sampling/sampling_logp_difference/mean"] == pytest.approx(4 / 9), "a NaN is no evidence"


# -- advantages --------------------------------------------------------------------------------------------------------


def second(rewards, group, scale):
    """`statistics` on lists; None for what does not apply."""
    known = [reward for reward in rewards if reward is not None]
    found = []
    for start in range(0, len(rewards), group):
        part = rewards[start : start + group]
        real = [reward for reward in part if reward is not None]
        for reward in part:
            if reward is None or (scale == "group" and len(real) < 2):
                found.append(0.0)
                continue
            width = {"group": real, "batch": known}.get(scale)
            divisor = 1.0 if width is None else statistics.stdev(width) + 1e-4
            found.append((reward - statistics.mean(real)) / divisor)
    return found


REWARDS = [1.0, 2.0, 4.0, 0.5, 0.5, 0.5, None, 1.0, 3.0, None, None, 2.0, None, None, None]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_advantages(scale):
    """R11: ties, groups of two, of one, and of none with a reward."""
    given = torch.tensor([nan if one is None else one for one in REWARDS])
    found = group_advantages(given, 3, scale)
    assert found.tolist() == pytest.approx(second(REWARDS, 3, scale), abs=1e-5)


def test_leave_one_out():
    """R11: groups of three, of two, of one and of none with a reward."""
    given = torch.tensor([1.0, 2.0, 6.0, 4.0, nan, 2.0, nan, 5.0, nan])
    expected = [1 - 4, 2 - 3.5, 6 - 1.5, 2, 0, -2, 0, 0, 0]
    assert leave_one_out(given, 3).tolist() == expected
    known = [-3.0, -1.5, 4.5, 2.0, -2.0]
    mean, width = statistics.mean(known), statistics.stdev(known) + 1e-4
    found = leave_one_out(given, 3, normalize=True)
    assert found[[0, 1, 2, 3, 5]].tolist() == pytest.approx([(x - mean) / width for x in known], abs=1e-5)
    assert found[[4, 6, 7, 8]].tolist() == [0.0] * 4


def test_functions_normalised_apart_do_not_drown_each_other():
    """GDPO: a reward of thousands and one of tenths count by their weights; joined first, the small one is lost."""
    rewards = torch.tensor([[1000.0, 0.1], [2000.0, 0.0], [1000.0, 0.2], [2000.0, 0.3]])
    advantages, sums = normalize_then_sum(rewards, torch.tensor([1.0, 1.0]), 2)
    z = 0.5**0.5
    expected = [-z + z, z - z, -z - z, z + z]
    assert sums.tolist() == pytest.approx(expected, abs=2e-3)
    width = statistics.stdev(expected) + 1e-4
    assert advantages.tolist() == pytest.approx([x / width for x in expected], abs=2e-3)
    joined = group_advantages(weighted_sum(rewards, torch.ones(2)), 2)
    assert joined.tolist() == pytest.approx([-z, z, -z, z], abs=1e-3)


def test_exact_equality_decides_that_a_group_teaches_nothing():
    """NeMo-RL #4158: a tiny difference is one, and completions without a reward are not counted."""
    given = torch.tensor([0.5, 0.5 + 1e-6, 1.0, 1.0, nan, 2.0, nan, nan])
    assert without_variance(given, 2).tolist() == [False, False, True, True, True, True, True, True]
