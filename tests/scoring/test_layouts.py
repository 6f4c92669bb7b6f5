"""Every layout gives what each sequence gives alone (INV-16, 17, 19, 21)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from tether.errors import ConfigError, ScoringError
from tether.models.structure import evaluation_mode
from tether.scoring import choose_layout, pack, score, score_alone
from tether.scoring.attention import interface as attention
from tether.scoring.attention import sdpa as attention_sdpa
from tether.types import Example, Scores
from tiny import ragged_examples, tiny_model

OUTPUTS = ("entropy", "top1", "mean_logits", "log_collision")


def test_prompt_tokens_are_not_scored():
    """INV-17: N counts completion tokens only, and the first is predicted by the prompt's last token."""
    batch = pack([Example.of([5, 6, 7], [[8, 9], [10]])])
    assert batch.targets.tolist() == [8, 9, 10]
    assert batch.sources.tolist() == [2, 3, 2]


@pytest.mark.parametrize("layout", ["tree", "padded"])
def test_a_mask_leaves_tokens_out_of_the_score_and_nothing_else(layout):
    """Scored tokens keep the values that they have when all are scored."""
    model = tiny_model("llama").eval()
    whole = Example.of([5, 6, 7], [[8, 9, 10, 11], [12, 13]], values={"weight": 0.5})
    mask = [[False, True, False, True], [True, False]]
    part = Example.of([5, 6, 7], [[8, 9, 10, 11], [12, 13]], values={"weight": 2.0}, scored=mask)
    batch = pack([whole, part])
    assert batch.values["weight"].tolist() == [0.5, 2.0]
    assert batch.completion_index.tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 3]
    assert whole.keys[0] != part.keys[0]
    with torch.no_grad():
        found = score(model, batch, layout=layout).token_logps
        alone = score_alone(model, batch)
    torch.testing.assert_close(found, alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(found[6:], found[:6][torch.tensor([1, 3, 4])], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([Example.of([1], [[2, 3]], scored=[[False, False]])], "scores 0 of 2"),
        ([Example.of([1], [[2, 3]], scored=[[True]])], "scores 1 of 1 positions of a completion of 2"),
        ([Example.of([1], [[2]], values={"label": 1.0}), Example.of([1], [[2]])], "give every row the same"),
    ],
)
def test_masks_and_values_that_do_not_fit_are_refused(examples, message):
    with pytest.raises(ScoringError, match=message):
        pack(examples)


def lose_causality(kernel, query, key, value):
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)


def lose_trunk(kernel, query, key, value):
    length = query.shape[2]
    return kernel(query, key[:, :, -length:], value[:, :, -length:])


@pytest.mark.parametrize("backend", ["blocked", "sdpa"])
@pytest.mark.parametrize("fault", [lose_causality, lose_trunk])
def test_a_broken_mask_is_caught(fault, backend, monkeypatch):
    """INV-16, negative control: the oracle and the start-up proof see a wrong mask between branches or trees."""
    model, examples = tiny_model(), ragged_examples()
    whole = attention_sdpa._by_segments
    monkeypatch.setattr(attention_sdpa, "_by_segments", lambda *inputs: whole(*inputs[:-1], partial(fault, inputs[-1])))
    with torch.no_grad():
        found = score(model, pack(examples), backend=backend).token_logps
    assert (found - score_alone(model, pack(examples))).abs().max() > 1e-2
    with pytest.raises(ScoringError, match=f"tree layout, {backend} attention refused"):
        choose_layout(model, examples, backend=backend)
    assert choose_layout(model, examples).layout == "padded"


def test_leaking_branches_are_caught(monkeypatch):
    """INV-16, negative control: a forest told as one long sequence lets branches and trees see each other."""
    model, examples = tiny_model(), ragged_examples()
    leak = pack(examples)
    tree = replace(leak.forest.trees[0], trunk=1, branches=(leak.forest.length - 1,))
    with torch.no_grad():
        wrong = score(model, replace(leak, forest=replace(leak.forest, trees=(tree,)))).token_logps
        right = score_alone(model, leak)
    assert (wrong - right).abs().max() > 1e-2


def test_the_window_is_honoured():
    """A sliding window narrower than the sequences changes the scores, in the tree as alone."""
    batch = pack(ragged_examples())
    wide = tiny_model("mistral_window", sliding_window=200).eval()
    narrow = tiny_model("mistral_window").eval()
    narrow.load_state_dict(wide.state_dict())
    with torch.no_grad():
        assert (score(wide, batch).token_logps - score(narrow, batch).token_logps).abs().max() > 1e-3


