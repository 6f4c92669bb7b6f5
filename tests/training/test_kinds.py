"""Laws that hold for every kind of trainer: one result for every split, layout and method of reference."""

from __future__ import annotations

import json
import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaForSequenceClassification

import tether
from support.trainer_kinds import (
    KINDS,
    LABELLED,
    MARGINS,
    PAIRS,
    TOKENIZER,
    assert_alike,
    build,
    logged,
    model_for,
    other,
    weights,
)
from tether.errors import ConfigError, DataError
from tether.training import Reward
from tether.training.algorithms.base import Algorithm

# Kinds that share their code with another one are held to each law too, by `make test-slow`.
_VARIANTS = ("kto on pairs", "apo_zero_unpaired", "simpo", "sft with prompts")
EACH = [pytest.param(name, marks=pytest.mark.slow) if name in _VARIANTS else name for name in KINDS]


@pytest.mark.parametrize("kind", EACH)
@pytest.mark.sweep(1)
def test_one_gradient_for_every_split_of_a_step(kind, tmp_path):
    """INV-25, 41: 8 x 1 equals 4 x 2 and 1 x 8, with uneven lengths and a last step that is not full."""
    runs = []
    for size, accumulation in ((8, 1), (4, 2), (1, 8)):
        run = build(
            tmp_path,
            kind,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            num_train_epochs=2,
            max_steps=-1,
            **other(kind),
        )
        run.train()
        runs.append(run)
    for split in runs[1:]:
        assert_alike(split, runs[0])
    assert logged(runs[0])[0] != pytest.approx(logged(runs[0])[-1], abs=1e-3), "something was learnt"
    if kind in ("kto", "bco"):
        name = {"kto": "kl", "bco": "delta"}[kind]
        assert any(value != 0 for value in logged(runs[0], name)), "the baseline is tested away from 0"
        assert logged(runs[1], name) == pytest.approx(logged(runs[0], name), abs=1e-4)


@pytest.mark.parametrize("kind", EACH)
@pytest.mark.sweep(1)
def test_a_token_budget_changes_nothing(kind, tmp_path):
    """INV-25: a batch of 8 in one forward, and split into several of at most 150 tokens."""
    runs = []
    for tokens in (None, 150):
        rows = Dataset.from_list(KINDS[kind][1])
        settings = {"per_device_train_batch_size": 8, "max_tokens_per_forward": tokens, "eval_dataset": rows}
        run = build(tmp_path, kind, **settings, **other(kind))
        run.train()
        runs.append(run)
    assert_alike(*runs)
    assert logged(runs[1], "num_tokens") == logged(runs[0], "num_tokens")
    first, second = (run.evaluate()["eval_loss"] for run in runs)
    assert second == pytest.approx(first, abs=2e-5)


@pytest.mark.parametrize("kind", EACH)
@pytest.mark.sweep(3)
def test_an_evaluation_is_the_same_for_every_batch_size(kind, tmp_path):
    """INV-26, 41: means, and smallest and largest values, over real rows."""
    found = []
    for size in (1, 5, 12):
        rows = Dataset.from_list(KINDS[kind][1])
        run = build(tmp_path, kind, eval_dataset=rows, per_device_eval_batch_size=size, **other(kind))
        metrics = run.evaluate()
        found.append({name: value for name, value in metrics.items() if not name.endswith(("runtime", "per_second"))})
    assert math.isfinite(found[0]["eval_loss"])
    for evaluation in found[1:]:
        assert evaluation == pytest.approx(found[0], abs=2e-5)


@pytest.mark.parametrize("kind", EACH)
@pytest.mark.sweep(1)
def test_layouts_train_alike(kind, tmp_path):
    """INV-19: tree and padded."""
    runs = []
    for layout in ("tree", "padded"):
        runs.append(build(tmp_path, kind, scoring_layout=layout, **other(kind)))
        runs[-1].train()
        assert runs[-1].run.layout == layout
    assert_alike(*runs)


