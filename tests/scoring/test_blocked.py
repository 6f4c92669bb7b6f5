"""Attention in blocks of queries equals torch's own, values and gradients (INV-19)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tether.scoring.attention import blocked
from tether.scoring.attention.blocked import blocked_attention

SHAPES = [(130, 130, 0), (70, 200, 0), (1, 5, 0), (64, 64, 0), (200, 300, 17), (130, 300, 64), (10, 40, 100)]


def tensors(queries: int, keys: int, heads: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = ((heads, queries), (2, keys), (2, keys))
    return [torch.randn(1, *shape, 16).to(dtype).requires_grad_() for shape in shapes]


def oracle(query, key, value, window):
    distance = torch.arange(key.shape[2] - query.shape[2], key.shape[2])[:, None] - torch.arange(key.shape[2])
    seen = (distance >= 0) & ((distance < window) if window else torch.tensor(True))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=0.25, enable_gqa=True)


def differences(found, expected, inputs) -> list[float]:
    grad = torch.randn(found.shape, dtype=found.dtype, generator=torch.Generator().manual_seed(1))
    pairs = zip(
        (found, *torch.autograd.grad(found, inputs, grad)),
        (expected, *torch.autograd.grad(expected, inputs, grad)),
        strict=True,
    )
    return [(one - other).abs().max().item() for one, other in pairs]


@pytest.mark.parametrize("kept", [0, 100, 512])
@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize(("queries", "keys", "window"), SHAPES)
def test_blocks_equal_the_whole(queries, keys, window, heads, kept, monkeypatch):
    """Values and gradients, with queries that are all or the last of the keys, windows, shared heads, kept weights."""
    monkeypatch.setattr(blocked, "KEPT", kept)
    inputs = tensors(queries, keys, heads)
    found = blocked_attention(*inputs, scaling=0.25, window=window)
    assert max(differences(found, oracle(*inputs, window), inputs)) < 1e-12


@pytest.mark.parametrize(("queries", "keys", "window"), SHAPES)
def test_blocks_in_float32(queries, keys, window):
    """Against float64 over the whole square."""
    rounded = tensors(queries, keys, 6, torch.float32)
    inputs = [one.detach().double().requires_grad_() for one in rounded]
    found = blocked_attention(*rounded, scaling=0.25, window=window)
    expected = oracle(*inputs, window)
    grad = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    pairs = zip(
        (found, *torch.autograd.grad(found, rounded, grad)),
        (expected, *torch.autograd.grad(expected, inputs, grad.double())),
        strict=True,
    )
    assert max((one - other).abs().max().item() for one, other in pairs) < 2e-5


def test_one_place_too_many_is_seen():
    """The comparison tells a window of 17 from one of 18, and a missing mask from the causal one."""
    inputs = tensors(200, 300, 6)
    assert max(differences(blocked_attention(*inputs, scaling=0.25, window=17), oracle(*inputs, 18), inputs)) > 1e-3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocked, "_weights", lambda rows, keys, *_: (rows @ keys.transpose(1, 2)).softmax(-1))
        assert max(differences(blocked_attention(*inputs, scaling=0.25), oracle(*inputs, 0), inputs)) > 1e-3


def test_weights_are_kept_of_blocks_of_few_keys_only(monkeypatch):
    """INV-20: what waits for the backward grows with the length and not with its square."""
    monkeypatch.setattr(blocked, "BLOCK", 64)
    monkeypatch.setattr(blocked, "KEPT", 128)
    waiting = []
    for length in (256, 512, 1024):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            blocked_attention(*tensors(length, length, 6), scaling=0.25)
        waiting.append(sum(sizes))
    weights = 6 * 64 * (64 + 128)  # two blocks of 64 queries, of 64 and 128 keys
    assert waiting == [length * 16 * (6 + 2 + 2) + weights for length in (256, 512, 1024)]


def test_bfloat16_is_as_near_to_the_truth_as_plain_products():
    """Against float64 on the same rounded inputs, beside products, mask and softmax in bfloat16 without blocks."""
    rounded = tensors(130, 200, 6, torch.bfloat16)
    query, key, value = (tensor.detach() for tensor in rounded)
    exact = oracle(query.double(), key.double(), value.double(), 0)
    hidden = torch.ones(130, 200, dtype=torch.bool).triu(71)
    scores = (0.25 * query) @ key.repeat_interleave(3, 1).transpose(2, 3)
    plain = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value.repeat_interleave(3, 1)
    ours = (blocked_attention(*rounded, scaling=0.25) - exact).abs().max()
    assert ours <= 1.2 * (plain - exact).abs().max()


def test_under_autocast_float32_inputs_are_products_in_bfloat16():
    """Forward and backward agree with inputs that were cast by hand; gradients come back in the inputs' dtype."""
    wide = tensors(70, 90, 6, torch.float32)
    narrow = [tensor.detach().bfloat16().requires_grad_() for tensor in wide]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = blocked_attention(*wide, scaling=0.25)
    expected = blocked_attention(*narrow, scaling=0.25)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, atol=0, rtol=0)
    grads = torch.autograd.grad(found.sum(), wide)
    assert {grad.dtype for grad in grads} == {torch.float32}
    for grad, other in zip(grads, torch.autograd.grad(expected.sum(), narrow), strict=True):
        torch.testing.assert_close(grad, other.float(), atol=0, rtol=0)


def test_values_narrower_than_keys():
    """Multi-head latent attention (DeepSeek): keys have a part for positions, values have none."""
    torch.manual_seed(0)
    shapes = ((4, 130, 16), (2, 200, 16), (2, 200, 10))
    inputs = [torch.randn(1, *shape, dtype=torch.float64).requires_grad_() for shape in shapes]
    found = blocked_attention(*inputs, scaling=0.25)
    assert found.shape == (1, 4, 130, 10)
    assert max(differences(found, oracle(*inputs, 0), inputs)) < 1e-12


def test_what_it_returns_may_be_changed_in_place():
    """A view that a function of its own returns may not be."""
    inputs = tensors(70, 70, 6)
    found = blocked_attention(*inputs, scaling=0.25)
    found.mul_(2.0)
    assert max(differences(found, 2.0 * oracle(*inputs, 0), inputs)) < 1e-12
