"""The encoder-decoder layout gives what each pair of prompt and completion gives alone (INV-16, 17, 19, 21)."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tether.errors import ScoringError
from tether.scoring import choose_layout, pack, score, score_alone
from tether.scoring.layout import encoder_decoder
from tether.types import Example
from tiny import ragged_examples, tiny_model
from tiny_seq2seq import SEQ2SEQ, tiny_seq2seq

OUTPUTS = ("entropy", "top1", "mean_logits")
LAYOUT = "encoder_decoder"


def plain_gradients(model, batch):
    """What the model's own logits give, one completion at a time."""
    model.zero_grad()
    logps = score_alone(model, batch)
    weights = torch.arange(1.0, batch.num_completions + 1)[batch.completion_index]
    (logps * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def layout_gradients(model, batch, checkpointing):
    model.zero_grad()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        # What PEFT and Trainer do for a frozen embedding under checkpointing.
        model.enable_input_require_grads()
    scores = score(model, batch, layout=LAYOUT)
    (scores.logps * torch.arange(1.0, scores.num_completions + 1)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def far(found, expected):
    """Largest difference of a tensor's gradient, relative to all gradients together."""
    assert found.keys() == expected.keys()
    total = torch.stack([g.norm() for g in expected.values()]).norm()
    return max(float((found[name] - expected[name]).norm() / total) for name in expected)


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_the_layout_scores_as_alone(family):
    """INV-16: values, and the proof at start chooses the layout."""
    model, examples = tiny_seq2seq(family).eval(), ragged_examples(completions=3)
    batch = pack(examples)
    with torch.no_grad():
        alone = score_alone(model, batch)
        found = score(model, batch, layout=LAYOUT, outputs=OUTPUTS)
    torch.testing.assert_close(found.token_logps, alone, atol=1e-5, rtol=0)
    assert (found.token_logps <= 0).all()
    assert alone.std() > 0.5, "a model for which every token is alike would prove nothing"
    assert choose_layout(model, examples).layout == LAYOUT


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_the_prompt_is_read_once(family):
    """The encoder sees B prompts, not K."""
    model, batch = tiny_seq2seq(family).eval(), pack(ragged_examples(3, completions=4))
    seen = []
    handle = model.get_encoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape[0]), with_kwargs=True
    )
    with torch.no_grad():
        score(model, batch, layout=LAYOUT)
    handle.remove()
    assert seen == [4]
    assert not model.get_encoder()._forward_hooks, "the hooks are gone afterwards"
    assert not model.get_encoder()._forward_pre_hooks


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_the_first_token_is_predicted_from_the_decoder_start_and_the_whole_prompt(family):
    """The plain formula, written out: logits of `decoder_start, c_1 .. c_{n-1}` predict `c_1 .. c_n`."""
    model = tiny_seq2seq(family).eval()
    prompt, completion = [5, 6, 7, 2], [8, 9, 2]
    start = model.config.decoder_start_token_id
    with torch.no_grad():
        logits = model(
            input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([[start, *completion[:-1]]])
        ).logits[0]
        expected = logits.log_softmax(-1)[torch.arange(3), torch.tensor(completion)]
        found = score(model, pack([Example.of(prompt, [completion])]), layout=LAYOUT).token_logps
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_the_label_shift_of_the_model_is_ours():
    """The loss that the model computes from labels is the mean of the scores, with the sign turned."""
    for family in SEQ2SEQ:
        model = tiny_seq2seq(family).eval()
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([[5, 6, 2]]), labels=torch.tensor([[8, 9, 2]])).loss
            found = score(model, pack([Example.of([5, 6, 2], [[8, 9, 2]])]), layout=LAYOUT).token_logps.mean()
        torch.testing.assert_close(-found, loss, atol=1e-5, rtol=0)


