"""Trainers of sampled completions: what is computed how often, what changes nothing, resume, replay, failures."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import random
import re
import shutil
import sys
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy
import pyarrow.parquet as parquet
import pytest
import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer

import tether.training.online.algorithm
import tether.training.setup.run
from tether import GRPOConfig, GRPOTrainer, OnlineDPOConfig
from tether.errors import ConfigError, DataError, ReferencePolicyError, RewardError, RolloutError
from tether.objectives import OBJECTIVES
from tether.reference import resolve
from tether.rewards import as_rewards
from tether.rollout import Sampling
from tether.scoring import pack, score
from tether.training.algorithms.base import Passes
from tether.training.config import PreferenceConfig
from tether.training.online.config import REFUSED
from tether.training.online.entropy import EntropyBonus
from tether.training.online.experience import Plan
from tether.training.setup.run import build_step
from tether.training.source.rollouts import Shape, require_even
from training.online import CLASSES, PAIRS, PROMPTS, SETTINGS, TOKENIZER, even, policy, steps, trainer, weights

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def trained(folder, algorithm="grpo", **arguments):
    made = trainer(folder, algorithm, **arguments)
    made.train()
    return made


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize(
    ("case", "arguments"),
    [
        ("full", {}),
        ("lora", {"peft_config": LoraConfig(**LORA)}),
        ("pissa", {"peft_config": LoraConfig(**LORA, init_lora_weights="pissa")}),
        ("olora", {"peft_config": LoraConfig(**LORA, init_lora_weights="olora")}),
        ("dora", {"peft_config": LoraConfig(**LORA, use_dora=True)}),
        ("edited", {}),
    ],
)
@pytest.mark.parametrize("algorithm", CLASSES)
@pytest.mark.sweep(5)
def test_at_the_first_step_the_divergence_is_zero_and_every_ratio_one(algorithm, case, arguments, tmp_path):
    """R5: to the bit, for every kind of adapter and a model that was edited in memory."""
    model = policy()
    if case == "edited":
        with torch.no_grad():
            model.lm_head.weight.mul_(1.3)
    made = trained(tmp_path, algorithm, model=model, beta=0.1, max_steps=2, num_iterations=2, **arguments)
    first, second = steps(made)
    assert first["kl"] == first["kl/k1"] == 0.0
    assert first["clip_ratio/region_mean"] == 0.0
    assert second["kl"] != 0.0
    assert made.guard.max_difference == 0.0


def test_a_continued_adapter_is_its_own_start(tmp_path):
    """R5, TRL #3194: the reference is the policy at the start and not its base."""
    model = get_peft_model(policy(), LoraConfig(**LORA))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    made = trained(tmp_path, model=model, beta=0.1, max_steps=2)
    assert [log["kl"] == 0.0 for log in steps(made)] == [True, False]


@pytest.mark.parametrize("case", ["lora", "full", "model"])
def test_a_reference_is_assigned_once_and_scored_as_the_policy_is(case, tmp_path, monkeypatch):
    """Named in TRL's pull request 5877: one assignment, one scoring path, and an adapter is switched on the module that
    trains; in training and evaluation."""
    calls, resolved = [], []

    def counting(model, batch, *, temperature, **options):
        own = [one for one in model.modules() if isinstance(one, BaseTunerLayer)]
        calls.append((model, temperature, any(one.disable_adapters for one in own), torch.is_grad_enabled()))
        return score(model, batch, temperature=temperature, **options)

    def once(*arguments):
        resolved.append(resolve(*arguments))
        return resolved[-1]

    monkeypatch.setattr(tether.training.online.algorithm, "score", counting)
    monkeypatch.setattr(tether.training.setup.run, "resolve", once)
    own = {"lora": {"peft_config": LoraConfig(**LORA)}, "full": {}, "model": {"ref_model": policy(1)}}[case]
    settings = {"eval_dataset": PROMPTS[:2], "eval_strategy": "steps", "eval_steps": 1}
    made = trainer(tmp_path, beta=0.1, temperature=0.7, max_steps=2, **settings, **own)
    assigned = made.run.reference
    made.train()
    assert resolved == [resolved[0]]
    assert made.run.reference is assigned is resolved[0].reference
    assert {temperature for _, temperature, _, _ in calls} == {0.7}
    assert any(graded for *_, graded in calls), "updates go the same way"
    scored = {id(model) for model, *_ in calls}
    assert scored == {id(made.policy)} | ({id(own["ref_model"])} if case == "model" else set())
    switched = [(id(model), graded) for model, _, off, graded in calls if off]
    assert set(switched) == ({(id(made.policy), False)} if case == "lora" else set())


@pytest.mark.parametrize("case", ["dropout", "bfloat16", "in training mode"])
def test_a_policy_and_its_reference_are_prepared_alike(case, tmp_path):
    """Named in TRL's pull request 5877: dropout, the head's dtype and preparation are dealt with before a score."""
    changes, own = {}, {}
    if case == "dropout":
        changes, own = {"attention_dropout": 0.5}, {"peft_config": LoraConfig(**LORA, lora_dropout=0.5)}
    model = policy(**changes)
    if case == "bfloat16":
        model = model.to(torch.bfloat16)
    if case == "in training mode":
        own = {"ref_model": policy().train()}
    made = trained(tmp_path, model=model, beta=0.1, max_steps=1, **own)
    assert steps(made)[0]["kl"] == 0.0
    assert made.run.reference.score(made.run.probe).token_logps.dtype == torch.float32
    assert all(one.p == 0 for one in made.policy.modules() if isinstance(one, torch.nn.Dropout))


def test_at_learning_rate_zero_nothing_ever_moves(tmp_path):
    """R5: KL 0.0 and ratios 1.0 for ever, with several updates of each rollout, accumulation and a small budget."""
    made = trained(
        tmp_path,
        beta=0.1,
        learning_rate=0.0,
        num_iterations=2,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        steps_per_generation=4,
        max_tokens_per_forward=30,
        max_steps=6,
        reference_check_steps=0,
    )
    for log in steps(made):
        assert log["kl"] == log["clip_ratio/region_mean"] == 0.0


def test_mixed_precision_agrees_within_what_it_rounds(tmp_path, caplog):
    """bfloat16 under autocast, on a CPU: engine and trainer compute in it alike, and the first KL is 0."""
    with caplog.at_level("INFO", "tether"):
        made = trained(tmp_path, beta=0.1, bf16=True, max_steps=2)
    assert "rollouts: tree engine, at most" in caplog.text
    assert "(allowed 3e-01)" in caplog.text
    assert steps(made)[0]["kl"] == 0.0


