"""Rewards of a packed forest are those of each sequence alone, and prompts can be scored beside completions."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import AutoModelForSequenceClassification

from tether.errors import ScoringError
from tether.scoring import choose_layout, pack, score, score_alone
from tether.scoring.batch import with_prompts
from tether.scoring.reward import REWARDS, reward, reward_alone
from tether.scoring.score import _LAYOUTS
from tether.types import Example, Forest, Tree
from tiny import CONFIGS, VOCABULARY, ragged_examples, tiny_model

FAMILIES = ("llama", "qwen3", "mistral_window", "gemma3", "gpt2")


def classifier(family, labels=1, **changes):
    name, fields = CONFIGS[family]
    config = getattr(transformers, name)(**{**fields, "pad_token_id": 0, **changes}, num_labels=labels)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5.0)
    return model


@pytest.mark.parametrize("layout", ["tree", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rewards_are_those_of_each_sequence_alone(family, layout):
    """INV-16: values and gradients, against the model's own output for one sequence at a time."""
    model, batch = classifier(family), pack(ragged_examples())
    weights = torch.arange(1.0, batch.num_completions + 1)
    found, gradients = [], []
    for values in (reward(model, batch, layout=layout), reward_alone(model, batch)):
        model.zero_grad()
        (values * weights).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        found.append(values.detach())
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)
    assert (gradients[0] - gradients[1]).norm() <= 1e-4 * gradients[1].norm()


@pytest.mark.parametrize("padding", [0, 7, None])
def test_padding_tokens_at_the_end_are_skipped_as_transformers_skips_them(padding):
    """A completion that ends in the padding token, which is the end token of some tokenizers, or holds nothing else."""
    model = classifier("llama", pad_token_id=padding)
    batch = pack([Example.of([5, 6, 7], [[8, 7, 9, 7, 7], [7], [7, 10]]), Example.of([4], [[7, 7]])])
    with torch.no_grad():
        layouts = ("tree", "padded") if padding is not None else ("tree",)
        for layout in layouts:
            torch.testing.assert_close(reward(model, batch, layout=layout), reward_alone(model, batch))


def test_the_proof_takes_the_tree_and_finds_a_leak(monkeypatch):
    """Negative control: trees whose branches see each other, as in one long sequence, are not used."""
    model, examples = classifier("llama"), ragged_examples()
    assert choose_layout(model, examples, measures=REWARDS).layout == "tree"
    tree = _LAYOUTS["tree"]

    def leaking(model, batch):
        inputs, sources, context = tree(model, batch)
        whole = Tree(0, 1, (batch.forest.length - 1,))
        return {**inputs, "forest": Forest((whole,))}, sources, context

    monkeypatch.setitem(_LAYOUTS, "tree", leaking)
    choice = choose_layout(model, examples, measures=REWARDS)
    assert choice.layout == "padded"
    assert "refused" in choice.line


@pytest.mark.parametrize("model", [tiny_model(), classifier("llama", labels=2)], ids=["language model", "two labels"])
def test_other_models_are_refused(model):
    with pytest.raises(ScoringError, match="needs such a head with one output"):
        reward(model, pack(ragged_examples()))


@pytest.mark.parametrize("layout", ["tree", "padded"])
def test_prompts_are_scored_as_alone(layout):
    """The tokens of a prompt after its first, once each, after those of the completions, which stay as they are."""
    model, plain = tiny_model().eval(), pack(ragged_examples())
    batch = with_prompts(plain)
    with torch.no_grad():
        found = score(model, batch, layout=layout)
        torch.testing.assert_close(found.token_logps, score_alone(model, batch), atol=1e-5, rtol=0)
        completions = len(plain.targets)
        torch.testing.assert_close(found.token_logps[:completions], score(model, plain).token_logps, atol=1e-5, rtol=0)
        for i, example in enumerate(ragged_examples()):
            ids = example.prompt_ids[None]
            logps = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None]).sum()
            torch.testing.assert_close(found.logps[plain.num_completions + i], logps, atol=1e-4, rtol=1e-5)
    assert found.num_completions == plain.num_completions + plain.num_examples
    assert len(set(batch.keys)) == len(batch.keys)
    assert batch.targets.max() < VOCABULARY