@pytest.mark.sweep(4)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", SEQ2SEQ)
def test_gradients_agree(family, adapter, checkpointing):
    """INV-16, 19, 21: gradients to 1e-4 relative, encoder included, with LoRA and with checkpointing."""
    model, batch = tiny_seq2seq(family), pack(ragged_examples())
    if adapter:
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="SEQ_2_SEQ_LM")
        torch.manual_seed(1)
        model = get_peft_model(model, config)
    model.train()
    expected = plain_gradients(model, batch)
    assert any("encoder" in name and g.abs().max() > 0 for name, g in expected.items() if "decoder" not in name)
    assert far(layout_gradients(model, batch, checkpointing), expected) <= 1e-4


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_only_a_token_and_those_before_it_matter(family):
    """INV-17: siblings, other rows, padding and later tokens change nothing."""
    model = tiny_seq2seq(family).eval()
    prompt, chosen, rejected = [5, 6, 7], [8, 9, 10, 11], [12, 13, 14]
    with torch.no_grad():
        before = score(model, pack([Example.of(prompt, [chosen, rejected])]), layout=LAYOUT).token_logps
        other = Example.of([20] * 9, [[21] * 9])
        after = score(model, pack([Example.of(prompt, [[8, 9, 50, 11], rejected]), other]), layout=LAYOUT).token_logps
    same = torch.isclose(before, after[:7], atol=2e-5, rtol=0)
    assert same.tolist() == [True, True, False, False, True, True, True]


def test_a_mask_leaves_tokens_out_of_the_score_and_nothing_else():
    model = tiny_seq2seq("t5_tied").eval()
    whole = Example.of([5, 6, 7], [[8, 9, 10, 11], [12, 13]])
    part = Example.of([5, 6, 7], [[8, 9, 10, 11], [12, 13]], scored=[[False, True, False, True], [True, False]])
    with torch.no_grad():
        found = score(model, pack([whole, part]), layout=LAYOUT).token_logps
        alone = score_alone(model, pack([whole, part]))
    torch.testing.assert_close(found, alone, atol=2e-5, rtol=0)
    torch.testing.assert_close(found[6:], found[:6][torch.tensor([1, 3, 4])], atol=2e-5, rtol=0)


def _states_of_another_prompt(original):
    @contextmanager
    def broken(model, mask, owner):
        with original(model, mask.roll(1, 0), owner.roll(1)):
            yield

    return broken


def _padding_is_read(original):
    @contextmanager
    def broken(model, mask, owner):
        with original(model, torch.ones_like(mask), owner):
            yield

    return broken


@pytest.mark.parametrize("fault", [_states_of_another_prompt, _padding_is_read])
@pytest.mark.parametrize("family", SEQ2SEQ)
def test_wrong_encoder_states_are_caught(family, fault, monkeypatch):
    """INV-16, negative control: the oracle and the start-up proof see them."""
    model, examples = tiny_seq2seq(family).eval(), ragged_examples()
    monkeypatch.setattr(encoder_decoder, "_encode_once", fault(encoder_decoder._encode_once))
    with torch.no_grad():
        difference = score(model, pack(examples), layout=LAYOUT).token_logps - score_alone(model, pack(examples))
    assert difference.abs().max() > 1e-2
    with pytest.raises(ScoringError, match="encoder_decoder layout refused"):
        choose_layout(model, examples)


def test_a_lost_bias_of_the_logits_is_caught(monkeypatch):
    """Negative control for BART's `final_logits_bias`."""
    model, examples = tiny_seq2seq("bart").eval(), ragged_examples()
    bias = model.final_logits_bias.clone()
    with torch.no_grad():
        alone = score_alone(model, pack(examples))
        model.final_logits_bias.zero_()
        assert (score(model, pack(examples), layout=LAYOUT).token_logps - alone).abs().max() > 1e-2
        model.final_logits_bias.copy_(bias)


def test_layouts_that_do_not_fit_the_model_are_refused():
    with pytest.raises(ScoringError, match="no encoder apart"):
        score(tiny_model(), pack(ragged_examples()), layout=LAYOUT)
    with pytest.raises(ScoringError, match=r"tree layout.* refused"):
        choose_layout(tiny_seq2seq("t5_tied"), ragged_examples(), requested="tree")
    nameless = tiny_seq2seq("t5_tied", decoder_start_token_id=None)
    nameless.generation_config.decoder_start_token_id = None
    with pytest.raises(ScoringError, match="decoder_start_token_id"):
        score(nameless, pack(ragged_examples()), layout=LAYOUT)
