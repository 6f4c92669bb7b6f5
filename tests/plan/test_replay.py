"""Bytes that a replayed step counts, against ones that follow from the shapes."""

from __future__ import annotations

import pytest
import torch

from tether.models.before.blueprint import blueprint
from tether.plan.replay import replay
from tether.scoring import pack, score
from tether.scoring.attention.blocked import _hidden
from tether.types import Example
from tiny import tiny_model


def _batch(length: int):
    ids = [5] * length
    return pack([Example.of(ids, [[6, *ids], [7, *ids]])])


def _held(length: int, repeats: int = 1, *, checkpointing: bool = False):
    model = blueprint(tiny_model(num_hidden_layers=8).config).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return replay(model, _batch(length), lambda m, b: score(m, b, backend="blocked").token_logps, repeats), model


@pytest.mark.slow
def test_gradients_are_those_of_what_trains():
    held, model = _held(16, repeats=2)
    assert held.gradients == sum(4 * p.numel() for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.slow
def test_activations_grow_with_tokens_and_shrink_by_checkpointing():
    short, long = _held(16)[0].activations, _held(64)[0].activations
    assert 2 < long / short < 6
    assert _held(64, checkpointing=True)[0].activations < 0.7 * long


def test_scores_after_a_replay_are_those_before_it():
    """What attention keeps for later was made inside a replay, where tensors have no values."""
    model, batch = tiny_model(), _batch(19)
    _hidden.cache_clear()
    before = score(model, batch, backend="blocked").token_logps
    _hidden.cache_clear()
    _held(19)
    torch.testing.assert_close(score(model, batch, backend="blocked").token_logps, before, atol=0, rtol=0)
