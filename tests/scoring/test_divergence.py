"""KL between two models' distributions at each token: against the plain form, and through the trainer's references."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import nn

from tether import DPOConfig, DPOTrainer
from tether.errors import ReferencePolicyError, ScoringError
from tether.reference.base import require_log_probs_only
from tether.scoring.divergence import frozen_head, token_divergence
from tether.scoring.head import Head
from tether.training.algorithms import dpo
from tether.types import Scores
from tiny import pair_rows, tiny_model, tiny_tokenizer

N, HIDDEN, VOCABULARY = 11, 6, 13
HEADS = {"plain": {}, "scaled": {"scale": 0.25}, "softcapped": {"scale": 3.0, "softcap": 1.5}}


def linear(seed, bias=True):
    torch.manual_seed(seed)
    return nn.Linear(HIDDEN, VOCABULARY, bias=bias, dtype=torch.float64)


def states(seed):
    return torch.randn(N, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def scores(hidden, head):
    return Scores(
        torch.zeros(len(hidden)), torch.zeros(len(hidden), dtype=torch.int64), 1, hidden=hidden, head=head.logits
    )


@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("name", HEADS)
def test_values_and_gradients_equal_the_plain_form(name, chunk):
    reference, policy = Head(linear(0), **HEADS[name]), Head(linear(1), **HEADS[name])
    hidden, weights = states(2).requires_grad_(), torch.linspace(-1, 2, N, dtype=torch.float64)
    expected = torch.nn.functional.kl_div(
        policy.finish(policy.module(hidden)).log_softmax(-1),
        reference.finish(reference.module(states(3))).log_softmax(-1),
        log_target=True,
        reduction="none",
    ).sum(-1)
    inputs = [hidden, *policy.module.parameters()]
    wanted = torch.autograd.grad((expected * weights).sum(), inputs)
    found = token_divergence(scores(states(3), frozen_head(reference)), scores(hidden, policy), chunk=chunk)
    torch.testing.assert_close(found, expected)
    assert (found > 0).all()
    for one, other in zip(torch.autograd.grad((found * weights).sum(), inputs), wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_gradcheck():
    reference, policy = Head(linear(0)), Head(linear(1))
    hidden = states(2)[:3].requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h: token_divergence(scores(states(3)[:3], reference), scores(h, policy), chunk=2), hidden
    )


def test_a_head_that_trains_is_copied_and_a_frozen_one_is_not():
    trains, frozen = Head(linear(0)), Head(linear(0).requires_grad_(False))
    copied = frozen_head(trains)
    before = copied.module.weight.clone()
    with torch.no_grad():
        trains.module.weight += 1
    assert torch.equal(copied.module.weight, before)
    assert frozen_head(frozen) is frozen
    with pytest.raises(ScoringError, match="no plain linear layer"):
        frozen_head(Head(nn.Sequential(linear(0))))


def test_a_reference_that_runs_no_model_is_refused():
    with pytest.raises(ReferencePolicyError, match="log-probs of single tokens only"):
        require_log_probs_only(("hidden",), "a store")
    with pytest.raises(ScoringError, match="outputs=\\('hidden',\\)"):
        token_divergence(scores(states(3), Head(linear(0))), replace(scores(states(3), Head(linear(0))), hidden=None))


@pytest.mark.sweep(1)
@pytest.mark.parametrize("kind", ["lora", "full", "model"])
def test_the_trainer_takes_the_kl_of_whole_distributions(kind, tmp_path, monkeypatch):
    """Before the first update and after some: the KL that enters the loss is that of the models' own logits.

    Full fine-tuning of a tied head is the hard case: the snapshot's head must be kept while the policy's moves.
    """
    tokenizer = tiny_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sizes |= {"num_hidden_layers": 1, "tie_word_embeddings": kind == "full"}
    model = tiny_model(**sizes)
    start = copy.deepcopy(model)
    other = tiny_model(seed=1, **sizes) if kind == "model" else None
    trainer = DPOTrainer(
        model=model,
        ref_model=copy.deepcopy(other),
        args=DPOConfig(
            output_dir=str(tmp_path),
            loss_type="tdpo2",
            max_steps=2,
            learning_rate=2.0 if kind == "lora" else 0.1,
            optim="sgd",
            report_to="none",
            use_cpu=True,
            gradient_checkpointing=False,
            disable_tqdm=True,
            save_strategy="no",
        ),
        train_dataset=Dataset.from_list(pair_rows(4)),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if kind == "lora" else None,
    )
    seen = []
    monkeypatch.setattr(dpo, "token_divergence", lambda *given: seen.append(token_divergence(*given)) or seen[-1])
    trainer.train()
    batch = trainer.run.probe
    with torch.no_grad():
        trainer.compute_loss(trainer.model, {"batch": batch})
        row = torch.cat([batch.examples[0].prompt_ids, batch.examples[0].completion_ids[0]])[None]
        tokens = len(batch.examples[0].completion_ids[0])
        policy, reference = (
            one(row).logits[0, -tokens - 1 : -1].log_softmax(-1) for one in (trainer.policy, other or start)
        )
    expected = (reference.exp() * (reference - policy)).sum(-1)
    torch.testing.assert_close(seen[-1][:tokens], expected, atol=1e-5, rtol=1e-3)
    assert expected.max() > 1e-4
    if kind != "model":
        assert seen[0].abs().max() < 1e-5, "before the first update policy and reference are the same"
