"""The oracle matrix: every family, in the layout it is given, scores as each sequence alone (INV-16 to 19, 21)."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from tether.compute import cpu_matmul as products
from tether.errors import ScoringError
from tether.models.structure import transformers_model
from tether.scoring import choose_layout, pack, score, score_alone
from tether.scoring.batch import sequence_sources, sequences
from tether.types import Example
from tiny import CONFIGS, FALLBACK, ragged_examples, tiny_model

OUTPUTS = ("entropy", "top1", "mean_logits")
TREES = [family for family in CONFIGS if family not in FALLBACK]


def layouts(family):
    return ("padded",) if family in FALLBACK else ("tree", "padded")


def options(family):
    """Every way a family is scored on a processor, as keywords of `score`; the first is what a run takes."""
    trees = [] if family in FALLBACK else [{"backend": "blocked"}, {"backend": "sdpa"}]
    return [*trees, {"layout": "padded"}]


def weighted(token_logps, batch):
    """A loss in which every completion has a weight of its own."""
    return (token_logps * (1.0 + batch.completion_index)).sum()


def gradient(model, batch, how, *, checkpointing=False):
    """Gradient by all parameters; asserts that layers are computed twice exactly when checkpointing."""
    model.train()
    model.zero_grad()
    if checkpointing:
        model._set_gradient_checkpointing(True, partial(checkpoint, use_reentrant=False))
    calls = []
    inside = next(m for m in transformers_model(model).modules() if isinstance(m, (nn.Linear, Conv1D)))
    hook = inside.register_forward_pre_hook(lambda *_: calls.append(1))
    weighted(how(model, batch), batch).backward()
    hook.remove()
    if checkpointing:
        model._set_gradient_checkpointing(False)
        assert len(calls) == 2
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])


def scorer(keywords):
    return lambda model, batch: score(model, batch, **keywords).token_logps


@pytest.mark.sweep(8)
@pytest.mark.parametrize("family", CONFIGS)
def test_every_layout_scores_as_alone(family):
    """INV-16, 18: values to 1e-5 per token; a family that cannot be a tree says so and falls back."""
    model, examples = tiny_model(family).eval(), ragged_examples()
    batch = pack(examples)
    choice = choose_layout(model, examples)
    assert choice.layout == layouts(family)[0], choice.line
    with torch.no_grad():
        alone = score_alone(model, batch)
        found = [score(model, batch, outputs=OUTPUTS, **way) for way in options(family)]
        if family in FALLBACK:
            assert "tree layout, blocked attention refused: " in choice.line
            with pytest.raises(ScoringError, match=r"layout='padded'|state along the row"):
                score(model, batch)
    for scores in found:
        torch.testing.assert_close(scores.token_logps, alone, atol=1e-5, rtol=0)
        for name in OUTPUTS:
            torch.testing.assert_close(getattr(scores, name), getattr(found[-1], name), atol=1e-5, rtol=0)


@pytest.mark.sweep(8)
@pytest.mark.parametrize("family", CONFIGS)
def test_gradients_agree(family):
    """INV-16, 19, 21: gradients to 1e-4 relative, with and without gradient checkpointing."""
    model, batch = tiny_model(family), pack(ragged_examples())
    alone = gradient(model, batch, score_alone)
    assert alone.norm() > 0
    for way in options(family):
        for checkpointing in (False, True):
            if checkpointing and not model.supports_gradient_checkpointing:
                continue
            found = gradient(model, batch, scorer(way), checkpointing=checkpointing)
            assert (found - alone).norm() <= 1e-4 * alone.norm(), (way, checkpointing)


@pytest.mark.sweep(8)
@pytest.mark.parametrize("family", CONFIGS)
def test_gradients_agree_by_onednn(family, onednn):
    """INV-21: the layers, attention and head by another library of products, against each sequence alone by torch's."""
    model, batch = tiny_model(family), pack(ragged_examples())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "_setting", {"library": "default"})
        alone = gradient(model, batch, score_alone)
    assert not onednn
    products.compute_by_products(model)
    found = gradient(model, batch, scorer(options(family)[0]), checkpointing=model.supports_gradient_checkpointing)
    assert onednn
    assert (found - alone).norm() <= 1e-4 * alone.norm()


def test_a_wrong_product_is_caught(onednn, monkeypatch):
    """Negative control: products that are off by a thousandth fail the comparison above."""
    model, batch = tiny_model(), pack(ragged_examples())
    alone = gradient(model, batch, score_alone)
    products.compute_by_products(model)
    right = products.onednn_product
    monkeypatch.setattr(products, "onednn_product", lambda *tensors: 1.001 * right(*tensors))
    found = gradient(model, batch, scorer({}))
    assert onednn
    assert (found - alone).norm() > 1e-4 * alone.norm()


@pytest.mark.parametrize("family", TREES)
def test_other_completions_and_rows_do_not_matter(family):
    """INV-16: alone, beside siblings, beside other trees; with experts, routing does not depend on neighbours."""
    model, examples = tiny_model(family).eval(), ragged_examples(2, completions=4)
    with torch.no_grad():
        together = score(model, pack(examples)).logps
        for i, example in enumerate(examples):
            for k, ids in enumerate(example.completion_ids):
                single = score(model, pack([Example(example.prompt_ids, (ids,))])).logps
                torch.testing.assert_close(single[0], together[4 * i + k], atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", TREES)
def test_a_left_padded_batch_scores_alike(family):
    """INV-16: what a plain left-padded forward of the same model gives."""
    model, batch = tiny_model(family).eval(), pack(ragged_examples())
    rows = sequences(batch)
    width = max(map(len, rows))
    ids = torch.stack([torch.cat([row.new_zeros(width - len(row)), row]) for row in rows])
    mask = torch.stack([(torch.arange(width) >= width - len(row)).long() for row in rows])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        logps = logits.log_softmax(-1)
        found = []
        for i, (row, where) in enumerate(zip(rows, sequence_sources(batch), strict=True)):
            shifted = where + width - len(row)
            found.append(logps[i, shifted].gather(-1, row[where + 1, None])[:, 0])
        torch.testing.assert_close(score(model, batch).token_logps, torch.cat(found), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", CONFIGS)
def test_only_a_token_and_those_before_it_matter(family):
    """INV-17: a token changes its own score and later ones in its branch, nothing else."""
    model, layout = tiny_model(family).eval(), layouts(family)[0]
    prompt, chosen, rejected = [5, 6, 7], [8, 9, 10, 11], [12, 13, 14]
    changed = [8, 9, 50, 11]
    with torch.no_grad():
        before = score(model, pack([Example.of(prompt, [chosen, rejected])]), layout=layout).token_logps
        after = score(model, pack([Example.of(prompt, [changed, rejected])]), layout=layout).token_logps
    same = torch.isclose(before, after, atol=1e-5, rtol=0)
    assert same.tolist() == [True, True, False, False, True, True, True]
