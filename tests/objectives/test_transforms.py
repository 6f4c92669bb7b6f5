"""What is done before a loss: f-divergences, LD-DPO, WPO, against loops over plain numbers."""

from __future__ import annotations

import math

import pytest
import torch

from tether.objectives import Combination
from tether.objectives.losses.transforms import divergence_scores, length_desensitised, likelihood_weights
from tether.objectives.preference_loss import preference_loss
from tether.scoring import pack, score
from tether.types import Example, Scores
from tiny import ragged_examples, tiny_model

DERIVATIVES = {
    "reverse_kl": lambda u, a: math.log(u),
    "forward_kl": lambda u, a: 1 - 1 / u,
    "js_divergence": lambda u, a: math.log(2 * u / (1 + u)),
    "alpha_divergence": lambda u, a: (u ** (a - 1) - 1) / (a - 1),
}


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9, 1.4, 2.0])
@pytest.mark.parametrize("kind", DERIVATIVES)
def test_f_divergences_are_table_1(kind, alpha):
    logratios = torch.tensor([-2.0, -0.1, 0.0, 0.4, 3.0], dtype=torch.float64, requires_grad=True)
    found = divergence_scores(logratios, kind, alpha)
    expected = [DERIVATIVES[kind](math.exp(r), alpha) for r in logratios.tolist()]
    assert found.tolist() == pytest.approx(expected, abs=1e-12)
    assert torch.autograd.gradcheck(lambda r: divergence_scores(r, kind, alpha), (logratios,))


def test_alpha_divergence_in_its_limits():
    """At 1 it is the reverse KL, near it nearly so (no cancellation), and at 0 the forward KL."""
    logratios = torch.tensor([-5.0, -0.1, 0.0, 2.0])
    assert torch.equal(divergence_scores(logratios, "alpha_divergence", 1.0), logratios)
    near = divergence_scores(logratios, "alpha_divergence", 1.0 + 1e-5)
    torch.testing.assert_close(near, logratios, atol=2e-4, rtol=2e-4)
    zero = divergence_scores(logratios, "alpha_divergence", 0.0)
    torch.testing.assert_close(zero, divergence_scores(logratios, "forward_kl"))


@pytest.mark.parametrize("kind", DERIVATIVES)
@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "discopop", "exo_pair", "hinge", "plackett_luce"])
def test_extremes_are_finite_after_a_divergence(loss, kind):
    """INV-23: exponents are clipped before they overflow, also where the loss squares what comes out; float32."""
    tokens = torch.tensor([-1e4, -0.5, -0.5, -1e4, -1e4, -1e4], requires_grad=True)
    policy = Scores(tokens, torch.arange(6), 6)
    reference = Scores(torch.tensor([-0.5, -1e4, -1e4, -0.5, -0.5, -0.5]), torch.arange(6), 6)
    output = preference_loss(policy, reference, loss=Combination((loss,), f_divergence_type=kind))
    output.values().sum().backward()
    assert output.values().isfinite().all()
    assert tokens.grad.isfinite().all()


def test_length_desensitising_by_a_loop():
    """Completions of 3, 1, 2 and 4 tokens, the last two of one list with a third of 2."""
    tokens = [[-1.0, -2.0, -4.0], [-8.0], [-1.0, -3.0], [-1.0, -1.0, -5.0, -7.0], [-0.5, -0.25]]
    flat = torch.tensor([logp for completion in tokens for logp in completion])
    index = torch.tensor([k for k, completion in enumerate(tokens) for _ in completion])
    scores = Scores(flat, index, 5)
    for alpha in (0.0, 0.3, 1.0):
        shared = [1, 1, 2, 2, 2]
        expected = [sum(t[:n]) + alpha * sum(t[n:]) for t, n in zip(tokens, shared, strict=True)]
        found = length_desensitised(scores, torch.tensor([2, 3]), alpha)
        assert found.tolist() == pytest.approx(expected)
    assert torch.equal(length_desensitised(scores, torch.tensor([2, 3]), 1.0), scores.logps)


def test_wpo_weights_from_the_model_itself():
    """exp(mean(log p - log sum p^2)) from the model's own softmax; no gradient passes through the weight."""
    model, batch = tiny_model(), pack(ragged_examples(2))
    scores = score(model, batch, outputs=("log_collision",))
    assert scores.log_collision is not None
    expected, start = [], 0
    for example in ragged_examples(2):
        for ids in example.completion_ids:
            row = torch.cat([example.prompt_ids, ids])
            logps = model(row[None]).logits[0].log_softmax(-1)[len(example.prompt_ids) - 1 : -1]
            picked, collision = logps.gather(-1, ids[:, None])[:, 0], logps.exp().square().sum(-1).log()
            part = scores.log_collision[start : start + len(ids)]
            torch.testing.assert_close(part, collision, atol=1e-5, rtol=1e-5)
            start += len(ids)
            expected.append((picked - collision).mean().exp().item())
    weights = likelihood_weights(scores)
    assert weights.tolist() == pytest.approx(expected, rel=1e-4)
    assert not weights.requires_grad
    plain = preference_loss(scores, None, loss="sigmoid")
    weighed = preference_loss(scores, None, loss=Combination(("sigmoid",), use_weighting=True))
    product = weights[0::2] * weights[1::2]
    torch.testing.assert_close(weighed.values(), product * plain.values())


def test_wpo_without_what_it_needs_is_an_error():
    scores = score(tiny_model(), pack([Example.of([1], [[3], [4]])]))
    with pytest.raises(ValueError, match="log_collision"):
        preference_loss(scores, None, loss=Combination(("sigmoid",), use_weighting=True))
