"""Rollouts from a server (R17, R20, R21, R24): weights arrive after each step, or the run stops; a fake of vLLM."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pyarrow.parquet as parquet
import pytest
import torch
from peft import LoraConfig

from tether import GRPOConfig
from tether.errors import ConfigError, RewardError, RolloutError
from tether.rollout.vllm_server import ServerOptions, _arguments
from training.online import SETTINGS, even, policy, steps, trainer, weights
from vllm_fake import serving_vllm

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def served(folder, server, **arguments):
    settings = {"rollout_engine": "vllm", "vllm_server_base_url": server.url, "max_completion_length": 5, **arguments}
    return trainer(folder, **settings)


@pytest.fixture
def server():
    with serving_vllm(policy()) as one:
        yield one


@pytest.mark.sweep(1)
@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_a_server_follows_the_policy(kind, server, tmp_path, caplog):
    """R17: each step's weights are there before the next rollout, under a name of their own; log-probs agree."""
    own = {"peft_config": LoraConfig(**LORA)} if kind == "adapter" else {}
    with caplog.at_level("INFO", "tether"):
        made = served(tmp_path, server, **own)
        made.train()
    assert f"the server is sent {kind} weights" in caplog.text
    logs = steps(made)
    assert all(log["sync/logp_difference"] < 1e-4 for log in logs)
    assert all(log["sampling/sampling_logp_difference/max"] < 1e-4 for log in logs)
    assert all(log["sync/bytes"] > 1000 for log in logs)
    names = {body["model"] for body in server.paths("/completions")}
    if kind == "adapter":
        loaded = [body["lora_name"] for body in server.paths("/load_lora_adapter")]
        assert len(loaded) == len(set(loaded)) == 3
        assert [body["lora_name"] for body in server.paths("/unload_lora_adapter")] == loaded[:2]
        assert names == set(loaded)
        assert not server.paths("/collective_rpc")
    else:
        assert len({body["kwargs"]["weights_path"] for body in server.paths("/collective_rpc")}) == 3
        assert len(server.paths("/reset_prefix_cache")) == 3
    folder = made.run.algorithm.made.served.engine._folder
    assert len(list(folder.iterdir())) == 1, "the last version alone"
    made.run.algorithm.made.served.close()
    assert not folder.exists()


def test_merging_leaves_the_policy_as_it_is(server, tmp_path):
    """DoRA cannot be sent as a LoRA: merged weights, one layer at a time, and not a bit of the policy changes."""
    made = served(tmp_path, server, peft_config=LoraConfig(**LORA, use_dora=True), learning_rate=0.0, max_steps=2)
    before = {name: one.detach().clone() for name, one in made.policy.named_parameters()}
    made.train()
    assert len(server.paths("/collective_rpc")) == 2
    for name, value in before.items():
        assert torch.equal(value, dict(made.policy.named_parameters())[name]), name


@pytest.mark.sweep(1)
@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_a_server_that_keeps_old_weights_is_stopped(kind, server, tmp_path):
    """R17, verl #7495: the first sync arrives and no later one."""
    server.faults.ignore_weights = True
    own = {"peft_config": LoraConfig(**LORA)} if kind == "adapter" else {}
    made = served(tmp_path, server, learning_rate=20.0 if own else 0.5, **own)
    with pytest.raises(RolloutError, match="does not compute what the trainer does"):
        made.train()
    assert made.state.global_step == 1


def test_a_stale_server_is_seen_through_what_its_dtype_explains(server, tmp_path):
    """R17, the other direction: where a tolerance is too wide to tell, it must have moved with the policy."""
    server.faults.ignore_weights = True
    made = served(tmp_path, server, learning_rate=0.5, vllm_tolerance=5.0)
    with pytest.raises(RolloutError, match=r"has moved by .* nats on a few fixed sequences, and the vLLM server by 0%"):
        made.train()
    server.faults.ignore_weights = False
    fine = served(tmp_path / "fine", server, learning_rate=0.5, vllm_tolerance=5.0)
    fine.train()
    assert fine.state.global_step == 3