@pytest.mark.parametrize(
    "options", [{"softcap": 2.0}, {"s_aux": torch.tensor([0.5, -1.0, 2.0, 0.0])}, {"sliding_window": 4}]
)
def test_attention_options_equal_the_dense_form(options):
    """Softcap, sinks and window, each against one dense masked attention."""
    torch.manual_seed(0)
    batch = pack(ragged_examples())
    forest, length = batch.forest, batch.forest.length
    query = torch.randn(1, 4, length, 8)
    key, value = torch.randn(1, 2, length, 8), torch.randn(1, 2, length, 8)
    found = attention.tree_attention(torch.nn.Identity(), query, key, value, forest, **options)
    scores = query @ key.repeat_interleave(2, 1).transpose(2, 3) / 8**0.5
    if "softcap" in options:
        scores = options["softcap"] * torch.tanh(scores / options["softcap"])
    scores = scores.masked_fill(~dense_mask(batch, options.get("sliding_window")), -torch.inf)
    if "s_aux" in options:
        sink = options["s_aux"].reshape(1, 4, 1, 1).expand(1, 4, length, 1)
        weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    torch.testing.assert_close(found, (weights @ value.repeat_interleave(2, 1)).transpose(1, 2), atol=1e-5, rtol=1e-5)


def dense_mask(batch, window):
    """Bool `[T, T]`: written from the definition, pair of tokens by pair of tokens."""
    tree = torch.empty(batch.forest.length, dtype=torch.long)
    branch = torch.zeros(batch.forest.length, dtype=torch.long)
    for i, spans in enumerate(tree.spans() for tree in batch.forest.trees):
        tree[spans[0][0] : spans[-1][1]] = i
        for k, (start, end) in enumerate(spans):
            branch[start:end] = k
    position = batch.position_ids[0]
    same_tree = tree[:, None] == tree
    related = (branch == 0) | (branch[:, None] == branch)
    distance = position[:, None] - position
    return same_tree & related & (distance >= 0) & (distance < (window or 10**9))


def test_dropout_is_off_while_scoring_in_evaluation_mode():
    """INV-21: and on in training mode, so that the test could fail."""
    model, batch = tiny_model("gpt2", dropout=True), pack(ragged_examples())
    model.train()
    with torch.no_grad():
        noisy = score(model, batch).token_logps
        with evaluation_mode(model):
            first, second = score(model, batch).token_logps, score(model, batch).token_logps
    assert torch.equal(first, second)
    assert not torch.allclose(noisy, first, atol=1e-3)
    assert model.training
    assert all(module.training for module in model.modules())


def test_a_forced_layout_that_cannot_be_is_refused():
    """INV-18: no fallback from what was asked for."""
    with pytest.raises(ScoringError, match="Leave `scoring_layout` unset"):
        choose_layout(tiny_model("mamba2"), ragged_examples(), requested="tree")


def test_generation_is_untouched_by_tree_attention():
    """A model that has been scored as a tree generates and forwards as before."""
    model = tiny_model().eval()
    ids = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])

    def answers():
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
            return logits, model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False)

    logits, tokens = answers()
    score(model, pack(ragged_examples()))
    after_logits, after_tokens = answers()
    assert torch.equal(logits, after_logits)
    assert torch.equal(tokens, after_tokens)


def test_padded_columns_never_matter():
    """INV-17: padding after a sequence does not change it."""
    model = tiny_model().eval()
    short, long = Example.of([5], [[6, 7]]), Example.of([5] * 10, [[6] * 20])
    with torch.no_grad():
        alone = score(model, pack([short]), layout="padded").token_logps
        beside = score(model, pack([short, long]), layout="padded").token_logps[:2]
    torch.testing.assert_close(alone, beside, atol=1e-5, rtol=0)


def test_wrong_calls_are_refused():
    model, batch = tiny_model(), pack(ragged_examples())
    with pytest.raises(ConfigError, match="layouts are tree, padded"):
        score(model, batch, layout="grid")
    with pytest.raises(ScoringError, match="at least one"):
        pack([Example.of([1], [[1], []])])
    with pytest.raises(ScoringError, match="no example"):
        pack([])


def test_scores_add_up_by_completion():
    scores = Scores(torch.tensor([-1.0, -2.0, -4.0]), torch.tensor([0, 2, 2]), 3)
    assert scores.logps.tolist() == [-1.0, 0.0, -6.0]
    assert scores.mean_logps.tolist() == [-1.0, 0.0, -3.0]