@pytest.mark.sweep(1)
@pytest.mark.parametrize("kind", [name for name in EACH if name in ("kto", "bco")])
def test_means_of_reference_train_alike(kind, tmp_path):
    """The adapter switched off, and the start values swapped in: the same numbers, exactly 0 before an update."""
    runs = []
    for method in ("adapter_off", "snapshot"):
        lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        run = build(
            tmp_path, kind, peft_config=lora, reference="start", reference_method=method, gradient_accumulation_steps=2
        )
        run.train()
        runs.append(run)
        assert run.run.reference.identity.method == method
        assert logged(run, "rewards/chosen")[0] == 0.0
        assert run.guard.max_difference == 0.0
    assert_alike(*runs)


@pytest.mark.sweep(1)
@pytest.mark.parametrize("kind", ["kto", "bco"])
def test_a_store_gives_the_same_numbers(kind, tmp_path):
    """INV-12: also of the mismatched completions, which are entries of their own."""
    live = build(tmp_path / "live", kind, **other(kind))
    live.train()
    stored = build(tmp_path / "stored", kind, precompute_ref_log_probs=True, **other(kind))
    assert "store" in stored.run.line
    stored.train()
    assert_alike(stored, live)


@pytest.mark.sweep(1)
@pytest.mark.parametrize("kind", ["orpo", "cpo", "sft", "reward"])
def test_no_reference_is_run_where_none_is_needed(kind, tmp_path, monkeypatch, caplog):
    """INV-9: one scoring a step, and no word of a start equality."""
    calls = []
    owner = Reward if kind == "reward" else Algorithm
    original = owner.scoring
    counting = staticmethod(lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs))
    monkeypatch.setattr(owner, "scoring", counting)
    run = build(tmp_path, kind)
    calls.clear()
    run.train()
    assert len(calls) == 3
    assert run.run.reference.identity.meaning == "none"
    assert "start equality" not in caplog.text


@pytest.mark.parametrize("kind", ["kto", "bco", "sft", "reward"])
@pytest.mark.sweep(2)
def test_a_resumed_run_is_the_run_that_was_not_stopped(kind, tmp_path):
    """INV-7: exactly; BCO's running mean travels in the checkpoint."""
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
    whole = build(tmp_path / "whole", kind, **settings, **other(kind))
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert (checkpoint / "objective.json").is_file() == (kind == "bco")
    resumed = build(tmp_path / "resumed", kind, **settings, **other(kind))
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert logged(resumed)[-2:] == logged(whole)[-2:]
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(whole).items())
    if kind == "bco":
        assert logged(resumed, "delta")[-2:] == logged(whole, "delta")[-2:]
        # Negative control: without the running mean the run goes on differently.
        (checkpoint / "objective.json").write_text(json.dumps({"sum": 0.0, "count": 1.0}))
        with pytest.raises(ConfigError, match=r"bytes in objective\.json where"):
            build(tmp_path / "damaged", kind, **settings, **other(kind)).train(resume_from_checkpoint=str(checkpoint))
        manifest = json.loads((checkpoint / "manifest.json").read_text())  # as if these were the bytes written
        del manifest["files"]["objective.json"]
        (checkpoint / "manifest.json").write_text(json.dumps(manifest))
        forgetful = build(tmp_path / "forgetful", kind, **settings, **other(kind))
        forgetful.train(resume_from_checkpoint=str(checkpoint))
        assert logged(forgetful)[-2:] != pytest.approx(logged(whole)[-2:], abs=1e-6)


@pytest.mark.parametrize("label", [True, False])
@pytest.mark.parametrize("kind", ["kto", "bco", "apo_zero_unpaired"])
@pytest.mark.sweep(2)
def test_one_class_alone_is_finite(kind, label, tmp_path):
    """INV-41."""
    rows = [{**row, "label": label} for row in LABELLED]
    run = build(tmp_path, kind, rows=rows, eval_dataset=Dataset.from_list(rows[:1] * 2 + rows[3:4]))
    run.train()
    metrics = run.evaluate()
    assert all(math.isfinite(loss) for loss in logged(run))
    assert math.isfinite(metrics["eval_loss"])
    missing = "rejected" if label else "chosen"
    assert f"eval_rewards/{missing}" not in metrics
    assert "eval_rewards/margins" not in metrics


