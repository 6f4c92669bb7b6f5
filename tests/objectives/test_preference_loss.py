"""From scores to losses and metrics: pairs, ranked lists, columns of weights and margins, combinations."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from tether.objectives import OBJECTIVES, Combination
from tether.objectives.preference_loss import preference_loss
from tether.types import Scores


def scores(*completions, **more):
    """Scores of completions that are given as lists of token log-probs."""
    flat = torch.tensor([logp for tokens in completions for logp in tokens], dtype=torch.float64)
    index = torch.tensor([k for k, tokens in enumerate(completions) for _ in tokens])
    return Scores(flat.requires_grad_(), index, len(completions), **more)


POLICY = [[-1.0, -2.0], [-5.0], [-3.0], [-2.0, -2.0]]
REFERENCE = [[-3.0, -1.0], [-4.0], [-2.0], [-2.0, -2.0]]


def means(output):
    return {name: (total / count).item() for name, (total, count) in output.metrics.items() if count}


def test_the_loss_and_its_metrics_by_hand():
    """INV-26: means are over pairs, or over tokens for what is per token; TRL's names."""
    more = {
        "entropy": torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]),
        "top1": torch.tensor([True, False, True, True, True, True]),
        "mean_logits": torch.tensor([0.5, 1.5, 4.0, 1.0, 2.0, 3.0]),
    }
    output = preference_loss(scores(*POLICY, **more), scores(*REFERENCE), loss="sigmoid", beta=0.1)
    margins = [0.1 * ((-3 + 4) - (-5 + 4)), 0.1 * ((-3 + 2) - (-4 + 4))]
    assert output.values().tolist() == pytest.approx([math.log(1 + math.exp(-margin)) for margin in margins])
    assert output.values("tokens") is None
    pushes = [0.1 / (1 + math.exp(margin)) for margin in margins]
    ratios = [2.0, -1.0, -1.0, -1.0, 0.0, 0.0]
    assert means(output) == pytest.approx(
        {
            "rewards/chosen": 0.1 * (1 - 1) / 2,
            "rewards/rejected": 0.1 * (-1 + 0) / 2,
            "rewards/accuracies": 0.5,
            "rewards/margins": sum(margins) / 2,
            "rewards/margins/1-64_tokens": sum(margins) / 2,
            "rewards/accuracies/1-64_tokens": 0.5,
            "logps/chosen": -3.0,
            "logps/rejected": -4.5,
            "slopes/chosen": -sum(pushes) / 2,
            "slopes/rejected": sum(pushes) / 2,
            "logits/chosen": 1.0,
            "logits/rejected": 3.0,
            "entropy": 3.5,
            "mean_token_accuracy": 2 / 3,
            "kl/k1": sum(ratios) / 6,
            "kl/k3": sum(math.exp(-r) - 1 + r for r in ratios) / 6,
        },
        abs=1e-7,
    )


def test_rewards_by_length_are_those_of_the_pairs_of_that_length():
    lengths = [(3, 64), (65, 2), (300, 10), (20, 2000), (1, 1)]
    completions = [[-float(k + 1) / n] * n for k, n in enumerate(itertools.chain(*lengths))]
    output = preference_loss(scores(*completions), None, loss="hinge", beta=1.0)
    counts = {name: count.item() for name, (_, count) in output.metrics.items() if name.startswith("rewards/margins/")}
    ends = ("1-64", "65-256", "257-1024", "above_1024")
    assert counts == {f"rewards/margins/{end}_tokens": n for end, n in zip(ends, (2, 1, 1, 1), strict=True)}
    assert means(output)["rewards/margins/65-256_tokens"] == pytest.approx(1.0)


def test_no_reference_is_a_flat_one_without_a_kl():
    flat = preference_loss(scores(*POLICY), None, loss="sigmoid")
    zeros = preference_loss(scores(*POLICY), scores(*([0.0] * len(tokens) for tokens in POLICY)), loss="sigmoid")
    assert torch.equal(flat.values(), zeros.values())
    assert not any(name.startswith("kl/") for name in flat.metrics)


@pytest.mark.parametrize("name", ["simpo", "orpo", "odds_ratio", "cpo"])
def test_rewards_of_a_reference_free_loss_are_its_own(name):
    """TRL's: beta times the mean log-prob where the loss uses means, times the sum where it uses sums."""
    found = means(preference_loss(scores(*POLICY), None, loss=name, beta=2.0))
    chosen = [-3.0, -3.0] if name == "cpo" else [-1.5, -3.0]
    assert found["rewards/chosen"] == pytest.approx(2.0 * sum(chosen) / 2)
    assert found["logps/chosen"] == pytest.approx(-3.0)


def test_the_gradient_outside_is_not_touched_by_the_slopes():
    """The metric differentiates the loss once more on its own; the model's gradient is that of the loss alone."""
    policy = scores(*POLICY)
    output = preference_loss(policy, scores(*REFERENCE), loss="sigmoid", beta=0.5)
    assert policy.token_logps.grad is None
    output.values().sum().backward()
    slopes = policy.token_logps.grad[torch.tensor([0, 3])].mean().item()
    assert means(output)["slopes/chosen"] == pytest.approx(slopes)
    with torch.no_grad():
        assert "slopes/chosen" not in preference_loss(policy, scores(*REFERENCE), loss="sigmoid").metrics


