"""The floor counts what it says, and the group benchmark catches tools that computed different things."""

from __future__ import annotations

from types import SimpleNamespace

import floor
import group
import group_update
import pytest
import torch
from peft import LoraConfig, get_peft_model

from tiny import tiny_model, tiny_tokenizer


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


def update_spec(**changes):
    """Two steps of two prompts with two completions each."""
    trees = [([5, 6, 7 + place], [[8, 9, 10, 11 + place], [12, 5]]) for place in range(4)]
    return {"steps": 1, "whole": False, "completion": 4, "beta": 0.1, "trees": trees, **changes}


@pytest.mark.parametrize("wrong", ["losses", "grad_norms", "lengths"])
def test_updates_that_differ_are_caught(wrong):
    run = {"losses": [0.5, 0.25], "grad_norms": [1.0, 2.0], "lengths": [4.0, 4.0]}
    spec = update_spec(whole=wrong == "lengths")
    assert group_update.check(spec, {"tether": [run], "trl": [run]}) == []
    other = {**run, wrong: [value * 1.05 for value in run[wrong]]}
    (said,) = group_update.check(spec, {"tether": [run], "trl": [other]})
    assert said.startswith("beta 0.1: ")


def test_completions_are_drawn_anew_for_every_step():
    options = SimpleNamespace(prompts=2, steps=1, prompt=30, completion=10, spread=0.3)
    trees = group_update.drawn(3, options)
    assert [len(completions) for _, completions in trees] == [3] * 4
    assert len({tuple(prompt) for prompt, _ in trees}) == 4
    assert trees == group_update.drawn(3, options)


@pytest.mark.slow
def test_both_trainers_make_the_same_updates(tmp_path):
    """On a tiny model: losses and gradient norms for the same completions, with a reference."""
    pytest.importorskip("trl")
    tokenizer, runs = tiny_tokenizer(), {}
    sizes = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    for tool in group_update.TOOLS:
        spec = update_spec(tool=tool, folder=str(tmp_path / tool))
        runs[tool] = [group_update.trained(spec, tiny_model(**sizes), tokenizer)]
        assert len(runs[tool][0]["losses"]) == 2
        assert len(runs[tool][0]["seconds"]) == 1
    assert max(runs["trl"][0]["grad_norms"]) > 1e-3
    assert group_update.check(spec, runs) == []