def test_the_estimate_never_uses_a_row_with_itself(tmp_path):
    """INV-41: by content, also among rows that repeat; and it is the same whatever the order of training."""
    rows = [*LABELLED, *LABELLED[:4], {**LABELLED[0], "completion": LABELLED[5]["completion"]}]
    first, second = (build(tmp_path, "kto", rows=rows, seed=seed, data_seed=seed) for seed in (0, 1))
    prompts, completions = first.train_dataset["prompt_ids"][:], first.train_dataset["completion_ids"][:]
    answers = [[own for other, (own, _) in zip(prompts, completions, strict=True) if other == one] for one in prompts]
    for own_answers, (own, mismatched) in zip(answers, completions, strict=True):
        assert own != mismatched
        assert mismatched not in own_answers
    assert completions == second.train_dataset["completion_ids"][:]


def test_a_long_completion_is_cut_under_a_long_prompt(tmp_path):
    run = build(tmp_path, "kto", max_length=30)
    for prompt, completions in zip(*(run.train_dataset[n] for n in ("prompt_ids", "completion_ids")), strict=True):
        assert all(1 <= len(ids) <= 30 - len(prompt) for ids in completions)


@pytest.mark.parametrize(("weight", "warned"), [(1.0, True), (0.55, False)])
def test_a_balance_is_suggested(weight, warned, tmp_path, caplog):
    """8 of 12 rows are desirable."""
    build(tmp_path, "kto", desirable_weight=weight)
    assert "labels: 8 desirable and 4 undesirable rows" in caplog.text
    assert ("desirable_weight 0.5 to 0.667" in caplog.text) == warned


def test_the_head_of_a_reward_model_trains_beside_an_adapter(tmp_path):
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    run = build(tmp_path, "reward", peft_config=lora)
    before = weights(run)
    assert any("score.modules_to_save" in name for name in before)
    assert lora.modules_to_save is None, "the caller's configuration is left alone"
    run.train()
    after = weights(run)
    assert all(not torch.equal(after[name], value) for name, value in before.items() if "score" in name)


def test_a_saved_reward_model_gives_the_same_rewards(tmp_path):
    """INV-38: reloaded in plain transformers, each sequence alone; and a language model gets a head of its own."""
    model_for("SFT").save_pretrained(tmp_path / "language model")
    TOKENIZER.save_pretrained(tmp_path / "language model")
    run = build(tmp_path / "run", "reward", model=str(tmp_path / "language model"))
    again = build(tmp_path / "run", "reward", model=str(tmp_path / "language model"))
    assert torch.equal(run.policy.score.weight, again.policy.score.weight), "the seed decides the new head"
    run.train()
    run.save_model(str(tmp_path / "reward model"))
    plain = LlamaForSequenceClassification.from_pretrained(tmp_path / "reward model", dtype=torch.float32).eval()
    from tether.scoring.reward import reward, reward_alone

    with torch.no_grad():
        torch.testing.assert_close(reward(run.policy.eval(), run.run.probe), reward_alone(plain, run.run.probe))
    continued = build(tmp_path / "next", "reward", model=str(tmp_path / "reward model"))
    assert torch.equal(continued.policy.score.weight, run.policy.score.weight)


def test_pairs_that_are_too_long_for_a_reward_are_dropped_not_cut(tmp_path):
    run = build(tmp_path, "reward", max_length=50)
    report = run.run.data.reports["train"]
    assert len(run.train_dataset) == report["kept"] < len(MARGINS)
    assert sum(report["cut_completions"]) == 0
    assert sum(report["dropped"].values()) == len(MARGINS) - report["kept"]


@pytest.mark.sweep(3)
@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        ("kto", "beta", 0.5),
        ("kto", "desirable_weight", 2.0),
        ("bco", "undesirable_weight", 2.0),
        ("orpo", "beta", 0.1),
        ("cpo", "cpo_alpha", 0.2),
        ("cpo", "label_smoothing", 0.2),
        ("cpo", "alpha", 0.01),
        ("simpo", "simpo_gamma", 1.0),
        ("sft", "loss_type", "dft"),
        ("sft", "completion_only_loss", False),
        ("reward", "center_rewards_coefficient", 0.5),
    ],
)
def test_options_take_effect(kind, name, value, tmp_path):
    """INV-24: on fixed rows the number changes."""
    evaluation = []
    for settings in ({}, {name: value}):
        run = build(tmp_path, kind, eval_dataset=Dataset.from_list(KINDS[kind][1]), **other(kind), **settings)
        evaluation.append(run.evaluate()["eval_loss"])
    assert evaluation[0] != pytest.approx(evaluation[1], abs=1e-4)