def test_a_head_in_float32_is_one_of_engine_and_trainer(tmp_path):
    """`cast_lm_head_to_fp32`: under bfloat16 other numbers than without, and the same in sampling and scoring."""
    found = []
    for wide in (False, True):
        made = trained(tmp_path / str(wide), beta=0.1, bf16=True, max_steps=2, cast_lm_head_to_fp32=wide)
        assert steps(made)[0]["kl"] == 0.0
        found.append(made.run.reference.score(made.run.probe).token_logps)
        assert made.run.algorithm.made.engine._wide_head == wide
    assert 1e-4 < (found[0] - found[1]).abs().max() < 0.3


class Counted:
    """How often the policy and the reference are asked, and for how many tokens."""

    def __init__(self, made):
        self.policy, self.reference, self.tokens = 0, 0, 0
        run = made.run
        scorer, score = run.scorer, run.reference.score

        def policy(model, batch, **options):
            self.policy += 1
            self.tokens += batch.input_ids.numel()
            return scorer(model, batch, **options)

        def reference(batch, outputs=()):
            self.reference += run.reference.identity.meaning != "none"
            return score(batch, outputs)

        object.__setattr__(run, "scorer", policy)
        run.reference.score = reference


@pytest.mark.sweep(1)
@pytest.mark.parametrize(
    ("arguments", "policy_passes", "reference_passes"),
    [({}, 3, 0), ({"beta": 0.1}, 3, 2), ({"num_iterations": 3}, 4, 0), ({"num_iterations": 3, "beta": 0.1}, 4, 1)],
    ids=str,
)
def test_passes_are_counted(arguments, policy_passes, reference_passes, tmp_path):
    """R6, R7: of 3 updates; beta 0 has no reference at all, and each rollout is scored once by it, however often it is
    trained on."""
    made = trainer(tmp_path, reference_check_steps=0, max_tokens_per_forward=None, **arguments)
    counted = Counted(made)
    made.train()
    # One more pass of the policy: the proof that engine and trainer agree; and one of the start guard with a reference.
    guards = 1 + (1 if "beta" in arguments else 0)
    rollouts = 1 if "num_iterations" in arguments else 3
    assert counted.policy == policy_passes + 1 + (guards - 1)
    expected = {0: 0}.get(reference_passes, rollouts + 1 + 1)  # the start guard and the probe that must not move
    assert counted.reference == expected
    if not reference_passes:
        assert made.run.reference.identity.meaning == "none"


def test_an_evaluation_is_scored_once_by_the_reference(tmp_path):
    """Of 4 prompts in 2 batches; the loss sees what it said when the completions were made."""
    made = trainer(tmp_path, beta=0.1, eval_dataset=PROMPTS[:4], reference_check_steps=0, max_tokens_per_forward=None)
    made.train()
    counted = Counted(made)
    found = made.evaluate()
    assert counted.reference == 2
    assert found["eval_kl"] > 0


