"""Every field of the configurations of sampled completions changes what a run does (R23)."""

from __future__ import annotations

import dataclasses
import io
import time
from typing import Any

import pytest
from rich.console import Console

from tether import GRPOConfig, OnlineDPOConfig, RLOOConfig
from tether.errors import RewardError
from tether.training.config import PreferenceConfig
from tether.training.online import table
from tether.training.online.config import REFUSED
from training.online import PROMPTS, TOKENIZER, even, policy, trainer, weights

BASE = {"max_steps": 2, "per_device_train_batch_size": 8, "max_completion_length": 6}


def told(completion_ids, **_):
    return [float(sum(ids) % 5) for ids in completion_ids]


def fails_on_one(completion_ids, want):
    if any(sum(ids) % 30 == 3 for ids in completion_ids):
        raise ValueError("odd")
    return even(completion_ids, want)


def slow(completion_ids, **_):
    time.sleep(0.3)
    return told(completion_ids)


def elsewhere(prompts, trainer):
    """Completions with log-probs of another engine, some of them far from the policy's; one is cut off."""
    count = len(prompts)
    ids = [[20 + k, 30 + k % 3, 31, 2] if k else [20, 30, 31, 33] for k in range(count)]
    logps = [[-5.5 - 0.3 * (k % 4)] * 4 for k in range(count)]
    return {"prompt_ids": [TOKENIZER(one)["input_ids"] for one in prompts], "completion_ids": ids, "logprobs": logps}


OFF = {"num_iterations": 2}
TWO = {"rewards": [even, told]}
ELSEWHERE = {"rollout_func": elsewhere, "vllm_importance_sampling_mode": "token_truncate"}
ADAPTIVE = {"use_adaptive_entropy": True, "entropy_coef": 0.2, "entropy_target": 9.0}
EVALUATED = {"eval_dataset": PROMPTS[:2], "eval_strategy": "steps", "eval_steps": 1}
SHOWN = {"log_completions": True}
FEW = {"rewards": lambda completion_ids, want: [float(w * sum(i)) for i, w in zip(completion_ids, want, strict=True)]}
KL = {"beta": 0.3, **OFF}
# Of each field a value that is not its own, and what it takes to matter.
COMMON: dict[str, tuple[Any, dict[str, Any]]] = {
    "num_generations": (2, {}),
    "num_generations_eval": (2, EVALUATED),
    "max_completion_length": (3, {}),
    "max_prompt_length": (3, {}),
    "shuffle_dataset": (False, {}),
    "generation_batch_size": (16, {}),
    "steps_per_generation": (2, {}),
    "num_iterations": (2, {}),
    "temperature": (0.7, {}),
    "top_p": (0.5, {}),
    "top_k": (5, {}),
    "min_p": (0.5, {}),
    "repetition_penalty": (1.5, {}),
    "generation_kwargs": ({"top_k": 5}, {}),
    "rollout_seed": (9, {}),
    "rollout_engine": ("transformers", {}),
    "keep_rollouts": (False, {}),
    "reward_weights": ([1.0, 0.1], TWO),
    "reward_timeout": (0.05, {"rewards": slow}),
    "reward_on_error": ("none", {"rewards": fails_on_one, "per_device_train_batch_size": 64, "num_generations": 32}),
    "mask_truncated_completions": (True, {"rollout_func": elsewhere}),
    "cast_lm_head_to_fp32": (True, {"bf16": True}),
    "log_completions": (True, {}),
    "num_completions_to_print": (2, SHOWN),
    "log_unique_prompts": (True, SHOWN),
    "beta": (0.3, {}),
}
CORRECTION: dict[str, tuple[Any, dict[str, Any]]] = {
    "vllm_importance_sampling_correction": (False, ELSEWHERE),
    "vllm_importance_sampling_mode": ("token_mask", ELSEWHERE),
    "vllm_importance_sampling_clip_max": (1.1, ELSEWHERE),
    "vllm_importance_sampling_clip_min": (1.2, ELSEWHERE),
}
OWN: dict[type, dict[str, tuple[Any, dict[str, Any]]]] = {
    GRPOConfig: {
        **CORRECTION,
        "loss_type": ("grpo", OFF),
        "epsilon": (0.01, OFF),
        "epsilon_high": (0.01, OFF),
        "delta": (1.001, {"epsilon_high": 0.0005, **OFF}),
        "sapo_temperature_pos": (3.0, {"loss_type": "sapo", **OFF}),
        "sapo_temperature_neg": (3.0, {"loss_type": "sapo", **OFF}),
        "vespo_k_pos": (5.0, {"loss_type": "vespo", **OFF}),
        "vespo_lambda_pos": (5.0, {"loss_type": "vespo", **OFF}),
        "vespo_k_neg": (5.0, {"loss_type": "vespo", **OFF}),
        "vespo_lambda_neg": (5.0, {"loss_type": "vespo", **OFF}),
        "importance_sampling_level": ("sequence", OFF),
        "scale_rewards": ("none", {}),
        "multi_objective_aggregation": ("normalize_then_sum", TWO),
        "zero_variance": ("skip", FEW),
        "resample_rounds": (1, {"zero_variance": "resample", **FEW}),
        "kl_estimator": ("k2", KL),
        "kl_place": ("reward", KL),
        "use_bias_correction_kl": (False, KL),
        "off_policy_mask_threshold": (1e-6, OFF),
        "top_entropy_quantile": (0.3, {}),
        "entropy_coef": (0.3, {}),
        "use_adaptive_entropy": (True, {"entropy_coef": 0.2}),
        "entropy_coef_min": (0.199, {**ADAPTIVE, "entropy_target": 0.1}),
        "entropy_coef_max": (0.201, ADAPTIVE),
        "entropy_coef_delta": (0.3, ADAPTIVE),
        "entropy_target": (0.3, ADAPTIVE),
    },
    RLOOConfig: {
        **CORRECTION,
        "epsilon": (0.001, OFF),
        "epsilon_high": (0.001, OFF),
        "delta": (1.0005, {"epsilon_high": 0.0002, **OFF}),
        "normalize_advantages": (True, {}),
        "reward_clip_range": ([0.4, 0.5], {}),
    },
    OnlineDPOConfig: {
        "loss_type": (["ipo"], OFF),
        "loss_weights": ([1.0, 3.0], {"loss_type": ["sigmoid", "hinge"], **OFF}),
    },
}
NAMES = {GRPOConfig: "grpo", RLOOConfig: "rloo", OnlineDPOConfig: "online_dpo"}
CASES = [(config, field) for config, own in OWN.items() for field in {**COMMON, **own}]
_TIMED = ("seconds", "per_second", "runtime", "gib", "step_time")


