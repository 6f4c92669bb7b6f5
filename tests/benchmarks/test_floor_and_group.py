"""The floor counts what it says, and the group benchmark catches tools that computed different things."""

from __future__ import annotations

import floor
import group
import pytest
import torch
from peft import LoraConfig, get_peft_model

from tiny import tiny_model


def test_the_floor_is_the_products_of_unique_tokens():
    """A worked example: each frozen matrix three times, adapters three times, the head three times on scored tokens."""
    base = tiny_model()
    layers = sum(p.numel() for name, p in base.named_parameters() if "layers" in name and p.dim() == 2)
    head = base.get_output_embeddings().weight.numel()
    model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    adapters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert floor.step_flops(model, 100, 30) == 2 * (3 * 100 * (layers + adapters) + 3 * 30 * head)
    rates = floor.matmul_rates(model, 64, torch.float32, repeats=1)
    assert rates.keys() == {"default", "used"}
    assert min(rates.values()) > 0


def test_prompts_count_once():
    class Trainer:
        train_dataset = ({"prompt_ids": [1] * 5, "completion_ids": [[1] * 2, [1] * 3]},) * 3

    assert floor.step_counts(Trainer, 2) == [(20, 10), (10, 5)]


@pytest.mark.parametrize("wrong", ["logps", "gradient"])
def test_groups_that_differ_are_caught(wrong):
    run = {"logps": [-1.0, -2.0], "gradient": [0.1, 0.01]}
    assert group.check(8, {"tether": [run], "trl": [run]}) == []
    other = {**run, wrong: [value * 1.01 for value in run[wrong]]}
    assert group.check(8, {"tether": [run], "trl": [other]}) == [f"8 completions: the {wrong} of the two tools differ"]


def test_trees_and_padded_rows_are_the_same_sequences():
    """Both scoring functions on a tiny model, TRL's through its own fused head."""
    pytest.importorskip("trl")
    from trl.trainer.utils import add_fused_lm_head

    trees = [([5, 6, 7], [[8, 9], [10], [11, 12, 13]]), ([6], [[7, 8, 9, 10], [5, 5]])]
    model = tiny_model()
    ours = group._tether_logps(model, trees)
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    torch.testing.assert_close(group._trl_logps(model, trees), ours, atol=1e-5, rtol=1e-5)
