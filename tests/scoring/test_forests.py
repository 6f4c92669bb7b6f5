"""Forests of any shape: groups, ranked lists, empty trunks, and prompts and completions that rows share."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tether.errors import ScoringError
from tether.scoring import choose_layout, pack, score, score_alone
from tether.scoring.attention import interface as attention
from tether.scoring.batch import sequence_counts, sequences
from tether.types import Example, Forest, Tree
from tiny import ragged_examples, tiny_model

SHARED = [
    Example.of([5, 6, 7], [[8, 9], [10]], 0, values={"weight": 1.0}),
    Example.of([5, 6], [[8, 9], [11, 12, 13]], 1, values={"weight": 2.0}),
    Example.of([5, 6, 7], [[8, 9], [14, 15, 16]], 2, values={"weight": 3.0}),
    Example.of([5, 6, 7], [[17], [10]], 3, values={"weight": 4.0}, scored=[[True], [True]]),
]
SHAPES = {
    "a group of 16": ragged_examples(1, completions=16, longest=6),
    "a ranked list of 5": ragged_examples(2, completions=5, longest=6),
    "one completion each": ragged_examples(4, completions=1),
    "trunks of one token": [Example.of([3], [[4, 5], [6]]), Example.of([4], [[4, 5, 7]])],
    "rows that share a prompt": SHARED,
    "an empty trunk": [
        Example.of([], [[5, 6, 7], [8, 9]], scored=[[False, True, True], [False, True]]),
        Example.of([5], [[6, 7]], scored=[[True, True]]),
        Example.of([], [[8, 9, 10, 11]], scored=[[False, False, True, True]]),
    ],
}


@pytest.mark.sweep(6)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_forests_of_any_shape_score_as_alone(family, shape):
    """INV-16: values and gradients of tree, padded and alone."""
    model, batch = tiny_model(family), pack(SHAPES[shape])
    weights, results = 1.0 + batch.completion_index, []
    for function in (
        score_alone,
        lambda model, batch: score(model, batch).token_logps,
        lambda model, batch: score(model, batch, layout="padded").token_logps,
    ):
        model.zero_grad()
        logps = function(model, batch)
        (logps * weights).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        results.append((logps.detach(), gradient))
    for logps, gradient in results[1:]:
        torch.testing.assert_close(logps, results[0][0], atol=1e-5, rtol=0)
        assert (gradient - results[0][1]).norm() <= 1e-4 * results[0][1].norm()


def test_rows_with_one_prompt_share_its_trunk_and_keep_their_order():
    """Tokens are saved; everything that is numbered by row or completion is as if they were not."""
    batch = pack(SHARED)
    assert batch.forest.trees == (Tree(0, 3, (2, 1, 3, 1)), Tree(10, 2, (2, 3)))
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 10, 14, 15, 16, 17, 5, 6, 8, 9, 11, 12, 13]]
    assert batch.num_examples == 4
    assert batch.values["weight"].tolist() == [1, 2, 3, 4]
    assert batch.keys == tuple(key for example in SHARED for key in example.keys)
    whole = [[*example.prompt_ids, *ids] for example in SHARED for ids in example.completion_ids]
    assert [row.tolist() for row in sequences(batch)] == whole
    assert list(batch.sequence_lengths) == [len(row) for row in whole]
    assert batch.completion_index.tolist() == [0, 0, 1, 2, 2, 3, 3, 3, 4, 4, 5, 5, 5, 6, 7]
    assert batch.targets.tolist() == [token for example in SHARED for ids in example.completion_ids for token in ids]


def test_a_shared_trunk_gives_what_separate_ones_give():
    """The same rows, each packed without the others: values and gradients."""
    model = tiny_model()
    results = []
    for batches in ([pack(SHARED)], [pack([example]) for example in SHARED]):
        model.zero_grad()
        logps = torch.cat([score(model, batch).logps for batch in batches])
        (logps * torch.arange(1.0, len(logps) + 1)).sum().backward()
        results.append((logps.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-5, rtol=0)
    assert (results[0][1] - results[1][1]).norm() <= 1e-4 * results[1][1].norm()


def test_each_token_counts_for_the_sequences_it_stands_in():
    batch = pack(SHARED)
    assert sequence_counts(batch).tolist() == [6, 6, 6, 2, 2, 2, 1, 1, 1, 1, 2, 2, 1, 1, 1, 1, 1]
    assert int(sequence_counts(batch).sum()) == sum(batch.sequence_lengths)


def told_wrongly(forest: Forest) -> Forest:
    """A merged tree told as if its second and third branch, of different rows, were one."""
    tree = forest.trees[0]
    joined = (tree.branches[0], sum(tree.branches[1:3]), *tree.branches[3:])
    return Forest((replace(tree, branches=joined), *forest.trees[1:]))


def test_a_leak_between_merged_rows_is_caught(monkeypatch):
    """INV-16, negative control: branches of different rows under one trunk that see each other."""
    model, batch = tiny_model(), pack(SHARED)
    original = attention.tree_attention

    def leaking(module, query, key, value, forest, **options):
        return original(module, query, key, value, told_wrongly(forest), **options)

    monkeypatch.setattr(attention, "tree_attention", leaking)
    with torch.no_grad():
        assert (score(model, batch).token_logps - score_alone(model, batch)).abs().max() > 1e-2
    choice = choose_layout(model, SHARED)
    assert choice.layout == "padded"
    assert "tree layout, blocked attention refused" in choice.line


def test_an_empty_prompt_needs_unscored_first_tokens():
    with pytest.raises(ScoringError, match=r"empty prompt.*BOS"):
        pack([Example.of([], [[5, 6]])])
    with pytest.raises(ScoringError, match=r"empty prompt.*BOS"):
        pack([Example.of([], [[5, 6], [7, 8]], scored=[[False, True], [True, True]])])