@pytest.mark.sweep(2)
@pytest.mark.parametrize(
    ("fault", "value", "said"),
    [
        ("keep_cache", True, "did not drop what it had computed with the old ones"),
        ("other_prompt", True, "gave no completion of row .*: it read .* other prompt tokens"),
        ("short", True, r"cut off at \d+ of \d+ tokens"),
        ("without_ids", True, "without token ids or log-probs"),
        ("past_the_end", True, "went on after a token that ends completions"),
        ("noise", -0.05, "differs by 0.05 nats"),
    ],
)
def test_what_a_server_may_do_wrong_is_named(fault, value, said, server, tmp_path):
    setattr(server.faults, fault, value)
    made = served(tmp_path, server, max_completion_length=30)
    with pytest.raises(RolloutError, match=said):
        made.train()


def test_completions_are_held_to_a_pattern_and_ratios_know_it(server, tmp_path):
    """`vllm_structured_outputs_regex`: sent with each request but the proof's; log-probs are of what it left, so that
    ratios are the probability that the policy had left for it; changed on a resume, it is another rollout."""
    pattern = "[a-m ]+"
    settings = {"vllm_structured_outputs_regex": pattern, "vllm_importance_sampling_mode": "token_truncate"}
    made = served(tmp_path, server, max_steps=1, save_strategy="steps", save_steps=1, **settings)
    made.train()
    kept = parquet.read_table(tmp_path / "rollouts" / "000000-0.parquet").to_pylist()
    assert all(re.fullmatch(f"({pattern})?", row["text"]) for row in kept)
    sent = [body.get("structured_outputs") for body in server.paths("/completions") if "seed" in body]
    assert sent.count({"regex": pattern}) == 8
    assert sent.count(None) == len(sent) - 8 > 0, "the trainer knows no pattern, and the proof compares with it"
    (log,) = steps(made)
    assert log["sampling/importance_sampling_ratio/max"] < 1.0
    assert log["sampling/sampling_logp_difference/mean"] > 1e-2
    with pytest.raises(ConfigError, match=r"vllm_structured_outputs_regex '\[a-m \]\+' then and None now"):
        served(tmp_path, server, vllm_importance_sampling_mode="token_truncate").train(resume_from_checkpoint=True)
    for wrong, said in (("", "is empty"), (pattern, "vllm_importance_sampling_correction is False")):
        with pytest.raises(ConfigError, match=said):
            served(tmp_path, server, vllm_structured_outputs_regex=wrong, vllm_importance_sampling_correction=not wrong)


@pytest.mark.slow
def test_log_probs_before_the_temperature_are_refused(server, tmp_path):
    """TRL #4159: a ratio of 2 at temperature 0.6."""
    made = served(tmp_path, server, temperature=0.6)
    made.train()
    server.faults.raw = True
    made = served(tmp_path / "raw", server, temperature=0.6)
    with pytest.raises(RolloutError, match="--logprobs-mode processed_logprobs"):
        made.train()
    made = served(tmp_path / "penalised", server, repetition_penalty=1.5)
    with pytest.raises(RolloutError, match="--logprobs-mode processed_logprobs"):
        made.train()
    server.faults.raw = False
    made = served(tmp_path / "processed", server, repetition_penalty=1.5, temperature=0.6, max_steps=1)
    made.train()
    (log,) = steps(made)
    assert log["sampling/sampling_logp_difference/mean"] > 1e-3, "the correction is for the penalty"
    made = served(tmp_path / "cut", server, repetition_penalty=1.5, top_k=5)
    with pytest.raises(RolloutError, match=r"repetition_penalty is 1\.5 and tokens are cut"):
        made.train()


def test_an_adapter_that_is_refused_says_how_to_start_the_server(server, tmp_path):
    server.faults.refuse_adapters = True
    with pytest.raises(RolloutError, match=r"greater than max_lora_rank 8.*--enable-lora"):
        served(tmp_path, server, peft_config=LoraConfig(**LORA)).train()


def test_a_server_that_is_gone_ends_the_run_in_time(tmp_path):
    """R21."""
    with serving_vllm(policy()) as server:
        url = server.url
    with pytest.raises(RolloutError, match="failed after 3 attempts"):
        trainer(tmp_path, rollout_engine="vllm", vllm_server_base_url=url).train()


