"""The contracts of the losses of supervised fine-tuning and of reward models."""

from __future__ import annotations

import math

import pytest
import torch

from tether.objectives import OBJECTIVES
from tether.objectives.reward_loss import reward_loss
from tether.objectives.supervised_loss import supervised_loss
from tether.types import Scores

bradley_terry = OBJECTIVES["reward"]["reward"]
SUPERVISED = OBJECTIVES["sft"]
LOGPS = [-0.1, -2.5, -1e-7, -40.0]


@pytest.mark.parametrize("name", SUPERVISED)
def test_token_losses_are_the_formulas(name):
    """INV-23: values in float64; dynamic fine-tuning weighs each token by its probability, held constant."""
    logps = torch.tensor(LOGPS, dtype=torch.float64, requires_grad=True)
    found = SUPERVISED[name](logps)
    weights = [math.exp(value) if name == "dft" else 1.0 for value in LOGPS]
    assert found.tolist() == pytest.approx([-w * v for w, v in zip(weights, LOGPS, strict=True)], rel=1e-12)
    found.sum().backward()
    assert logps.grad.tolist() == pytest.approx([-w for w in weights], rel=1e-12)


@pytest.mark.parametrize("name", SUPERVISED)
def test_token_losses_are_finite(name):
    """INV-23: at certainty and at its opposite."""
    logps = torch.tensor([0.0, -1e4], requires_grad=True)
    found = SUPERVISED[name](logps)
    found.sum().backward()
    assert found.isfinite().all()
    assert logps.grad.isfinite().all()


def test_a_loss_belongs_to_tokens_not_to_rows():
    scores = Scores(
        torch.tensor([-1.0, -2.0, -4.0]), torch.tensor([0, 0, 1]), 2, top1=torch.tensor([True, False, True])
    )
    output = supervised_loss(scores, loss="nll")
    assert output.values("tokens").tolist() == [1.0, 2.0, 4.0]
    assert output.values() is None
    total, count = output.metrics["mean_token_accuracy"]
    assert (total.item(), count.item()) == (2.0, 3.0)


CHOSEN, REJECTED, MARGIN = [2.0, -1.0, 0.5], [1.0, 3.0, 0.5], [0.0, 1.0, 0.25]


@pytest.mark.parametrize("margin", [None, MARGIN])
@pytest.mark.parametrize("center", [0.0, 0.01])
def test_bradley_terry_is_the_formula(margin, center):
    """INV-23: in float64."""
    as_tensor = lambda values: torch.tensor(values, dtype=torch.float64)  # noqa: E731
    found = bradley_terry(
        as_tensor(CHOSEN),
        as_tensor(REJECTED),
        None if margin is None else as_tensor(margin),
        center_rewards_coefficient=center,
    )
    expected = [
        math.log1p(math.exp(-(c - r - m))) + center * (c + r) ** 2
        for c, r, m in zip(CHOSEN, REJECTED, margin or [0.0] * 3, strict=True)
    ]
    assert found.tolist() == pytest.approx(expected, rel=1e-12)


def test_bradley_terry_gradients():
    """INV-23: right, and finite at the extremes."""
    parts = [torch.tensor(values, dtype=torch.float64, requires_grad=True) for values in (CHOSEN, REJECTED)]
    margin = torch.tensor(MARGIN, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda c, r: bradley_terry(c, r, margin, center_rewards_coefficient=0.1), parts)
    far = torch.tensor([1e4, -1e4], requires_grad=True)
    found = bradley_terry(far, -far)
    found.sum().backward()
    assert found.isfinite().all()
    assert far.grad.isfinite().all()


def test_a_margin_shifts_and_pairs_are_antisymmetric():
    chosen, rejected, margin = map(torch.tensor, (CHOSEN, REJECTED, MARGIN))
    shifted = bradley_terry(chosen - margin, rejected)
    torch.testing.assert_close(bradley_terry(chosen, rejected, margin), shifted)
    # -log s(d) + log s(-d) = -d
    difference = bradley_terry(chosen, rejected) - bradley_terry(rejected, chosen)
    torch.testing.assert_close(difference, rejected - chosen)
    assert bradley_terry(chosen, chosen).tolist() == pytest.approx([math.log(2)] * 3)


def test_what_is_reported_of_rewards():
    rewards = torch.tensor([2.0, 1.0, -1.0, 3.0])
    output = reward_loss(rewards, weights=torch.tensor([1.0, 0.0]))
    assert output.values().tolist() == pytest.approx([math.log1p(math.exp(-1.0)), 0.0])
    found = {name: (total.item(), count.item()) for name, (total, count) in output.metrics.items()}
    assert found == {
        "accuracy": (1.0, 2.0),
        "margin": (-3.0, 2.0),
        "mean_reward": (5.0, 4.0),
        "min_reward": (-1.0, 4.0),
        "max_reward": (3.0, 4.0),
    }