def test_a_combination_is_the_weighted_sum():
    """MPO: each loss with its weight; the likelihood apart, because it is averaged over tokens."""
    mixed = Combination(("sigmoid", "bco_pair", "sft"), (0.8, 0.2, 0.5), {"beta": 0.3})
    output = preference_loss(scores(*POLICY), scores(*REFERENCE), loss=mixed)
    parts = [preference_loss(scores(*POLICY), scores(*REFERENCE), loss=name, beta=0.3) for name in mixed.losses[:2]]
    torch.testing.assert_close(output.values(), 0.8 * parts[0].values() + 0.2 * parts[1].values())
    assert output.values("tokens").tolist() == [0.5, 1.0, 1.5]
    alone = preference_loss(scores(*POLICY), None, loss="sft")
    assert (alone.values().tolist(), alone.values("tokens").tolist()) == ([0.0, 0.0], [1.0, 2.0, 3.0])


def test_weights_multiply_the_loss_of_their_pair():
    weights = {"weight": torch.tensor([3.0, 0.5])}
    mixed = Combination(("hinge", "sft"))
    plain = preference_loss(scores(*POLICY), scores(*REFERENCE), loss=mixed)
    weighed = preference_loss(scores(*POLICY), scores(*REFERENCE), loss=mixed, values=weights)
    torch.testing.assert_close(weighed.values(), plain.values() * weights["weight"].double())
    assert weighed.values("tokens").tolist() == [3.0, 6.0, 1.5]
    assert means(weighed)["rewards/margins"] == means(plain)["rewards/margins"]


@pytest.mark.parametrize("name", ["sigmoid", "hinge", "rpo"])
def test_margins_come_from_their_column(name):
    margins = torch.tensor([0.4, -1.0])
    found = preference_loss(scores(*POLICY), scores(*REFERENCE), loss=name, beta=0.7, values={"margin": margins})
    logratios = torch.tensor([1.0, -1.0]).double(), torch.tensor([-1.0, 0.0]).double()
    expected = OBJECTIVES["dpo"][name](*logratios, margins, beta=0.7)
    torch.testing.assert_close(found.values(), expected)
    other = preference_loss(scores(*POLICY), scores(*REFERENCE), loss=name, beta=0.7, values={"margin": margins + 1})
    assert not torch.allclose(found.values(), other.values())


def test_a_gap_that_is_missing_is_an_error():
    with pytest.raises(ValueError, match="add a column `margin`"):
        preference_loss(scores(*POLICY), scores(*REFERENCE), loss="rpo")


def test_ranked_lists_of_different_lengths():
    """Each list alone gives the same loss; chosen is the best, rejected stands for the others."""
    lists = [[-1.0, -1.0], [-3.0], [-2.5]], [[-2.0], [-1.0, -0.5]], [[-1.0], [-2.0], [-4.0, -1.0], [-3.0]]
    options = {"loss": "plackett_luce", "beta": 0.5}
    output = preference_loss(scores(*itertools.chain(*lists)), None, sizes=[3, 2, 4], **options)
    alone = [preference_loss(scores(*one), None, sizes=[len(one)], **options).values().item() for one in lists]
    assert output.values().tolist() == pytest.approx(alone)
    output.values().sum().backward()
    found = means(output)
    assert found["logps/chosen"] == pytest.approx((-2.0 - 2.0 - 1.0) / 3)
    assert found["logps/rejected"] == pytest.approx((-5.5 / 2 - 1.5 - 10.0 / 3) / 3)
    # Ordered pairs that the log-probs order alike: 2 of 3, none of 1, 5 of 6.
    assert found["rewards/accuracies"] == pytest.approx((2 / 3 + 0 + 5 / 6) / 3)


def test_metrics_do_not_depend_on_the_split():
    """INV-26: sums and counts of two halves add up to those of the whole."""
    whole = preference_loss(scores(*POLICY), scores(*REFERENCE), loss="ipo").metrics
    halves = [
        preference_loss(scores(*POLICY[part]), scores(*REFERENCE[part]), loss="ipo").metrics
        for part in (slice(2), slice(2, 4))
    ]
    for name, (total, count) in whole.items():
        assert total.item() == pytest.approx(sum(half[name][0].item() for half in halves)), name
        assert count.item() == sum(half[name][1].item() for half in halves), name


@pytest.mark.parametrize("name", [name for name, row in OBJECTIVES["dpo"].items() if row.kind == "pair"])
def test_a_completion_of_which_nothing_is_scored_is_finite(name):
    """A mean is over at least one token: the empty completion has a log-prob of 0, and no NaN comes of it."""
    tokens = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    policy = Scores(tokens, torch.tensor([0, 0, 3]), 4, log_collision=torch.zeros(3))
    reference = Scores(torch.tensor([-1.5, -1.5, -1.0]), policy.completion_index, 4)
    row = OBJECTIVES["dpo"][name]
    desensitised = None if row.takes("reference_kl") else 0.5
    mixed = Combination((name,), ld_alpha=desensitised, use_weighting=row.averaged != "micro_batch")
    output = preference_loss(policy, reference, loss=mixed, values={"margin": torch.zeros(2)}, divergence=torch.ones(3))
    total = output.values().sum() + (0 if output.values("tokens") is None else output.values("tokens").sum())
    total.backward()
    assert total.isfinite()
    assert tokens.grad.isfinite().all()
    assert all(value.isfinite() for value, _ in output.metrics.values())