@pytest.mark.slow
def test_a_resumed_run_samples_the_same(server, tmp_path):
    """R15 with a server: the same seeds, and the policy's weights are sent anew."""
    whole = served(tmp_path / "whole", server, save_strategy="steps", save_steps=1)
    whole.train()
    (tmp_path / "again").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-1", tmp_path / "again" / "checkpoint-1")
    again = served(tmp_path / "again", server, save_strategy="steps", save_steps=1)
    again.train(resume_from_checkpoint=True)
    for name, value in weights(whole).items():
        torch.testing.assert_close(value, weights(again)[name], atol=1e-6, rtol=0)


@pytest.mark.slow
def test_completions_that_were_paid_for_are_not_asked_for_again(server, tmp_path, caplog):
    """R15, R19: a reward fails; resumed, it is given the same completions, though the server draws others now."""
    calls = []

    def fragile(completion_ids, want):
        calls.append(completion_ids)
        if len(calls) == 2:
            raise ValueError("odd")
        return even(completion_ids, want)

    with pytest.raises(RewardError, match="The completions are kept in"):
        served(tmp_path, server, rewards=fragile).train()
    asked = len(server.paths("/completions"))
    server.faults.reseed = 1
    with caplog.at_level("INFO", "tether"):
        served(tmp_path, server, rewards=fragile).train(resume_from_checkpoint=True)
    assert "2 prompts have the completions that were sampled before the run ended" in caplog.text
    # The one that failed is called for each completion alone, to say which it fails on.
    _, second, again, third = (one for one in calls if len(one) == 8)
    assert again == second
    assert third != second
    sampled = [body for body in server.paths("/completions")[asked:] if body["max_tokens"] == 5]
    assert len(sampled) == 4 + 8, "the proof's, and those of the third rollout alone"
    server.faults.reseed = 2
    other = {"rewards": fragile, "max_steps": 3, "temperature": 0.5}
    with pytest.raises(ConfigError, match="temperature"):
        served(tmp_path, server, **other).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"use_vllm": True}, "vllm_python is unset"),
        ({"vllm_server_base_url": "http://127.0.0.1:1"}, "no vLLM server samples"),
        ({"use_vllm": True, "rollout_engine": "tree"}, "rollout_engine is 'tree', and use_vllm is True"),
        (
            {"use_vllm": True, "vllm_mode": "server", "vllm_python": "p"},
            "vllm_python is 'p', and the server is one",
        ),
        ({"use_vllm": True, "vllm_python": "p", "vllm_server_port": 1}, "is the run's own, where it has no effect"),
        (
            {"use_vllm": True, "vllm_python": "p", "vllm_enable_sleep_mode": True},
            "keeps its share of the device's memory",
        ),
    ],
)
def test_a_server_is_described_where_one_is_wanted(arguments, said):
    with pytest.raises(ConfigError, match=said):
        GRPOConfig(output_dir="unused", **{**SETTINGS, **arguments})


def test_an_own_server_reports_log_probs_before_a_cut():
    """vLLM has those at the temperature after the cut alone, which would end the run at its proof."""
    modes = []
    for cuts in (False, True):
        flags = list(_arguments(Path("model"), ServerOptions(Path("python"), "float32", 32, cuts=cuts), 1))
        modes.append(flags[flags.index("--logprobs-mode") + 1])
    assert modes == ["processed_logprobs", "raw_logprobs"]


def test_trl_s_ways_to_name_a_server():
    common = {"output_dir": "unused", **SETTINGS, "use_vllm": True, "vllm_mode": "server"}
    assert GRPOConfig(**common).vllm_url == "http://127.0.0.1:8000"
    assert GRPOConfig(**common, vllm_server_host="127.0.0.2", vllm_server_port=9).vllm_url == "http://127.0.0.2:9"
    assert GRPOConfig(**common, vllm_server_base_url="http://localhost:7").vllm_url == "http://localhost:7"
    assert GRPOConfig(**{**common, "vllm_mode": "colocate"}, vllm_python="python").vllm_url is None


def test_a_server_elsewhere_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="must be on this machine"):
        trainer(tmp_path, rollout_engine="vllm", vllm_server_base_url="http://example.com").train()
