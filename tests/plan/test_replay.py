"""Bytes that a replayed step counts, against ones that follow from the shapes."""

from __future__ import annotations

from tether.models.before.blueprint import blueprint
from tether.plan.replay import replay
from tether.scoring import pack, score
from tether.types import Example
from tiny import tiny_model


def _batch(length: int):
    ids = [5] * length
    return pack([Example.of(ids, [[6, *ids], [7, *ids]])])


def _held(model, length: int, repeats: int = 1):
    return replay(model, _batch(length), lambda m, b: score(m, b, backend="blocked").token_logps, repeats)


def test_gradients_are_those_of_what_trains():
    model = blueprint(tiny_model().config).train()
    held = _held(model, 16, repeats=2)
    assert held.gradients == sum(4 * p.numel() for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_activations_grow_with_tokens_and_shrink_by_checkpointing():
    model = blueprint(tiny_model(num_hidden_layers=8).config).train()
    short, long = (_held(model, length).total for length in (16, 64))
    assert 2 < long / short < 6
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert _held(model, 64).total < 0.7 * long
