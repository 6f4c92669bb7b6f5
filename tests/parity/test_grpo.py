"""Number by number with TRL 1.16.0's GRPOTrainer and RLOOTrainer, for fixed completions and rewards (R8).

The ordinary suite compares with golden numbers of TRL, `make parity` runs TRL itself. TRL is given the completions by
its `rollout_func`, or, for RLOO, in place of its generation. Deviations are those of `docs/conventions.md`: our
epsilon_high of `cispo` is set, sequence levels are said to TRL, `bnpo` is one micro-batch.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import TrainingArguments

from support.trl_dpo import digest, needs_trl
from tether import GRPOConfig, GRPOTrainer
from tether.training.online.config import REFUSED
from tiny import tiny_tokenizer
from trl_runs import run

GOLDEN = Path(__file__).parent / "golden_online.json"
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
    """A `rollout_func`; with masks, where a part of each completion was written by someone else."""

    def __init__(self, masks: bool = False) -> None:
        self.calls, self.masks = 0, masks

    def __call__(self, prompts, trainer):
        ids = sampled(self.calls, len(prompts))
        self.calls += 1
        found = {
            "prompt_ids": [TOKENIZER(one)["input_ids"] for one in prompts],
            "completion_ids": ids,
            "logprobs": None,
        }
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


def steps_of(tool, folder, name):
    """A run of ours or of TRL's, with settings that differ in name alone."""
    if name in RLOO_CASES:
        return rloo_steps_of(tool, folder, RLOO_CASES[name])
    case = dict(CASES[name])
    own = {one: case.pop(one, {}) for one in ("ours", "theirs")}[tool]
    rewards, masks = case.pop("rewards", parity), case.pop("masks", False)
    torch.manual_seed(0)
    settings = {**SETTINGS, "num_iterations": 2, **case, **own}
    return run(*classes(tool, "GRPO"), folder, ROWS, reward_funcs=rewards, rollout_func=Sampler(masks), **settings)


def classes(tool, name):
    """Trainer and configuration of ours or of TRL's."""
    place = importlib.import_module("tether" if tool == "ours" else "trl")
    return getattr(place, f"{name}Trainer"), getattr(place, f"{name}Config")


def rloo_steps_of(tool, folder, case):
    """The same; TRL's trainer has no `rollout_func`."""
    sampler = Sampler()
    trainer, config = classes(tool, "RLOO")
    arguments = {**SETTINGS, **case, "reward_funcs": parity}
    if tool == "ours":
        arguments["rollout_func"] = sampler
    else:

        class Replaying(trainer):
            def _generate_single_turn(self, prompt_ids, *given):
                sampler.calls += 1
                return sampled(sampler.calls - 1, len(prompt_ids))

        trainer = Replaying
    torch.manual_seed(0)
    return run(trainer, config, folder, ROWS, **arguments)


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
}
RLOO_CASES = {
    "rloo": {"beta": 0.0},
    "rloo, kl in reward": {**LORA},
    "rloo, normalised and clipped": {**LORA, "normalize_advantages": True, "reward_clip_range": [0.3, 1.2]},
    "rloo, two updates": {"beta": 0.0, "num_iterations": 2},
}
SLICES = {
    "slices of a rollout": {
        "loss_type": "grpo",
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_iterations": 1,
    }
}
CASES |= SLICES
# TRL measures these otherwise, as docs/conventions.md says: zero variance there is that of the deviation in use.
UNLIKE = {"normalised apart": {"frac_reward_zero_std"}, "batch": {"frac_reward_zero_std"}}
# TRL's figures of clips are means of means.
UNLIKE |= {"slices of a rollout": {"entropy", *CLIPS}}
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


@needs_trl
@pytest.mark.slow
@pytest.mark.parametrize("name", [*CASES, *RLOO_CASES])
def test_three_steps_equal_trl(name, tmp_path):
    """R8: on policy, then the second update of a rollout, then another one: off policy the ratios count."""
    runs = [steps_of(tool, tmp_path / tool, name) for tool in ("ours", "theirs")]
    assert_alike(*runs, UNLIKE.get(name, ()))


@pytest.mark.sweep(7)
@pytest.mark.parametrize("name", [*CASES, *RLOO_CASES])
def test_three_steps_equal_the_golden_numbers_of_trl(name, tmp_path):
    """R8: logged numbers of each step, and sum and norm of each tensor's change."""
    golden, ours = json.loads(GOLDEN.read_text())[name], steps_of("ours", tmp_path, name)
    assert len(ours.steps) == len(golden["steps"]) == 3
    for mine, their in zip(ours.steps, golden["steps"], strict=True):
        for metric in their.keys() - UNLIKE.get(name, set()):
            assert mine[metric] == pytest.approx(their[metric], abs=3e-4, rel=3e-4), metric
    found = digest(ours.changes)
    assert found.keys() == golden["weights"].keys()
    for tensor, numbers in golden["weights"].items():
        assert found[tensor] == pytest.approx(numbers, abs=3e-4, rel=3e-4), tensor


def golden_numbers(folder):
    """What TRL gives for each case; see make_golden.py."""
    found = {}
    for number, name in enumerate([*CASES, *RLOO_CASES]):
        theirs = steps_of("theirs", folder / str(number), name)
        steps = [{k: v for k, v in log.items() if k not in _NOT_COMPARED} for log in theirs.steps]
        found[name] = {"steps": steps, "weights": digest(theirs.changes)}
    return found


def test_the_golden_numbers_tell_the_cases_apart():
    """Negative control: no two cases gave the same weights, apart from those that are one thing at one micro-batch."""
    golden = json.loads(GOLDEN.read_text())
    assert golden.keys() == {*CASES, *RLOO_CASES}
    weights = [tuple(map(tuple, one["weights"].values())) for one in golden.values()]
    assert len(set(weights)) >= len(weights) - 2


# Fields whose default is another one here: dropout and the levels of ratios as docs/grpo.md says, the others as every
# configuration here has them (docs/conventions.md).
OTHER_DEFAULTS = {"disable_dropout", "importance_sampling_level"}


@needs_trl
@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
def test_every_field_of_trl_is_there_with_its_default_or_refused(name):
    """R23: each is a field here; what changes nothing here must stay at TRL's own default."""
    mine, own = ({one.name: one for one in dataclasses.fields(classes(tool, name)[1])} for tool in ("ours", "theirs"))
    assert own.keys() <= mine.keys()
    for one in own.keys() & REFUSED.keys():
        assert mine[one].default == REFUSED[one][0] == own[one].default, one
    of_all = {one.name for one in dataclasses.fields(TrainingArguments)}
    other = {one for one in own if one not in of_all and mine[one].default != own[one].default}
    assert other <= OTHER_DEFAULTS


def test_the_comparison_can_fail(tmp_path):
    """Negative control: another epsilon gives other numbers off policy."""
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
