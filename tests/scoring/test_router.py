"""The load-balancing loss of experts: the architecture's own, over real tokens, in every layout."""

from __future__ import annotations

import pytest
import torch

from tether.errors import ConfigError
from tether.scoring import pack, score
from tether.scoring.batch import sequences
from tiny import ragged_examples, tiny_model

EXPERTS = ["mixtral", "qwen3_moe", "gpt_oss"]
EXAMPLES = [*ragged_examples(), *ragged_examples(2, completions=3, seed=1)]


def models_own(model, batch):
    """What the model itself returns for right-padded rows with their attention mask; this is what TRL adds."""
    rows = sequences(batch)
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return model(input_ids=ids, attention_mask=mask, use_cache=False, output_router_logits=True).aux_loss


def gradient(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("layout", ["tree", "padded"])
@pytest.mark.parametrize("family", EXPERTS)
def test_every_layout_gives_the_models_own(family, layout, checkpointing):
    """Value and gradient; a prompt that is computed once counts for each of its completions."""
    model, batch = tiny_model(family).train(), pack(EXAMPLES)
    right = models_own(model, batch)
    expected = gradient(model, right)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    found = score(model, batch, layout=layout, outputs=("aux_loss",)).aux_loss
    torch.testing.assert_close(found, right, atol=1e-6, rtol=1e-6)
    assert (gradient(model, found) - expected).norm() <= 1e-4 * expected.norm()
    routers = [p.grad for name, p in model.named_parameters() if "gate.weight" in name or "router.weight" in name]
    assert len(routers) == 2
    assert all(one.norm() > 0 for one in routers)


@pytest.mark.parametrize("family", EXPERTS)
def test_a_packed_row_without_weights_would_differ(family):
    """Negative control: counting a shared prompt once is another number."""
    model, batch = tiny_model(family).eval(), pack(EXAMPLES)
    with torch.no_grad():
        found = score(model, batch, outputs=("aux_loss",)).aux_loss
        ones = pack([type(e)(e.prompt_ids, (e.completion_ids[0],)) for e in EXAMPLES])
        assert abs(found - score(model, ones, outputs=("aux_loss",)).aux_loss) > 1e-3


def test_it_is_only_computed_when_asked_for():
    """What a reference pass does: no router logits are kept, even where the model's configuration asks for them."""
    model, batch = tiny_model("mixtral", output_router_logits=True).eval(), pack(EXAMPLES)
    seen = []
    handle = model.register_forward_hook(lambda *hooked: seen.append(hooked[-1]), with_kwargs=False)
    with torch.no_grad():
        assert score(model, batch).aux_loss is None
    handle.remove()
    assert seen[0].router_logits is None
    assert seen[0].aux_loss is None


def test_a_model_without_experts_has_none():
    with pytest.raises(ConfigError, match="no experts"):
        score(tiny_model(), pack(EXAMPLES), outputs=("aux_loss",))
