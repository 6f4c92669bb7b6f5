"""Pair losses against their formulae (INV-23)."""

from __future__ import annotations

import math

import pytest
import torch

from tether.objectives import OBJECTIVES, check_options, preference_loss
from tether.objectives.pairwise import sigmoid
from tether.types import Scores


def column(*values, grad=False):
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0])
def test_sigmoid_is_equation_7(beta, smoothing):
    """INV-23: value and gradient, written out once more with math.log and math.exp."""
    chosen, rejected = column(0.3, -2.0, 4.0, 0.0, grad=True), column(-1.0, 1.5, 4.0, 2.0, grad=True)
    losses = sigmoid(chosen, rejected, beta=beta, label_smoothing=smoothing)
    losses.sum().backward()
    for i in range(4):
        margin = beta * (chosen[i].item() - rejected[i].item())
        right, wrong = 1 / (1 + math.exp(-margin)), 1 / (1 + math.exp(margin))
        value = -(1 - smoothing) * math.log(right) - smoothing * math.log(wrong)
        slope = beta * (smoothing * right - (1 - smoothing) * wrong)
        assert losses[i].item() == pytest.approx(value, abs=1e-12)
        assert chosen.grad[i].item() == pytest.approx(slope, abs=1e-12)
        assert rejected.grad[i].item() == pytest.approx(-slope, abs=1e-12)


def test_sigmoid_gradcheck():
    chosen, rejected = column(0.3, -2.0, grad=True), column(-1.0, 1.5, grad=True)
    assert torch.autograd.gradcheck(lambda c, r: sigmoid(c, r, beta=0.7, label_smoothing=0.2), (chosen, rejected))


@pytest.mark.parametrize("extreme", [1e4, -1e4, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sigmoid_is_finite(extreme, dtype):
    """INV-23: at log-ratios of 10,000 nats either way, and at a tie."""
    chosen = torch.tensor([extreme, 0.0, extreme], dtype=dtype, requires_grad=True)
    losses = sigmoid(chosen, torch.tensor([0.0, extreme, extreme], dtype=dtype), beta=1.0)
    losses.sum().backward()
    assert losses.isfinite().all()
    assert chosen.grad.isfinite().all()


def test_sigmoid_symmetries():
    chosen, rejected = column(0.3, -2.0, 4.0), column(-1.0, 1.5, 4.0)
    order = torch.tensor([2, 0, 1])
    assert torch.equal(sigmoid(chosen, rejected)[order], sigmoid(chosen[order], rejected[order]))
    assert sigmoid(chosen, chosen).tolist() == pytest.approx([math.log(2)] * 3)
    flipped = 0.9 * sigmoid(chosen, rejected) + 0.1 * sigmoid(rejected, chosen)
    torch.testing.assert_close(sigmoid(chosen, rejected, label_smoothing=0.1), flipped)


def test_options_change_the_number():
    """INV-24: no option is silently ignored."""
    chosen, rejected = column(0.3), column(-1.0)
    values = [
        sigmoid(chosen, rejected).item(),
        sigmoid(chosen, rejected, beta=0.2).item(),
        sigmoid(chosen, rejected, label_smoothing=0.1).item(),
    ]
    assert len({round(value, 9) for value in values}) == 3


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("sigmod", {}, "did you mean sigmoid"),
        ("sigmoid", {"beta": 0.0}, "above 0"),
        ("sigmoid", {"beta": float("nan")}, "above 0"),
        ("sigmoid", {"label_smoothing": 0.5}, "below 0.5"),
        ("sigmoid", {"tau": 1.0}, "does not apply"),
    ],
)
def test_wrong_options_are_named(name, options, words):
    """INV-24."""
    assert words in check_options(name, options)


def test_every_row_of_the_table_takes_its_options():
    for row in OBJECTIVES.values():
        values = row.function(column(0.5), column(0.1), **{name: 0.3 for name in row.options})
        assert values.shape == (1,)
        assert row.convention


def test_preference_loss_and_its_metrics():
    """Two pairs of uneven lengths, by hand; means are over pairs, or over tokens for what is per token."""
    scores = Scores(
        token_logps=torch.tensor([-1.0, -2.0, -5.0, -3.0, -2.0, -2.0]),
        completion_index=torch.tensor([0, 0, 1, 2, 3, 3]),
        num_completions=4,
        entropy=torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]),
        top1=torch.tensor([True, False, True, True, True, True]),
        mean_logits=torch.tensor([0.5, 1.5, 4.0, 1.0, 2.0, 3.0]),
    )
    reference = Scores(torch.tensor([-4.0, -4.0, -2.0, -4.0]), torch.arange(4), 4)
    output = preference_loss(scores, reference, loss="sigmoid", beta=0.1, label_smoothing=0.0)
    margins = [0.1 * ((-3 + 4) - (-5 + 4)), 0.1 * ((-3 + 2) - (-4 + 4))]
    expected = [-math.log(1 / (1 + math.exp(-margin))) for margin in margins]
    assert output.per_example.tolist() == pytest.approx(expected)
    means = {name: (total / count).item() for name, (total, count) in output.metrics.items()}
    assert means == pytest.approx(
        {
            "rewards/chosen": 0.1 * (1 - 1) / 2,
            "rewards/rejected": 0.1 * (-1 + 0) / 2,
            "rewards/accuracies": 0.5,
            "rewards/margins": sum(margins) / 2,
            "logps/chosen": -3.0,
            "logps/rejected": -4.5,
            "logits/chosen": 1.0,
            "logits/rejected": 3.0,
            "entropy": 3.5,
            "mean_token_accuracy": 2 / 3,
        }
    )
