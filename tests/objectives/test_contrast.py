"""The losses of pairs without a reference as their trainers use them: a contrast, and a likelihood over tokens."""

from __future__ import annotations

import math

import pytest
import torch

from tether.objectives.contrast import CONTRASTS, contrast_loss, shaped_reward
from tether.types import Scores

TOKENS = [[-0.5, -1.0, -0.2], [-2.0], [-0.1, -0.3], [-1.5, -0.7, -0.9]]
OPTIONS = {
    "sigmoid": {"beta": 0.7, "label_smoothing": 0.1},
    "hinge": {"beta": 0.7},
    "ipo": {"beta": 0.7},
    "simpo": {"beta": 2.0, "simpo_gamma": 0.4, "label_smoothing": 0.1},
    "alphapo": {"beta": 2.0, "simpo_gamma": 0.4, "label_smoothing": 0.1},
    "odds_ratio": {"beta": 0.7},
}


def scores(rows, prompts=()):
    rows = [*rows, *prompts]
    index = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor([len(row) for row in rows]))
    return Scores(torch.tensor([value for row in rows for value in row], dtype=torch.float64), index, len(rows))


def logistic(x):
    return 1 / (1 + math.exp(-x))


def formula(name, chosen, rejected, beta, label_smoothing=0.0, simpo_gamma=0.0):
    """TRL's and the papers' formulae once more, in plain Python, from rewards per pair."""
    lead = chosen - rejected
    if name == "hinge":
        return max(0.0, 1 - beta * lead)
    if name == "ipo":
        return (lead - 1 / (2 * beta)) ** 2
    if name == "odds_ratio":
        odds = [math.exp(value) / (1 - math.exp(value)) for value in (chosen, rejected)]
        return -beta * math.log(logistic(math.log(odds[0] / odds[1])))
    margin = beta * lead - simpo_gamma
    return -(1 - label_smoothing) * math.log(logistic(margin)) - label_smoothing * math.log(logistic(-margin))


# Odds are of probabilities, not of shaped rewards.
SHAPED = [(name, alpha) for name in CONTRASTS for alpha in (0.0, 0.25, -0.5) if not (alpha and name == "odds_ratio")]


@pytest.mark.parametrize(("name", "alpha"), SHAPED)
def test_values_are_the_formulas(name, alpha):
    """INV-23: in float64, from sums over tokens or means, through the reward's shape."""
    level = (lambda row: sum(row) / len(row)) if CONTRASTS[name].per_token else sum
    rewards = [level(row) for row in TOKENS]
    if alpha:
        rewards = [(1 - math.exp(value) ** -alpha) / alpha for value in rewards]
    found = contrast_loss(scores(TOKENS), loss=name, pairs=2, alpha=alpha, **OPTIONS[name])
    expected = [formula(name, *rewards[i : i + 2], **OPTIONS[name]) for i in (0, 2)]
    assert found.values().tolist() == pytest.approx(expected, rel=1e-10)


def test_the_likelihood_is_of_chosen_tokens_and_of_prompts_that_are_scored():
    """One value per token, in the order of the batch; weighted; and none where its weight is 0."""
    prompts = [[-3.0, -4.0], [-5.0]]
    plain = contrast_loss(scores(TOKENS), loss="sigmoid", pairs=2, likelihood=0.5, beta=0.1)
    assert plain.values("tokens").tolist() == pytest.approx([0.25, 0.5, 0.1, 0.05, 0.15])
    whole = contrast_loss(scores(TOKENS, prompts), loss="odds_ratio", pairs=2, beta=0.1)
    assert whole.values("tokens").tolist() == pytest.approx([0.5, 1.0, 0.2, 0.1, 0.3, 3.0, 4.0, 5.0])
    total, count = whole.metrics["nll_loss"]
    assert (total.item(), count.item()) == (pytest.approx(14.1), 8.0)
    none = contrast_loss(scores(TOKENS), loss="sigmoid", pairs=2, likelihood=0.0, beta=0.1)
    assert none.values("tokens") is None
    assert "nll_loss" not in none.metrics
    for output in (plain, whole, none):
        assert output.metrics["logps/chosen"][1].item() == 2


def test_a_weight_scales_the_contrast_of_its_pair():
    plain = contrast_loss(scores(TOKENS), loss="simpo", pairs=2, beta=2.0)
    values = {"weight": torch.tensor([0.0, 3.0], dtype=torch.float64)}
    weighted = contrast_loss(scores(TOKENS), loss="simpo", pairs=2, values=values, beta=2.0)
    assert weighted.values().tolist() == pytest.approx([0.0, 3 * plain.values()[1].item()])
    assert torch.equal(weighted.values("tokens"), plain.values("tokens"))


@pytest.mark.parametrize("alpha", [0.0, 0.25, -0.5])
@pytest.mark.parametrize("value", [0.0, -1e-9, -1e4])
@pytest.mark.parametrize("name", CONTRASTS)
def test_extremes_are_finite(name, value, alpha):
    """INV-23: certain and impossible completions of one token, values and gradients, in float32."""
    logps = torch.tensor([value, -1.0, value, value], requires_grad=True)
    found = contrast_loss(Scores(logps, torch.arange(4), 4), loss=name, pairs=2, alpha=alpha, **OPTIONS[name])
    (found.values().sum() + found.values("tokens").sum()).backward()
    assert found.values().isfinite().all()
    assert logps.grad.isfinite().all()


def test_the_shape_of_a_reward():
    """AlphaPO, eq. 4: `log p` in the limit, and the gradient of the formula."""
    logps = torch.tensor([-0.3, -2.0, -5.0], dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(shaped_reward(logps, 1e-7), logps, atol=1e-5, rtol=0)
    assert shaped_reward(logps, 0.0) is logps
    assert torch.autograd.gradcheck(lambda x: shaped_reward(x, 0.5), logps)