def test_the_update_computes_each_prompt_and_each_distinct_completion_once(tmp_path):
    """R4; of completions of which some are equal. Control: a row for each sequence takes more."""

    def some_equal(prompts, trainer):
        ids = [[20 + k // 2, 30, 2] for k in range(len(prompts))]
        return {"prompt_ids": [[5, 6, 7 + k // 4] for k in range(len(ids))], "completion_ids": ids, "logprobs": None}

    made = trainer(tmp_path, max_steps=1, max_tokens_per_forward=None, rollout_func=some_equal)
    batch = next(iter(made.get_train_dataloader()))["batch"]
    counted = Counted(made)
    made.training_step(made.model, {"batch": batch})
    prompts = {tuple(one.prompt_ids.tolist()) for one in batch.examples}
    sequences = [
        (tuple(one.prompt_ids.tolist()), tuple(i.tolist())) for one in batch.examples for i in one.completion_ids
    ]
    expected = sum(map(len, prompts)) + sum(len(ids) for _, ids in set(sequences))
    assert counted.tokens == expected < sum(len(prompt) + len(ids) for prompt, ids in sequences) / 2


# -- one gradient ------------------------------------------------------------------------------------------------------


def gradient(made, batches):
    """Gradients of a step of several batches, through the trainer's own loss."""
    made.model.zero_grad()
    step = build_step([{"batch": pack(batch)} for batch in batches], made.run, made.accelerator, made.args.device)
    step = made._with_context(step)
    for part in step.parts:
        made.compute_loss(made.model, part, num_items_in_batch=step).backward()
    return torch.cat([one.grad.flatten() for one in made.model.parameters() if one.grad is not None])


def ragged(prompts, trainer):
    """Completions of 1 to 8 tokens, of which every fourth does not end."""
    ids = [[20 + k, *range(30, 30 + k), *([2] if k % 4 else [])] for k in range(len(prompts))]
    return {"prompt_ids": [[5, 6, 7 + k // 4] for k in range(len(ids))], "completion_ids": ids, "logprobs": None}


@pytest.mark.sweep(3)
@pytest.mark.parametrize("loss", [*OBJECTIVES["grpo"], "rloo", "entropy"])
def test_one_gradient_for_every_split(loss, tmp_path):
    """R9, R13: one batch of 8, two of 4, eight of 1, any token budget; ragged, with a truncated completion left out;
    with a bonus for the entropy of the tokens with the highest."""
    algorithm = "rloo" if loss == "rloo" else "grpo"
    own = {} if loss == "rloo" else {"loss_type": loss, **({"epsilon_high": 5.0} if loss == "cispo" else {})}
    own = {"entropy_coef": 0.5, "top_entropy_quantile": 0.4} if loss == "entropy" else own
    off = {} if loss == "reinforce" else {"num_iterations": 2}
    made = trainer(
        tmp_path,
        algorithm,
        **own,
        **off,
        beta=0.05,
        mask_truncated_completions=True,
        max_tokens_per_forward=None,
        rollout_func=ragged,
    )
    (batch,) = made.run.source._make(_wanted(made))
    assert {0.0, 1.0} == set(torch.cat([one.completion_values["weight"] for one in batch]).tolist())
    with torch.no_grad():  # off policy, so that ratios and clips count
        made.model.lm_head.weight.mul_(1.02)
    whole = gradient(made, [batch])
    single = [_pieces(one) for one in batch]
    assert whole.abs().max() > 0
    for batches in ([batch[:1], batch[1:]], [[piece] for pieces in single for piece in pieces]):
        torch.testing.assert_close(gradient(made, batches), whole, atol=1e-6, rtol=1e-4)
    made.run.budget.tokens = 40
    torch.testing.assert_close(
        gradient(made, [[piece for pieces in single for piece in pieces]]), whole, atol=1e-6, rtol=1e-4
    )


def test_means_of_means_would_be_another_gradient(tmp_path):
    """R9's control: batches reduced by their own tokens, and then averaged, are far from the step."""
    made = trainer(tmp_path, max_tokens_per_forward=None, rollout_func=ragged)
    (batch,) = made.run.source._make(_wanted(made))
    whole = gradient(made, [batch])
    torch.testing.assert_close(gradient(made, [batch[:1], batch[1:]]), whole, atol=1e-6, rtol=1e-4)
    apart = (gradient(made, [batch[:1]]) + gradient(made, [[_pieces(batch[1])[0]]])) / 2
    assert (apart - whole).abs().max() > 1e-2 * whole.abs().max()


def _wanted(made):
    source = made.run.source
    order = source._shape.order(len(source.rows), 0)
    shares = list(source._shape.shares(order[: source._shape.prompts]))
    return source._wanted(source.rows, source._raw, shares, 0, source._shape.group)


def _pieces(example):
    """An example as one of each of its completions."""
    return [
        replace(
            example,
            completion_ids=(example.completion_ids[k],),
            scored=None if example.scored is None else (example.scored[k],),
            completion_values={name: values[k : k + 1] for name, values in example.completion_values.items()},
            token_values={name: (values[k],) for name, values in example.token_values.items()},
        )
        for k in range(len(example.completion_ids))
    ]


def test_skipped_groups_change_nothing(tmp_path):
    """R14: at beta 0 the gradient of `keep`; and they cost a token a completion."""

    def sometimes(completion_ids, want):
        return [float(w and sum(ids) % 2) for ids, w in zip(completion_ids, want, strict=True)]

    found, tokens = [], []
    for choice in ("keep", "skip"):
        made = trainer(tmp_path / choice, rewards=sometimes, zero_variance=choice, loss_type="grpo")
        counted = Counted(made)
        made.train()
        found.append(weights(made))
        tokens.append(counted.tokens)
        assert steps(made)[0]["frac_reward_zero_std"] > 0
        assert (steps(made)[0]["advantages/left_out"] > 0) == (choice == "skip")
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], atol=1e-6, rtol=1e-5)
    assert not torch.equal(found[0]["lm_head.weight"], policy().lm_head.weight), "and something was trained"
    assert tokens[1] < tokens[0]


@pytest.mark.slow
def test_sums_may_be_equal_where_rewards_that_are_normalised_apart_are_not(tmp_path):
    """R14 for `normalize_then_sum`: a group is skipped where each function gives one number."""

    def one(completion_ids, want):
        return [float(sum(ids) % 2) if w else 1.0 for ids, w in zip(completion_ids, want, strict=True)]

    def other(completion_ids, want):
        return [1.0 - value for value in one(completion_ids, want)]

    found = []
    for choice in ("keep", "skip"):
        settings = {"multi_objective_aggregation": "normalize_then_sum", "reward_weights": [1.0, 0.5]}
        made = trainer(tmp_path / choice, rewards=[one, other], zero_variance=choice, loss_type="grpo", **settings)
        made.train()
        found.append(weights(made))
    assert {log["frac_reward_zero_std"] for log in steps(made)} <= {0.0, 0.5, 1.0}
    assert not torch.equal(found[0]["lm_head.weight"], policy().lm_head.weight), "something is learnt"
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], atol=1e-6, rtol=1e-5)


def test_equal_sums_of_functions_that_differ(tmp_path):
    rewards = torch.tensor([[1.0, 0.0, 5.0], [0.0, 1.0, 6.0], [1.0, 1.0, 7.0], [1.0, 1.0, 8.0]])
    functions = as_rewards([lambda: 0, len, max], [1.0, 1.0, 0.0])
    plan = Plan(Sampling(1.0, 4, ()), "auto", functions, None, None)
    assert plan.equal(rewards, 2).tolist() == [True] * 4
    assert replace(plan, apart=True).equal(rewards, 2).tolist() == [False, False, True, True]


@pytest.mark.slow
def test_groups_without_variance_are_replaced(tmp_path):
    """Dynamic sampling: other prompts take their place, counted and kept; a function of the seed, so that a resumed run
    and a replayed one have the same."""

    def some(completion_ids, want):
        return [float(w * sum(ids)) for ids, w in zip(completion_ids, want, strict=True)]

    settings = {"rewards": some, "save_strategy": "steps", "save_steps": 1, "zero_variance": "resample"}
    made = trained(tmp_path / "run", **settings)
    plain = trained(tmp_path / "plain", rewards=some)
    assert max(log["frac_reward_zero_std"] for log in steps(plain)) > 0
    for log in steps(made):
        assert log["frac_reward_zero_std"] == 0.0
    replaced = [log["groups/resampled"] for log in steps(made)]
    assert max(replaced) > 0
    for number, count in enumerate(replaced):
        file = tmp_path / "run" / "rollouts" / f"{number:06d}-0.parquet"
        rows = parquet.read_table(file)["source_row"].to_pylist()
        assert len(rows) == 8 + 4 * count
        assert len(set(rows)) == len(rows) // 4, "no prompt twice"
    shutil.copytree(tmp_path / "run" / "checkpoint-1", tmp_path / "again" / "checkpoint-1")
    again = trainer(tmp_path / "again", **settings)
    again.train(resume_from_checkpoint=True)
    assert_same(weights(made), weights(again))
    replayed = trained(tmp_path / "replayed", **settings, replay_rollouts=str(tmp_path / "run"))
    for name, tensor in weights(made).items():
        torch.testing.assert_close(weights(replayed)[name], tensor, atol=1e-5, rtol=0, msg=name)


def test_resampling_ends(tmp_path):
    """All rewards equal: the rounds end, and so do the prompts."""
    made = trained(
        tmp_path,
        rewards=lambda completion_ids: [1.0] * len(completion_ids),
        zero_variance="resample",
        resample_rounds=9,
        max_steps=1,
    )
    (log,) = steps(made)
    assert log["groups/resampled"] == 6.0, "the prompts that are no part of the rollout"
    assert log["frac_reward_zero_std"] == 1.0


def test_shares_of_processes_are_those_of_one(tmp_path):
    """R10: completions of a rollout, in their order, whatever the processes and batches."""
    whole = Shape(4, 16, 1, 1, 1, 0, 0, False, 4, 4)
    (expected,) = whole.shares([3, 1, 4, 2])
    flat = [(row, k) for row, branches in expected for k in branches]
    for processes, batch, batches in ((2, 8, 1), (2, 2, 4), (4, 1, 4), (1, 3, 16)):
        found = []
        for process in range(processes):
            shape = Shape(4, batch, batches, 1, processes, process, 0, False, 4, 4)
            found += [(row, k) for share in shape.shares([3, 1, 4, 2] * 3) for row, branches in share for k in branches]
        assert found[:16] == flat


# -- resume and replay -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("algorithm", "arguments"),
    [
        ("grpo", {}),
        ("rloo", {"beta": 0.1, "peft_config": LoraConfig(**LORA)}),
        ("grpo", {"beta": 0.1, "num_iterations": 2, "per_device_train_batch_size": 4, "steps_per_generation": 2}),
    ],
    ids=["one update", "lora", "inside a rollout"],
)
@pytest.mark.sweep(1)
def test_a_killed_run_goes_on_to_the_same_bits(algorithm, arguments, tmp_path):
    """R15: resumed after every step, also between two updates of one rollout; over the end of an epoch."""
    settings = {
        "max_steps": 7,
        "save_strategy": "steps",
        "save_steps": 1,
        "optim": "adamw_torch",
        "learning_rate": 0.01,
    }
    whole = trained(tmp_path / "whole", algorithm, **settings, **arguments)
    for step in (1, 3, 4):
        folder = tmp_path / f"resumed-{step}"
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        resumed = trainer(folder, algorithm, **settings, **arguments)
        resumed.train(resume_from_checkpoint=True)
        assert_same(weights(whole), weights(resumed))
        for mine, theirs in zip(steps(resumed), steps(whole), strict=True):
            timed = ("seconds", "per_second", "gib")
            for name in theirs:
                assert name.endswith(timed) or mine[name] == theirs[name], (step, name)


def test_replay_gives_the_same_weights_and_another_loss_others(tmp_path):
    """R16: to the bit; with another loss it is training off policy, corrected for."""
    first = trained(tmp_path / "first")
    same = trained(
        tmp_path / "same", replay_rollouts=str(tmp_path / "first"), vllm_importance_sampling_correction=False
    )
    assert_same(weights(first), weights(same))
    other = trained(tmp_path / "other", replay_rollouts=str(tmp_path / "first"), loss_type="sapo")
    assert steps(other)[0]["sampling/sampling_logp_difference/max"] < 1e-5
    assert steps(other)[2]["sampling/sampling_logp_difference/max"] > 1e-4
    assert not torch.equal(weights(first)["lm_head.weight"], weights(other)["lm_head.weight"])


def test_evaluation_changes_nothing_and_judges_completions(tmp_path):
    """R22, and names of TRL's with `eval_`."""
    quiet = trained(tmp_path / "quiet")
    seen = trained(tmp_path / "seen", eval_dataset=PROMPTS[:4], eval_strategy="steps", eval_steps=1)
    assert_same(weights(quiet), weights(seen))
    evaluations = [log for log in seen.state.log_history if "eval_reward" in log]
    assert len(evaluations) == 3
    assert 0 < evaluations[0]["eval_reward"] < 1
    assert evaluations[0]["eval_completions/mean_length"] > 0
    assert seen.evaluate()["eval_reward"] == evaluations[-1]["eval_reward"], "draws are those of every evaluation"


def test_draws_are_functions_and_no_generator_is_kept(tmp_path):
    """R22: whatever rewards draw from the generators of torch, numpy and Python."""

    def draws(completion_ids, want):
        torch.rand(7)
        numpy.random.rand(3)
        random.random()
        return even(completion_ids, want)

    plain = trained(tmp_path / "plain", max_steps=2, max_completion_length=4)
    other = trained(tmp_path / "other", rewards=draws, max_steps=2, max_completion_length=4)
    assert_same(weights(plain), weights(other))


# -- failures ----------------------------------------------------------------------------------------------------------


def test_a_reward_that_raises_loses_nothing(tmp_path):
    """R18, R19: completions on disk, the steps before in a checkpoint, function and row named; resumed after repair."""
    calls = []

    def fragile(completion_ids, want):
        calls.append(1)
        if len(calls) >= 3 and not (tmp_path / "repaired").exists():
            raise ValueError("no such column")
        return even(completion_ids, want)

    made = trainer(tmp_path / "run", rewards=fragile)
    with pytest.raises(
        RewardError,
        match=r"'fragile' failed on row \d.*no such column \(line \d+ of .*test_online.py\). Correct the function. The "
        r"completions are kept in .*000002-0.parquet. The 2 steps before it are kept",
    ):
        made.train()
    kept = parquet.read_table(tmp_path / "run" / "rollouts" / "000002-0.parquet")
    assert kept.num_rows == 8
    assert kept["rewards"].to_pylist() == [None] * 8
    assert json.loads(parquet.read_table(tmp_path / "run" / "rollouts" / "000001-0.parquet")["rewards"][0].as_py())[
        "fragile"
    ]
    (tmp_path / "repaired").touch()
    resumed = trainer(tmp_path / "run", rewards=fragile)
    resumed.train(resume_from_checkpoint=True)
    calls.clear()
    whole = trained(tmp_path / "whole", rewards=fragile)
    assert_same(weights(whole), weights(resumed))


def test_a_reward_that_raises_in_an_evaluation_loses_no_step(tmp_path):
    """R19: the steps before it are saved then too."""
    calls = []

    def fragile(completion_ids, want):
        calls.append(1)
        if len(calls) == 3:
            raise ValueError("in an evaluation")
        return even(completion_ids, want)

    own = {"eval_dataset": PROMPTS[:2], "eval_strategy": "steps", "eval_steps": 2, "max_completion_length": 3}
    with pytest.raises(RewardError, match=r"in an evaluation .*The 2 steps before it are kept in .*checkpoint-2"):
        trained(tmp_path, rewards=fragile, **own)
    resumed = trainer(tmp_path, rewards=fragile, **own)
    resumed.train(resume_from_checkpoint=True)
    assert len(steps(resumed)) == 3
    calls.clear()
    calls.extend([1, 1])
    with pytest.raises(RewardError, match=r"Correct the function\.$"):
        resumed.evaluate()


@pytest.mark.sweep(1)
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"temperature": 0.9}, "temperature 0.9 in place of 1.0"),
        ({"num_generations": 2}, "num_generations 2 in place of 4"),
        ({"vllm_importance_sampling_clip_max": 2.0}, "vllm_importance_sampling_clip_max 2.0 in place of 3.0"),
        ({"shuffle_dataset": False}, "shuffle_dataset false in place of true"),
        ({"max_prompt_length": 3}, "max_prompt_length 3 in place of null"),
        ({"rewards": [even, lambda completion_ids: [0.0] * len(completion_ids)]}, "rewards .* then and .* now"),
    ],
)
def test_a_run_is_not_resumed_with_other_rollouts(changed, said, tmp_path):
    """Section 8: refused with both values; replay is the way."""
    trained(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    with pytest.raises(ConfigError, match=said):
        trainer(tmp_path, **changed).train(resume_from_checkpoint=True)


def test_a_resumed_run_may_wait_longer_and_show_more(tmp_path):
    """Nothing that is trained on depends on them; after a reward that was too slow there is no other way on."""
    trained(tmp_path, max_steps=1, reward_timeout=20.0, save_strategy="steps", save_steps=1)
    shown = {"log_completions": True, "num_completions_to_print": 0, "keep_rollouts": False}
    made = trainer(tmp_path, max_steps=2, reward_timeout=60.0, reward_on_error="none", **shown)
    made.train(resume_from_checkpoint=True)
    assert made.state.global_step == 2


def test_rollout_functions_are_checked_and_trained_on(tmp_path):
    """Ids as they come (R24), tokens of others have no gradient (R13), fields reach rewards."""
    seen = {}

    def sample(prompts, trainer):
        ids = [[10 + k % 4, 11, 12, 2] for k in range(len(prompts))]
        return {
            "prompt_ids": [[5, 6, 7]] * len(prompts),
            "completion_ids": ids,
            "logprobs": None,
            "env_mask": [[1, 0, 0, 1]] * len(prompts),
            "turns": [k % 4 for k in range(len(prompts))],
        }

    def by_turns(turns, finish):
        seen.update(turns=turns, finish=finish)
        return [float(turn) for turn in turns]

    made = trained(tmp_path, rewards=by_turns, rollout_func=sample, max_steps=1, train_dataset=PROMPTS)
    assert seen["turns"] == [0, 1, 2, 3] * 2
    assert seen["finish"] == ["stop"] * 8
    (log,) = steps(made)
    assert log["completions/mean_length"] == 2.0
    assert log["completions/clipped_ratio"] == 0.0
    batch = made.run.source._held[1][0]
    assert batch[0].prompt_ids.tolist() == [5, 6, 7]
    assert pack(batch).targets.tolist()[:4] == [10, 2, 11, 2]

    def wrong(prompts, trainer):
        return {**sample(prompts, trainer), "logprobs": [[0.0]] * len(prompts)}

    with pytest.raises(RolloutError, match=r"1 numbers in 'logprobs' for completion 0, which has 4 tokens"):
        trained(tmp_path / "wrong", rewards=by_turns, rollout_func=wrong)

    def masked(prompts, trainer):
        return {**sample(prompts, trainer), "env_mask": [[0] * 4] * len(prompts)}

    (log,) = steps(trained(tmp_path / "masked", rewards=by_turns, rollout_func=masked, max_steps=1))
    assert (log["completions/mean_length"], log["loss"]) == (0.0, 0.0), "nothing that the policy wrote"


def test_a_completion_that_others_wrote_alone_has_no_gradient(tmp_path):
    """R13; OpenRLHF #1239: one of each group, whose tokens change nothing, the first of them neither."""
    found = []
    for first in (10, 40):

        def sample(prompts, trainer, first=first):
            ids = [[20 + k, 11, 2] if k % 4 else [first, 11, 2] for k in range(len(prompts))]
            masks = [[1, 1, 1] if k % 4 else [0, 0, 0] for k in range(len(prompts))]
            return {"prompt_ids": [[5, 6, 7]] * 8, "completion_ids": ids, "logprobs": None, "env_mask": masks}

        settings = {"rewards": lambda turn: [float(k % 4) for k in range(len(turn))], "rollout_func": sample}
        rows = [{"prompt": "p", "turn": k} for k in range(8)]
        made = trained(tmp_path / str(first), train_dataset=rows, loss_type="grpo", max_steps=1, **settings)
        assert steps(made)[0]["advantages/left_out"] == 0.25
        found.append(weights(made))
    assert_same(*found)


def test_what_a_rollout_function_does_not_say_of_an_end_is_trl_s_rule(tmp_path):
    """R20: an end id, of tokenizer or model, or padding; what it says itself counts more."""
    model = policy()
    model.generation_config.eos_token_id = [2, 9]
    said = {"finish": None}

    def sample(prompts, trainer):
        ends = [2, 9, TOKENIZER.pad_token_id, 30] * (len(prompts) // 4)
        ids = [[10, 11, end] for end in ends]
        return {"prompt_ids": [[5, 6, 7]] * len(ids), "completion_ids": ids, "logprobs": None, **said}

    seen = []

    def heard(completion_ids, finish):
        seen.extend(finish)
        return [float(len(seen))] * len(completion_ids)

    settings = {"rewards": heard, "rollout_func": sample, "max_steps": 1}
    trained(tmp_path / "rule", model=model, **settings)
    said["finish"] = ["length", "stop", "stop", "stop"] * 2
    trained(tmp_path / "said", model=model, **settings)
    assert seen == ["stop", "stop", "stop", "length"] * 2 + said["finish"]


def test_the_calculator_of_the_documentation_answers_and_has_no_gradient(tmp_path):
    """The script of docs/rollouts.md, as it stands there; what the calculator says has no gradient."""
    text = (Path(__file__).parents[2] / "docs" / "rollouts.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    (tmp_path / "calculator.py").write_text(script, encoding="utf-8")
    page = importlib.util.module_from_spec(
        importlib.util.spec_from_file_location("calculator", tmp_path / "calculator.py")
    )
    page.__spec__.loader.exec_module(page)
    page.ASKED = re.compile(r"()()")  # a random model never asks; here it always has, for nothing
    plain, found = page.with_calculator, []
    page.int = len

    def kept(prompts, trainer):
        found.append(plain(prompts, trainer))
        return found[-1]

    def asked(asked, completion_ids, **_):
        return [sum(ids) % 7 + one for one, ids in zip(asked, completion_ids, strict=True)]

    made = trained(tmp_path, rewards=asked, rollout_func=kept, max_steps=2, loss_type="grpo")
    tool = TOKENIZER(" = 0\n", add_special_tokens=False).input_ids
    for one in found:
        assert one["asked"] == [True] * 8
        for ids, mask in zip(one["completion_ids"], one["env_mask"], strict=True):
            first, last = mask.index(0), len(mask) - mask[::-1].index(0)
            assert ids[first:last] == tool
            assert mask[:first] == [1] * first
            assert mask[last:] == [1] * (len(ids) - last) != []
    log = steps(made)[0]
    assert log["sampling/sampling_logp_difference/max"] < 1e-5, "of what the policy wrote, in both turns"
    assert log["completions/mean_length"] == sum(sum(mask) for mask in found[0]["env_mask"]) / 8


def test_a_rollout_function_may_bring_the_rewards(tmp_path):
    def sample(prompts, trainer):
        ids = [[10 + k % 4, 11, 2] for k in range(len(prompts))]
        rewards = [float(k % 4) for k in range(len(prompts))]
        found = {"completion_ids": ids, "logprobs": None, "rewards": rewards}
        return {"prompt_ids": [[5, 6, 7]] * len(prompts), **found}

    made = trained(tmp_path, rewards=None, rollout_func=sample, max_steps=1)
    (log,) = steps(made)
    assert log["reward"] == 1.5
    assert log["frac_reward_zero_std"] == 0.0
    advantages = made.run.source._held[1][0][0].completion_values["advantage"]
    assert advantages[0] < advantages[1] < 0 < advantages[2] < advantages[3]


def test_what_cannot_be_is_refused_before_weights_load(tmp_path):
    def wants_gold(completions, gold):
        return []

    policy().save_pretrained(tmp_path / "model")
    for file in (tmp_path / "model").glob("*.safetensors"):
        file.write_bytes(b"no weights")
    with pytest.raises(ConfigError, match="'wants_gold' needs 'gold', and the rows have the columns prompt, want"):
        trainer(tmp_path / "run", model=str(tmp_path / "model"), rewards=wants_gold)


def test_columns_are_those_of_each_set_and_none_is_hidden_silently(tmp_path, caplog):
    """An evaluation's rows are known as early; `completion`, a given answer, is a column like any; one that has the
    name of what is sampled is said."""
    seen = {}

    def told(completions, finish, completion):
        seen.update(finish=finish, completion=completion)
        return [1.0] * len(completions)

    rows = [{**row, "completion": "gold", "finish": "never"} for row in PROMPTS]
    with caplog.at_level("INFO", "tether"):
        trained(tmp_path / "run", rewards=told, train_dataset=rows, max_steps=1)
    assert seen["completion"] == ["gold"] * 8
    assert set(seen["finish"]) <= {"stop", "length"}
    assert "columns for them: want, completion" in caplog.text
    assert "rewards: by finish functions are given what was sampled, and not the rows' columns" in caplog.text
    with pytest.raises(ConfigError, match="eval: The reward function 'told' needs 'completion', and the rows have"):
        trainer(tmp_path / "other", rewards=told, train_dataset=rows, eval_dataset=PROMPTS[:2])


def test_a_stream_of_prompts_is_read_whole_and_idle_options_are_said(tmp_path, caplog):
    rows = Dataset.from_list(PROMPTS)
    settings = {**SETTINGS, "dataloader_num_workers": 2, "dataloader_drop_last": True, "prompt_boundary": "drop"}
    with caplog.at_level("INFO", "tether"):
        made = GRPOTrainer(
            model=policy(),
            reward_funcs=even,
            args=GRPOConfig(output_dir=str(tmp_path), **settings),
            train_dataset=rows.to_iterable_dataset(),
            processing_class=TOKENIZER,
        )
    assert len(made.run.source.rows) == 8
    assert "train: a streamed set, read whole: 8 rows" in caplog.text
    for field in ("dataloader_num_workers", "dataloader_drop_last", "prompt_boundary"):
        assert f"{field}: no effect, " in caplog.text


def test_a_function_cannot_log_under_the_names_of_the_run(tmp_path):
    for taken in ("loss", "entropy", "completions/mean_length", "rewards/logs/mean"):

        def logs(completions, log_metric, name=taken):
            log_metric(name, 77.0)
            return [1.0] * len(completions)

        with pytest.raises(RewardError, match=rf"log_metric\('{taken}'\) is the name of a figure of the run"):
            trained(tmp_path / taken, rewards=logs, max_steps=1)

    def partly(completions, log_metric):
        for value in (float("nan"), 1.0, 2.0):
            log_metric("mine", value)
        return [1.0] * len(completions)

    assert steps(trained(tmp_path / "mine", rewards=partly, max_steps=1))[0]["mine"] == 1.5


def test_a_template_s_end_of_an_answer_ends_a_completion(tmp_path):
    """R20: a base model with a template whose answers end in another token than its text does (Qwen2.5): what SFT and
    DPO end an answer with; of messages alone, in training or in evaluation."""
    other = copy.deepcopy(TOKENIZER)
    other.eos_token = other.bos_token
    end, eos = TOKENIZER.eos_token_id, other.eos_token_id
    chat, text = [{"role": "user", "content": "the film"}], "the film"

    def stops(prompt, evaluated):
        model = policy(eos_token_id=eos)
        model.generation_config.eos_token_id = [eos, 9]
        rows = {"train_dataset": [{"prompt": prompt}] * 8, "eval_dataset": [{"prompt": evaluated}] * 2}
        made = trainer(tmp_path, model=model, rewards=lambda completions: [], tokenizer=other, **rows)
        return made.run.algorithm.made.plan.sampling.stop_ids

    assert stops(text, text) == (eos, 9)
    assert stops(chat, chat) == stops(text, chat) == (eos, end, 9)


def test_a_folder_has_the_rollouts_of_one_run(tmp_path):
    """A shorter run in the same folder, with fewer processes: nothing of an earlier one is read as its own."""
    trained(tmp_path)
    folder = tmp_path / "rollouts"
    shutil.copy(folder / "000001-0.parquet", folder / "000000-1.parquet")
    trained(tmp_path, max_steps=2, seed=9)
    assert sorted(one.name for one in folder.iterdir()) == ["000000-0.parquet", "000001-0.parquet"]
    with pytest.raises(ConfigError, match="the run's own folder, whose rollouts would be replaced"):
        trainer(tmp_path, replay_rollouts=str(tmp_path))


def test_rewards_that_a_rollout_function_returns_are_checked_as_any(tmp_path):
    def sample(prompts, trainer):
        ids = [[10 + k % 4, 11, 2] for k in range(len(prompts))]
        found = {"prompt_ids": [[5, 6, 7]] * len(ids), "completion_ids": ids, "logprobs": None}
        return found if given is None else {**found, "rewards": given}

    for case, said in (
        (None, "rollout_func returned no 'rewards', and there are no reward_funcs"),
        ([float("nan")] * 8, r"'rewards' returned nan on row \d"),
        (["good"] * 8, r"'rewards' returned 'good' on row \d"),
    ):
        given = case
        with pytest.raises(RewardError, match=said):
            trained(tmp_path / "run", rewards=None, rollout_func=sample, max_steps=1)
    given = [None, 1.0, None, 0.0] * 2
    (log,) = steps(trained(tmp_path / "fine", rewards=None, rollout_func=sample, max_steps=1))
    assert (log["reward"], log["rewards/rewards/not_applicable"]) == (0.5, 0.5)


def test_arguments_that_have_no_place_say_why(tmp_path):
    for arguments, said in (
        ({"tools": [len]}, "tools was given; the trainer calls nothing itself"),
        ({"data_collator": len}, "data_collator was given; batches are made of what was sampled"),
        ({"compute_metrics": len}, "compute_metrics was given; reward functions judge evaluations too"),
        ({"reward_func": even}, "takes no argument reward_func. Did you mean reward_funcs?"),
    ):
        with pytest.raises(ConfigError, match=re.escape(said)):
            trainer(tmp_path, **arguments)


def test_a_coefficient_of_the_entropy_changes_by_its_rule(tmp_path):
    """Up where the entropy is at or below its target, else down, within bounds; applied after such a step alone."""
    passes = SimpleNamespace(total=lambda tensor: tensor, model=lambda: torch.nn.Linear(1, 1))
    bonus, found = EntropyBonus(0.2, target=1.0, delta=0.15, low=0.1, high=0.4), []
    for entropy in (0.9, 1.0, 0.5, 1.1, 1.2, 2.0, 0.3):
        found.append(bonus.now)
        bonus.saw(torch.tensor(entropy * 3), torch.tensor(3.0))
        bonus.saw(torch.tensor(entropy), torch.tensor(1.0))
        bonus.step(passes)
    assert found == pytest.approx([0.0, 0.35, 0.4, 0.4, 0.0, 0.0, 0.0])
    assert bonus.now == pytest.approx(0.25)
    settings = {"use_adaptive_entropy": True, "entropy_coef": 0.1, "entropy_target": 9.0, "entropy_coef_delta": 0.3}
    made = trained(tmp_path / "run", save_strategy="steps", save_steps=1, **settings)
    assert [log["entropy_coef"] for log in steps(made)] == pytest.approx([0.4, 0.7, 1.0])
    shutil.copytree(tmp_path / "run" / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    again = trainer(tmp_path / "again", save_strategy="steps", save_steps=1, **settings)
    again.train(resume_from_checkpoint=True)
    assert_same(weights(made), weights(again))


def test_a_repetition_penalty_is_corrected_for(tmp_path):
    """Ratios of the policy over what was drawn from, as a run on kept rollouts has them."""
    made = trained(tmp_path / "run", repetition_penalty=1.3, vllm_importance_sampling_mode="token_truncate")
    assert all(log["sampling/sampling_logp_difference/mean"] > 1e-3 for log in steps(made))
    assert all(log["sampling/importance_sampling_ratio/max"] <= 3.0 for log in steps(made))
    settings = {"vllm_importance_sampling_mode": "token_truncate", "replay_rollouts": str(tmp_path / "run")}
    replayed = trained(tmp_path / "replayed", repetition_penalty=1.3, **settings)
    assert_same(weights(made), weights(replayed))


@pytest.mark.parametrize("field", ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens"])
def test_settings_of_sampling_may_have_other_libraries_names(field):
    """`generation_kwargs`: what a field says, said twice alike or once; what is unknown or contradicts is refused."""
    value = {"top_k": 5, "max_new_tokens": 7}.get(field, 0.5)
    whole = {**SETTINGS, "max_completion_length": 512}
    for given in ({field: value}, json.dumps({field: value})):
        made = GRPOConfig(output_dir="unused", **{**whole, "generation_kwargs": given})
        assert getattr(made, {"max_new_tokens": "max_completion_length"}.get(field, field)) == value
        assert replace(made).generation_kwargs == {field: value}
    own = {"max_new_tokens": "max_completion_length"}.get(field, field)
    other = {own: 9 if isinstance(value, int) else 0.25}
    with pytest.raises(ConfigError, match=rf"generation_kwargs has {field} {value}, and {own} is"):
        GRPOConfig(output_dir="unused", **{**SETTINGS, **other, "generation_kwargs": {field: value}})
    with pytest.raises(ConfigError, match="has 'num_beams', which would change what is sampled unseen"):
        GRPOConfig(output_dir="unused", **{**whole, "generation_kwargs": {field: value, "num_beams": 4}})


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused_fields_say_why(name):
    """R23: TRL's fields that do nothing here are errors, named, with the reason."""
    algorithms = [config for _, config in CLASSES.values() if name in config.__dataclass_fields__]
    kept = REFUSED[name][0]
    other = {bool: not kept, int: 7, float: 0.7, str: "other"}.get(type(kept), "other")
    if name == "auto_find_batch_size":
        other = True
    assert algorithms
    for config in algorithms:
        with pytest.raises(ConfigError, match=rf"^{name} is .*; it must stay"):
            config(output_dir="unused", use_cpu=True, report_to="none", **{name: other})


@pytest.mark.parametrize("kind", [*CLASSES.values(), *PAIRS.values()], ids=lambda kind: kind[1].__name__)
def test_every_field_is_read_or_refused(kind, tmp_path, monkeypatch):
    """R23: what a run does not look at must stay as it is. Counted in a run, so that a check of a value is no look."""
    made_by, config = kind
    options = {one for row in OBJECTIVES[config.algorithm].values() for one in row.defaults}  # read by the registry
    own = {one.name for one in dataclasses.fields(config)} - PreferenceConfig.__dataclass_fields__.keys() - options
    assert len(own) > 40
    read, watching = defaultdict(set), []

    def noted(self, name):
        if watching:
            read[sys._getframe(1).f_code].add(name)
        return object.__getattribute__(self, name)

    monkeypatch.setattr(config, "__getattribute__", noted, raising=False)
    fields = {**SETTINGS, "beta": 0.1, "log_completions": True, "max_steps": 1, "eval_strategy": "steps"}
    args = config(output_dir=str(tmp_path), **fields)
    watching.append(True)
    rows = Dataset.from_list(PROMPTS)
    made = made_by(
        model=policy(),
        reward_funcs=even,
        args=args,
        train_dataset=rows,
        eval_dataset=rows.select(range(2)),
        processing_class=TOKENIZER,
    )
    made.train()
    made.run.algorithm._serving()
    watching.clear()
    # A function that asks for so many writes, compares or copies them all.
    looked = set().union(*(names for names in read.values() if len(names) < len(own) / 2))
    assert looked.isdisjoint({"vllm_group_port", "log_completions_hub_repo"}), (
        "they are refused, and nothing needs them"
    )
    # These are taken up as other fields when the configuration is made, or belong to a choice that was not made here:
    # an address of a server, a bonus that is not adaptive; losses of pairs refuse a correction.
    elsewhere = {"use_vllm", "generation_kwargs", "resample_rounds", "truncation_mode", "max_prompt_length"}
    elsewhere |= {name for name in own if name.startswith(("vllm_server_", "entropy_"))}
    if config is OnlineDPOConfig:
        elsewhere |= {name for name in own if name.startswith("vllm_importance_sampling_")}
    assert own - REFUSED.keys() - looked <= elsewhere


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"loss_type": "grpoo"}, "did you mean grpo"),
        ({"loss_type": "cispo"}, "epsilon_high is unset"),
        ({"loss_type": "sapo", "epsilon": 0.3}, "epsilon does not apply to loss 'sapo'"),
        ({"reference": "start"}, "beta is 0, so that nothing compares"),
        ({"beta": 0.1, "zero_variance": "skip"}, "groups without variance are still held"),
        ({"beta": 0.1, "reference_store": "s"}, "no completion is known"),
        ({"num_generations": 3}, "num_generations is 3, which does not divide the 8 completions"),
        ({"steps_per_generation": 3, "gradient_accumulation_steps": 2, "num_generations": 4}, "multiple of the other"),
        ({"gradient_accumulation_steps": 2, "steps_per_generation": 1, "num_iterations": 2}, "the same gradient twice"),
        ({"loss_type": "reinforce", "num_iterations": 2}, "knows no ratio"),
        ({"scale_rewards": "groups"}, "allowed are group, batch, none"),
        ({"multi_objective_aggregation": "normalize_then_sum", "scale_rewards": False}, "scales by itself"),
        ({"max_length": 8}, "prompts have max_prompt_length"),
        ({"vllm_importance_sampling_clip_min": 4.0}, "must be below"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"min_p": 1.0}, "min_p is 1"),
        ({"train_sampling_strategy": "sequential"}, "shuffle_dataset=False keeps the order of the rows"),
        ({"top_k": 1}, "all completions of a prompt are the same"),
        ({"top_k": -1}, "top_k is -1; it must be a whole number from 0"),
        ({"neftune_noise_alpha": 5.0}, "sampled and compared without noise"),
        ({"kl_estimator": "k1"}, "kl_estimator is 'k1'"),
        ({"repetition_penalty": 1.2, "vllm_importance_sampling_correction": False}, "as if the policy itself had"),
        ({"entropy_target": 0.4}, "use_adaptive_entropy is False, so that the coefficient stays"),
        ({"use_adaptive_entropy": True, "entropy_coef": 2.0}, "begins between entropy_coef_min"),
        ({"resample_rounds": 2}, "zero_variance is 'keep', so that nothing is sampled again"),
        ({"log_unique_prompts": True}, "log_unique_prompts is True, and no completions are logged"),
        ({"vllm_structured_outputs_regex": "[ab]+"}, "no vLLM server samples"),
    ],
)
def test_wrong_values_name_the_field(arguments, said):
    """R12: unknown names, and values that have no meaning together, fail at construction."""
    with pytest.raises(ConfigError, match=said):
        GRPOConfig(output_dir="unused", **{**SETTINGS, **arguments})


