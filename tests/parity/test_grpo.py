"""Number by number with TRL 1.16.0's GRPOTrainer and RLOOTrainer, for fixed completions and rewards (R8).

TRL is given the completions by its `rollout_func`, or, for RLOO, in place of its generation. Deviations are those of
`docs/conventions.md`: our epsilon_high of `cispo` is set, sequence levels are said to TRL, `bnpo` is one micro-batch.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig

from tether import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from tether.objectives.online.correction import MODES
from tiny import tiny_tokenizer
from trl_runs import run

trl = pytest.importorskip("trl")
TOKENIZER = tiny_tokenizer()
ROWS = [{"prompt": "the film" + " was" * (1 + i % 3) + " good" * (i // 3), "bonus": i / 4} for i in range(6)]
SETTINGS = {
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "max_completion_length": 9,
    "shuffle_dataset": False,
    "learning_rate": 0.3,
}
CLIPS = tuple(f"clip_ratio/{name}" for name in ("low_mean", "low_min", "high_mean", "high_max", "region_mean"))
LORA = {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")}


def sampled(call: int, count: int) -> list[list[int]]:
    """Completions of uneven lengths, most of which end; others in every rollout."""
    generator = torch.Generator().manual_seed(call)
    found = []
    for number in range(count):
        length = int(torch.randint(1, 9, (), generator=generator))
        ids = torch.randint(3, len(TOKENIZER), (length,), generator=generator).tolist()
        found.append([*ids, 2] if number % 4 else ids)
    return found


class Sampler:
    """A `rollout_func`; with masks, where a part of each completion was written by someone else, or with log-probs of
    another engine."""

    def __init__(self, masks: bool = False, engine: bool = False) -> None:
        self.calls, self.masks, self.engine = 0, masks, engine

    def __call__(self, prompts, trainer):
        ids = sampled(self.calls, len(prompts))
        self.calls += 1
        found = {
            "prompt_ids": [TOKENIZER(one)["input_ids"] for one in prompts],
            "completion_ids": ids,
            "logprobs": None,
        }
        if self.engine:
            dice = torch.Generator().manual_seed(self.calls)
            found["logprobs"] = [(-5.6 - 0.4 * torch.rand(len(one), generator=dice)).tolist() for one in ids]
        if self.masks:
            found["env_mask"] = [[int(k % 3 != 1) for k in range(len(one))] for one in ids]
        return found


def parity(completion_ids, bonus, **_):
    """Not the same for any two; for the last of some groups no reward."""
    return [sum(ids) % 11 / 5 + extra for ids, extra in zip(completion_ids, bonus, strict=True)]


def sparse(completion_ids, **_):
    return [None if len(ids) % 3 == 0 else float(len(ids)) for ids in completion_ids]


def flat(completion_ids, **_):
    """Groups of which every second has no variance."""
    return [float(len(ids) > 4) if k // 4 % 2 else 1.0 for k, ids in enumerate(completion_ids)]


class Corrected(trl.GRPOTrainer):
    """TRL corrects for log-probs of vLLM alone; here for those of its `rollout_func`, with no server behind it."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.use_vllm, self.vllm_generation = True, SimpleNamespace(sync_weights=lambda: None)
        self._last_loaded_step = -1


def both(tmp_path, *, ours=None, theirs=None, rewards=parity, masks=False, engine=False, **arguments):
    """A run of each, with settings that differ in name alone."""
    found = []
    their_trainer = Corrected if engine else trl.GRPOTrainer
    for classes, own in (((GRPOTrainer, GRPOConfig), ours), ((their_trainer, trl.GRPOConfig), theirs)):
        torch.manual_seed(0)
        settings = {**SETTINGS, **arguments, **(own or {})}
        found.append(
            run(
                *classes,
                tmp_path / classes[1].__module__,
                ROWS,
                reward_funcs=rewards,
                rollout_func=Sampler(masks, engine),
                **settings,
            )
        )
    return found