@pytest.mark.parametrize("kind", ["kto", "orpo", "cpo", "reward"])
@pytest.mark.sweep(3)
def test_columns_take_effect_or_are_refused(kind, tmp_path):
    """A weight of 0 takes a row out of the gradient; a margin that no loss reads is an error."""
    rows = KINDS[kind][1]
    losses = []
    for weight in (1.0, 0.25):
        weighted = [{**row, "weight": weight} for row in rows]
        run = build(tmp_path, kind, rows=weighted, eval_dataset=Dataset.from_list(weighted), max_steps=1, **other(kind))
        evaluation = run.evaluate()["eval_loss"]
        run.train()
        losses.append((logged(run)[0], evaluation))
    plain, weighted = losses
    assert all(loss != pytest.approx(other, abs=1e-3) for loss, other in zip(weighted, plain, strict=True))
    if kind in ("kto", "reward"):
        assert weighted == pytest.approx([0.25 * loss for loss in plain], abs=1e-5)
    if kind != "reward":
        with pytest.raises(DataError, match="column `margin`"):
            build(tmp_path, kind, rows=[{**row, "margin": 1.0} for row in rows])


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        ("kto", {"loss_type": "sigmoid"}, "allowed are kto, apo_zero_unpaired, bco"),
        ("kto", {"beta": 0.0}, "above 0"),
        ("kto", {"desirable_weight": -1.0}, "desirable_weight is -1.0"),
        ("orpo", {"beta": 0.0}, "above 0"),
        ("orpo", {"reference": "start"}, "compares with no reference"),
        ("orpo", {"precompute_ref_log_probs": True}, "compares with no reference"),
        ("sft", {"reference_check_steps": 10}, "compares with no reference"),
        ("cpo", {"loss_type": "kto_pair"}, "allowed are sigmoid"),
        ("cpo", {"loss_type": "hinge", "label_smoothing": 0.1}, "does not apply"),
        ("cpo", {"simpo_gamma": 1.0}, "simpo_gamma does not apply to loss 'sigmoid'"),
        ("cpo", {"loss_type": "alphapo", "cpo_alpha": 0.5}, "stands for 'simpo' with cpo_alpha 0"),
        ("sft", {"loss_type": "mle"}, "allowed are nll, dft"),
        ("sft", {"assistant_only_loss": True, "completion_only_loss": False}, "Leave one of them out"),
        ("sft", {"assistant_only_loss": True}, "text, which has no turns"),
        ("reward", {"center_rewards_coefficient": -0.1}, "at least 0"),
        ("reward", {"router_aux_loss_coef": 0.1}, "reward models do not take"),
        ("reward", {"truncation_mode": "keep_end"}, "dropped here, not cut"),
    ],
)
def test_wrong_options_are_refused_at_construction(kind, settings, words, tmp_path):
    """INV-24."""
    with pytest.raises(ConfigError, match=words):
        build(tmp_path, kind, **settings)


def test_another_trainers_configuration_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"args is a DPOConfig; pass a configuration such as KTOConfig"):
        tether.KTOTrainer(
            model=model_for("KTO"),
            args=tether.DPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none"),
            train_dataset=LABELLED,
            processing_class=TOKENIZER,
        )


def test_sft_then_preferences(tmp_path):
    """SFT, then DPO against what SFT left behind: one tool, and the reference is the fine-tuned start."""
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    first = build(tmp_path / "sft", "sft", peft_config=lora, learning_rate=1.0)
    first.train()
    second = tether.DPOTrainer(
        model=first.policy,
        args=tether.DPOConfig(
            output_dir=str(tmp_path / "dpo"), max_steps=2, use_cpu=True, report_to="none", save_strategy="no"
        ),
        train_dataset=PAIRS,
        processing_class=TOKENIZER,
    )
    second.train()
    assert second.run.reference.identity.method == "snapshot"
    assert second.guard.max_difference == 0.0