class _Two:
    """What a process knows of two, of which the second has given `other`."""

    device = "cpu"

    def __init__(self, other):
        self._other = other

    def gather(self, mine):
        return torch.cat([mine, torch.tensor([self._other])])


def test_the_error_of_one_process_reaches_all():
    """R21: nobody waits; who failed raises its own."""

    def passes(other):
        return Passes(None, None, _Two(other), None, None, None)

    def failing():
        raise RewardError("my own")

    assert passes(0.0).together(lambda: 7, "Sampling", RolloutError) == 7
    with pytest.raises(RolloutError, match="Sampling failed in process 1; its message is there"):
        passes(1.0).together(lambda: 7, "Sampling", RolloutError)
    for other in (0.0, 1.0):
        with pytest.raises(RewardError, match="my own"):
            passes(other).together(failing, "Sampling", RolloutError)
    assert [passes(other).everywhere(held) for other in (0.0, 1.0) for held in (True, False)] == [
        False,
        False,
        True,
        False,
    ]


@pytest.mark.parametrize(
    ("engine", "kind", "second", "said"),
    [
        ("auto", "FSDP", False, "shards of FSDP's first version"),
        ("vllm", "FSDP", True, None),
        ("vllm", "FSDP", False, "shards of FSDP's first version"),
        ("vllm", "DEEPSPEED", True, "A vLLM server is sent whole weights"),
        ("auto", "FSDP", True, None),
        ("auto", "DEEPSPEED", True, None),
        ("vllm", "MULTI_GPU", False, None),
    ],
)
def test_shards_that_nothing_could_gather_are_refused(engine, kind, second, said):
    plugin = SimpleNamespace(zero_stage=3, deepspeed_config={})
    state = SimpleNamespace(deepspeed_plugin=plugin)
    accelerator = SimpleNamespace(distributed_type=DistributedType(kind), is_fsdp2=second, state=state)
    with nullcontext() if said is None else pytest.raises(ConfigError, match=said):
        tether.training.online.algorithm._check_shards(accelerator, engine)