CASES = {
    "dapo": {"loss_type": "dapo"},
    "grpo": {"loss_type": "grpo"},
    "bnpo": {"loss_type": "bnpo"},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": False},
    "gspo": {"ours": {"loss_type": "gspo"}, "theirs": {"loss_type": "grpo", "importance_sampling_level": "sequence"}},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.3},
    "sapo": {"loss_type": "sapo"},
    "luspo": {
        "ours": {"loss_type": "luspo"},
        "theirs": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    },
    "vespo": {"loss_type": "vespo"},
    "batch": {"loss_type": "grpo", "scale_rewards": "batch"},
    "delta": {"loss_type": "grpo", "delta": 1.25, "epsilon_high": 0.1},
    "truncated": {"loss_type": "dapo", "mask_truncated_completions": True},
    "off policy": {"loss_type": "grpo", "off_policy_mask_threshold": 0.001},
    "top entropy": {"loss_type": "grpo", "top_entropy_quantile": 0.4},
    "entropy bonus": {"loss_type": "grpo", "entropy_coef": 0.3},
    "bonus of the highest": {"loss_type": "dapo", "entropy_coef": 0.3, "top_entropy_quantile": 0.4},
    "adaptive": {"loss_type": "dapo", "entropy_coef": 0.2, "use_adaptive_entropy": True, "entropy_target": 9.0},
    "kl": {"loss_type": "grpo", "beta": 0.3, **LORA},
    "kl without ratio": {"loss_type": "dapo", "beta": 0.3, "use_bias_correction_kl": False, **LORA},
    "several rewards": {"loss_type": "grpo", "rewards": [parity, sparse], "reward_weights": [0.7, 0.2]},
    "normalised apart": {
        "loss_type": "grpo",
        "rewards": [parity, sparse],
        "multi_objective_aggregation": "normalize_then_sum",
        "reward_weights": [0.7, 0.2],
    },
    "no variance": {"loss_type": "grpo", "rewards": flat},
    "masks": {"loss_type": "dapo", "masks": True},
    **{
        f"correction, {mode}": {
            "engine": True,
            "loss_type": "grpo",
            "vllm_importance_sampling_mode": mode,
            "vllm_importance_sampling_clip_max": 1.6,
            "vllm_importance_sampling_clip_min": 0.7,
            "beta": 0.3,
            **LORA,
        }
        for mode in MODES
    },
    "correction of masks": {"engine": True, "masks": True, "loss_type": "dapo"},
    "correction, vespo": {"engine": True, "loss_type": "vespo", "vllm_importance_sampling_mode": "token_truncate"},
    "correction, off policy": {"engine": True, "loss_type": "grpo", "off_policy_mask_threshold": 0.1},
}
# TRL measures these otherwise, as docs/conventions.md says: zero variance there is that of the deviation in use.
UNLIKE = {"normalised apart": {"frac_reward_zero_std"}, "batch": {"frac_reward_zero_std"}}
# What only TRL logs, or counts otherwise when a rollout is used twice.
_NOT_COMPARED = {"step", "epoch", "learning_rate", "step_time", "num_tokens"}


def assert_alike(ours, theirs, unlike=frozenset(), tolerance=3e-4):
    """Every number that TRL logs, in each step, and the weights."""
    assert len(ours.steps) == len(theirs.steps) == 3
    for number, (mine, their) in enumerate(zip(ours.steps, theirs.steps, strict=True)):
        for metric in their.keys() - _NOT_COMPARED - set(unlike):
            assert mine[metric] == pytest.approx(their[metric], abs=tolerance, rel=tolerance), (number, metric)
    assert any(change.abs().max() > 1e-4 for change in ours.changes.values()), "nothing was trained"
    for name, change in ours.changes.items():
        torch.testing.assert_close(change, theirs.changes[name], atol=tolerance, rtol=tolerance)


@pytest.mark.sweep(1)
@pytest.mark.parametrize(
    "name", [pytest.param(one, marks=() if one in ("dapo", "kl") else pytest.mark.slow) for one in CASES]
)
def test_three_steps_equal_trl(name, tmp_path):
    """R8: on policy, then the second update of a rollout, then another one: off policy the ratios count."""
    ours, theirs = both(tmp_path, num_iterations=2, **CASES[name])
    assert ("sampling/importance_sampling_ratio/mean" in theirs.steps[0]) == ("engine" in CASES[name])
    assert_alike(ours, theirs, UNLIKE.get(name, ()))


@pytest.mark.slow
def test_accumulation_and_slices_of_a_rollout_equal_trl(tmp_path):
    """`grpo` over two micro-batches, whose means TRL averages too; weights after three steps."""
    settings = {"loss_type": "grpo", "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    ours, theirs = both(tmp_path, **settings)
    # TRL's figures of clips are means of means.
    assert_alike(ours, theirs, {"entropy", *CLIPS})


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"beta": 0.0},
        {**LORA},
        {**LORA, "normalize_advantages": True, "reward_clip_range": [0.3, 1.2]},
        {"beta": 0.0, "num_iterations": 2},
    ],
    ids=["plain", "kl in reward", "normalised, clipped", "two updates"],
)
def test_rloo_equals_trl(settings, tmp_path):
    found = []
    for classes, ours in (((RLOOTrainer, RLOOConfig), True), ((trl.RLOOTrainer, trl.RLOOConfig), False)):
        torch.manual_seed(0)
        arguments = {**SETTINGS, **settings, "reward_funcs": parity}
        if ours:
            arguments["rollout_func"] = Sampler()
            trainer = classes[0]
        else:
            trainer = _replaying(Sampler())

        found.append(run(trainer, classes[1], tmp_path / str(ours), ROWS, **arguments))
    assert_alike(*found)


def _replaying(sampler):
    """TRL's trainer, which has no `rollout_func`, with fixed completions."""

    class Replaying(trl.RLOOTrainer):
        def _generate_single_turn(self, prompt_ids, *given):
            sampler.calls += 1
            return sampled(sampler.calls - 1, len(prompt_ids))

    return Replaying


def test_the_comparison_can_fail(tmp_path):
    """R8's control: another epsilon gives other numbers off policy."""
    runs = []
    for epsilon in (0.2, 0.05):
        runs.append(
            run(
                GRPOTrainer,
                GRPOConfig,
                tmp_path,
                ROWS,
                reward_funcs=parity,
                rollout_func=Sampler(),
                num_iterations=2,
                epsilon=epsilon,
                **SETTINGS,
            )
        )
    with pytest.raises(AssertionError):
        assert_alike(*runs)
