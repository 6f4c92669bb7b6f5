"""Rollouts from a real vLLM on a CPU that the run starts and stops; `make test-vllm` installs it apart and runs this.

`TETHER_VLLM_PYTHON` names the interpreter of vLLM's own environment.
"""

from __future__ import annotations

import os
import re

import pyarrow.parquet as parquet
import pytest
from peft import LoraConfig

from training.online import policy, steps, trainer

pytestmark = pytest.mark.vllm
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


@pytest.fixture
def python():
    found = os.environ.get("TETHER_VLLM_PYTHON")
    if not found:
        pytest.skip("TETHER_VLLM_PYTHON names no interpreter; `make test-vllm` sets it")
    return found


def test_completions_are_held_to_a_pattern_and_cut(python, tmp_path):
    """Log-probs of a real server are of what the pattern left, before the cut; its ratios are what the policy had left
    for it."""
    made = trainer(
        tmp_path,
        model=policy(hidden_size=128, intermediate_size=128),
        rollout_engine="vllm",
        vllm_python=python,
        vllm_server_timeout=300.0,
        vllm_structured_outputs_regex="[a-m ]+",
        vllm_importance_sampling_mode="token_truncate",
        top_k=40,
        max_steps=2,
    )
    try:
        made.train()
    finally:
        served = made.run.algorithm.made.served
        if served is not None:
            served.close()
    for log in steps(made):
        assert log["sync/logp_difference"] < 1e-4
        assert log["sampling/importance_sampling_ratio/max"] < 1.0
        assert log["sampling/sampling_logp_difference/mean"] > 1e-2
    kept = parquet.read_table(tmp_path / "rollouts" / "000001-0.parquet").to_pylist()
    print([row["text"] for row in kept])
    assert all(re.fullmatch("[a-m ]*", row["text"]) for row in kept)


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_a_run_starts_feeds_and_stops_a_server(kind, python, tmp_path, caplog):
    """R17: weights arrive after every step, log-probs agree at a temperature, and the server ends with the run."""
    own = {"peft_config": LoraConfig(**LORA)} if kind == "adapter" else {}
    with caplog.at_level("INFO", "tether"):
        made = trainer(
            tmp_path,
            model=policy(hidden_size=128, intermediate_size=128),
            rollout_engine="vllm",
            vllm_python=python,
            vllm_server_timeout=300.0,
            temperature=0.8,
            learning_rate=2.0 if own else 0.2,
            **own,
        )
        try:
            made.train()
        finally:
            served = made.run.algorithm.made.served
            if served is not None:
                served.close()
    assert f"the server is sent {kind} weights" in caplog.text
    for log in steps(made):
        print({name: value for name, value in log.items() if name.startswith(("sync/", "sampling/"))})
        assert log["sync/logp_difference"] < 1e-4
        assert log["sampling/sampling_logp_difference/max"] < 1e-4
    known = served._follows._known
    moved = (known[-1][0] - known[0][0]).abs().max().item()
    print(f"the policy moved by {moved:.3g} nats, the server by {(known[-1][1] - known[0][1]).abs().max().item():.3g}")
    assert moved > 1e-2, "so that the agreement says something"
    assert served._own._process.poll() is not None
