"""The proof of a layout away from an adapter's zero point, once more after updates, and of what cannot be called."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PolyConfig, get_peft_model

from policies import with_lora
from tether.errors import ScoringError
from tether.models.adapting.perturbation import perturbed, small_tensors
from tether.scoring import choose_layout, pack, score, score_alone
from tether.scoring.layout.proof import prove_again
from tether.types import Example
from tiny import ragged_examples, tiny_model

INVOCATION = [5, 6]


def activated():
    """Its adapter acts on what follows the invocation tokens of a row, and it is zero yet."""
    config = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=INVOCATION
    )
    return get_peft_model(tiny_model(), config).eval()


def invoked(examples):
    return [Example.of([*INVOCATION, *e.prompt_ids.tolist()], [c.tolist() for c in e.completion_ids]) for e in examples]


def test_a_perturbed_adapter_comes_back_bit_for_bit():
    """Also after an error; inside, each of its tensors is another one, and nothing of the base is."""
    model = with_lora(modules_to_save=["lm_head"])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    changed = set()

    def fail():
        with perturbed(model):
            changed.update(name for name, p in model.named_parameters() if not torch.equal(p, before[name]))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert changed == set(small_tensors(model)) == {name for name in before if "lora_" in name}
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert small_tensors(tiny_model()) == {}


@pytest.mark.parametrize("some", [False, True], ids=["all rows", "some rows"])
def test_an_adapter_that_acts_by_content_is_seen_while_it_is_zero(some):
    """Report: huggingface/peft#2826. In the tree it acts on other rows' tokens; padded rows are right."""
    model, plain = activated(), ragged_examples()
    examples = [*invoked(plain[:2]), *plain[2:]] if some else invoked(plain)
    choice = choose_layout(model, examples)
    assert choice.layout == "padded"
    assert "tree layout, blocked attention refused" in choice.line
    assert ("acts on some sequences and not on others" in choice.line) == some
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
        batch = pack(invoked(plain))
        alone = score_alone(model, batch)
        torch.testing.assert_close(score(model, batch, **choice.options).token_logps, alone, atol=1e-5, rtol=0)
        assert (score(model, batch).token_logps - alone).abs().max() > 1e-2


def test_an_ordinary_adapter_keeps_the_tree():
    choice = choose_layout(with_lora().eval(), ragged_examples())
    assert choice.layout == "tree"
    assert "adapter perturbed" in choice.line


def test_a_layout_that_updates_made_wrong_stops_the_run():
    """What the start could not show: here a bias that is added to the first token of each row."""
    model, examples = tiny_model(), ragged_examples()
    choice = choose_layout(model, examples)
    gate = torch.zeros(())

    def first_token(module, args, output):
        marked = output.clone()
        marked[:, 0] += gate
        return marked + gate * output.mean(1, keepdim=True)

    model.get_input_embeddings().register_forward_hook(first_token)
    assert prove_again(model, examples, choice, updates=2) < 1e-5
    gate.fill_(0.5)
    with pytest.raises(ScoringError, match=r"After 2 updates the tree layout.*scoring_layout=padded"):
        prove_again(model, examples, choice, updates=2)


def test_an_adapter_that_cannot_be_called_plainly_is_refused():
    """Poly wants the number of a task with each row."""
    model = get_peft_model(tiny_model(), PolyConfig(r=2, n_tasks=2, n_skills=2, target_modules=["q_proj"]))
    with pytest.raises(ScoringError, match=r"cannot be called on one sequence.*task_ids should not be None"):
        choose_layout(model, ragged_examples())


def test_a_head_that_excludes_tokens_is_scored():
    """Minus infinity in the bias of the head, as of padded vocabularies: no difference, and not another prediction."""
    model, examples = tiny_model("phi").eval(), ragged_examples()
    unused = max(int(ids.max()) for e in examples for ids in (e.prompt_ids, *e.completion_ids)) + 1
    with torch.no_grad():
        model.lm_head.bias[unused:] = -torch.inf
    choice, batch = choose_layout(model, examples), pack(examples)
    found = score(model, batch, outputs=("entropy",), **choice.options)
    torch.testing.assert_close(found.token_logps, score_alone(model, batch), atol=1e-5, rtol=0)
    assert found.token_logps.isfinite().all()
    found.token_logps.sum().backward()
    assert model.lm_head.bias.grad.isfinite().all()


def test_a_model_in_float64_is_proved_in_its_own_precision():
    """What it is compared with is not rounded to float32, which would be called a fault of the layout."""
    model, examples = tiny_model().double().eval(), ragged_examples()
    choice = choose_layout(model, examples)
    batch = pack(examples)
    found = score(model, batch, **choice.options)
    torch.testing.assert_close(found.token_logps, score_alone(model, batch), atol=1e-9, rtol=0)
    assert choice.layout == "tree"
