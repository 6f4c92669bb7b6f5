"""Held-out pairs after training: their log-probabilities are the model's own, and the remarkable ones are found."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from tether import DPOConfig, DPOTrainer
from tether.evaluate.pairs import ScoredPair, remarkable, write_pairs
from tether.types import Example
from tiny import QUIET, pair_rows, tiny_model, tiny_tokenizer


def logp(model, prompt, completion):
    """Log-probs of a completion's tokens, from the model's own logits."""
    ids = torch.tensor([[*prompt, *completion]])
    with torch.no_grad():
        table = model(ids).logits[0].float().log_softmax(-1)
    places = range(len(prompt) - 1, ids.shape[1] - 1)
    return torch.stack([table[place, ids[0, place + 1]] for place in places])


def test_margins_and_tokens_are_those_of_the_two_models(tmp_path):
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=1, eos_token_id=2)
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(
            output_dir=str(tmp_path),
            **QUIET,
            max_steps=3,
            learning_rate=0.05,
            per_device_train_batch_size=4,
            per_device_eval_batch_size=3,
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list(pair_rows(8)),
        eval_dataset={"held_out": Dataset.from_list(pair_rows(8))},
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    write_pairs(trainer)
    found = json.loads((tmp_path / "pairs.json").read_text())
    assert (found["set"], found["of"], found["meaning"], found["beta"]) == ("held_out", 8, "start", 0.1)

    policy = trainer.policy.eval()
    rows = [(row["prompt_ids"], row["completion_ids"]) for row in trainer.eval_dataset["held_out"]]
    scored = [[logp(policy, prompt, one) for one in completions] for prompt, completions in rows]
    with policy.disable_adapter():
        before = [[logp(policy, prompt, one) for one in completions] for prompt, completions in rows]
    assert found["policy"] == pytest.approx([float(a.sum() - b.sum()) for a, b in scored], abs=1e-3)
    assert found["reference"] == pytest.approx([float(a.sum() - b.sum()) for a, b in before], abs=1e-3)
    assert max(abs(a - b) for a, b in zip(found["policy"], found["reference"], strict=True)) > 0.1

    assert 4 <= len(found["shown"]) <= 8
    for shown in found["shown"]:
        place = shown["row"]
        for side, one in enumerate(("chosen", "rejected")):
            texts, ratios = zip(*shown[one]["tokens"], strict=True)
            assert "".join(texts) == tokenizer.decode(rows[place][1][side])
            assert list(ratios) == pytest.approx((scored[place][side] - before[place][side]).tolist(), abs=1e-3)
        assert shown["prompt"] == tokenizer.decode(rows[place][0])


def pair(policy, reference, row):
    def logps(value):
        return torch.tensor([float(value)]), torch.tensor([0.0])

    example = Example.of([1], [[2], [3]], row)
    return ScoredPair(example, logps(policy), None if reference is None else logps(reference))


def test_the_pairs_to_look_at_are_one_of_each_kind_first_and_none_twice():
    margins = [(5, 4), (1, -1), (-2, 3), (-4, -1), (0.5, -6), (3, 3)]
    found = remarkable([pair(policy, reference, row) for row, (policy, reference) in enumerate(margins)])
    assert [(why, one.example.source_row) for why, one in found] == [
        ("moved the wrong way", 2),
        ("wrong before and right now", 4),
        ("moved furthest the right way", 1),
        ("moved the wrong way", 3),
        ("moved furthest the right way", 0),
        ("moved furthest the right way", 5),
    ]


def test_without_a_reference_pairs_are_ordered_by_the_policy_alone():
    found = remarkable([pair(policy, None, row) for row, policy in enumerate([1.0, -2.0])])
    assert [(why, one.example.source_row) for why, one in found] == [
        ("in the wrong order", 1),
        ("furthest in the right order", 0),
    ]