def test_an_evaluation_set_that_processes_cannot_share_evenly():
    require_even("eval", 4, 2)
    with pytest.raises(DataError, match="eval_held: 3 prompts cannot be shared evenly by 2 processes"):
        require_even("eval_held", 3, 2)


def test_too_few_prompts_and_too_long_ones(tmp_path):
    with pytest.raises(DataError, match="a rollout takes 2 prompts and there are 1"):
        trainer(tmp_path, train_dataset=PROMPTS[:1])
    with pytest.raises(
        ConfigError, match=r"longest prompt has 4 tokens and max_completion_length is 253: more than the 256"
    ):
        trainer(tmp_path, max_completion_length=253)
    with pytest.raises(
        DataError, match=r"2 with more tokens than max_prompt_length. To do: raise max_prompt_length \(now 2\)"
    ):
        trainer(tmp_path, max_prompt_length=2, train_dataset=PROMPTS[1:3])
    made = trainer(tmp_path, max_prompt_length=3)
    assert max(len(ids) for ids in made.run.source.rows["prompt_ids"]) == 3
    assert made.run.data.reports["train"]["dropped"]


def test_an_adapter_that_cannot_train_is_refused(tmp_path):
    """R5, TRL #6701: loaded for inference, its KL would be 0 for ever; it would save what it loaded."""
    model = get_peft_model(policy(), LoraConfig(**LORA))
    model.save_pretrained(tmp_path / "adapter")
    frozen = PeftModel.from_pretrained(policy(), str(tmp_path / "adapter"), is_trainable=False)
    with pytest.raises(ReferencePolicyError):
        trainer(Path(tmp_path) / "run", model=frozen, beta=0.1)
