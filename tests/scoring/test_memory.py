"""Memory: linear in the length of a sequence, constant in the size of a data set (INV-20)."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tether.scoring import pack, score, score_alone
from tether.scoring.attention import blocked
from tether.scoring.attention import sdpa as attention_sdpa
from tether.types import Example
from tiny import ragged_examples, tiny_model

LENGTH = 8192
FAMILIES = {
    "llama": {},
    "mistral_window": {"sliding_window": 1024},
    # Soft-capped scores are held, block by block.
    "gemma2": {"sliding_window": LENGTH, "num_attention_heads": 1, "num_key_value_heads": 1},
}


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that any operation returns, in forward and backward."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.size = max(self.size, leaf.numel())
        return result


def largest(model, batch, backend):
    with Largest() as seen:
        score(model, batch, backend=backend).token_logps.sum().backward()
    return seen.size


def long_batch():
    ids = torch.randint(3, 97, (LENGTH,), generator=torch.Generator().manual_seed(0))
    prompt, *completions = ids.split([3000, 3000, LENGTH - 6000])
    return pack([Example(prompt, tuple(completions))])


@pytest.mark.parametrize("backend", ["blocked", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.sweep(2)
def test_a_long_row_needs_no_quadratic_memory(family, backend):
    """Of 8,192 tokens, forward and backward: no tensor holds as much as a 16th of T x T."""
    model = tiny_model(family, max_position_embeddings=LENGTH, num_hidden_layers=1, **FAMILIES[family])
    assert largest(model, long_batch(), backend) <= LENGTH**2 // 16


@pytest.mark.sweep(1)
@pytest.mark.parametrize("backend", ["blocked", "sdpa"])
def test_that_test_can_fail(backend, monkeypatch):
    """Negative control: without blocks, what a branch needs is quadratic, with every backend by segments."""
    monkeypatch.setattr(attention_sdpa, "LARGEST", 2**62)
    monkeypatch.setattr(blocked, "BLOCK", LENGTH)
    model = tiny_model(
        max_position_embeddings=LENGTH, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1
    )
    assert largest(model, long_batch(), backend) > LENGTH**2 // 16


@pytest.mark.sweep(2)
@pytest.mark.parametrize("block", [16, 2**20])
@pytest.mark.parametrize("family", ["llama", "mistral_window", "gemma2", "gpt_oss"])
def test_blocks_change_nothing(family, block, monkeypatch):
    """Values and gradients, with the smallest blocks and with one."""
    monkeypatch.setattr(attention_sdpa, "LARGEST", block)
    model, batch = tiny_model(family), pack(ragged_examples(completions=3))
    results = []
    for logps in (score_alone(model, batch), score(model, batch, backend="sdpa").token_logps):
        model.zero_grad()
        (logps * torch.linspace(-1, 2, len(logps))).sum().backward()
        results.append(
            (logps.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        )
    torch.testing.assert_close(results[1][0], results[0][0], atol=1e-5, rtol=0)
    assert (results[1][1] - results[0][1]).norm() <= 1e-4 * results[0][1].norm()