def outcome(folder: Any, config: type, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a run leaves behind: weights, logs, files, what it printed; or how it ended."""
    printed = Console(width=100, file=io.StringIO())
    monkeypatch.setattr(table, "console", lambda: printed)
    made = trainer(folder, NAMES[config], model=policy(), **{**BASE, "rewards": told, **settings})
    try:
        made.train()
    except RewardError as error:
        return {"ended": str(error)[:60]}
    logs = [{name: value for name, value in log.items() if not name.endswith(_TIMED)} for log in made.state.log_history]
    files = {one.name for one in (folder / "rollouts").glob("*")}
    engine = made.run.algorithm.made.engine.name
    found = {"logs": logs[:-1], "files": files, "engine": engine, "printed": printed.file.getvalue()}
    return {**found, "weights": {name: value.double().sum().item() for name, value in weights(made).items()}}


@pytest.mark.slow
@pytest.mark.parametrize(("config", "field"), CASES, ids=lambda one: one if isinstance(one, str) else NAMES[one])
def test_every_field_changes_what_a_run_does(config, field, tmp_path, monkeypatch):
    """R23: nothing that is accepted is without effect."""
    value, taken = {**COMMON, **OWN[config]}[field]
    before = outcome(tmp_path / "before", config, taken, monkeypatch)
    after = outcome(tmp_path / "after", config, {**taken, field: value}, monkeypatch)
    assert before != after


@pytest.mark.slow
def test_a_run_that_is_repeated_changes_nothing(tmp_path, monkeypatch):
    """Negative control: what the comparison compares is the same for the same fields."""
    found = [outcome(tmp_path / str(one), GRPOConfig, {**EVALUATED, **SHOWN}, monkeypatch) for one in range(2)]
    assert found[0] == found[1]


@pytest.mark.parametrize("config", OWN)
def test_the_list_has_every_field(config):
    """Those that describe a server are in `test_online_server.py`, where one is; losses' own are the registry's."""
    fields = {one.name for one in dataclasses.fields(config)} - PreferenceConfig.__dataclass_fields__.keys()
    listed = {**COMMON, **OWN[config]}.keys()
    served = {name for name in fields if name.startswith("vllm_") and not name.startswith("vllm_importance")}
    assert listed <= {one.name for one in dataclasses.fields(config)}
    rest = fields - listed - REFUSED.keys() - served
    assert rest <= {"use_vllm", "replay_rollouts", *_of_pairs(config)}, "a run of its own has each of these"


def _of_pairs(config: type) -> set[str]:
    """Options of DPO's losses, and ratios, which pairs have not and refuse."""
    options = {one.name for one in dataclasses.fields(config)} if config is OnlineDPOConfig else set()
    return {one for one in options if one.startswith("vllm_importance") or not hasattr(GRPOConfig, one)}
