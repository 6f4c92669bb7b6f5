"""Number by number with TRL 1.16.0, and with golden numbers of it where it is not installed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from support.trl_dpo import METRICS, digest, needs_trl, run
from tether import DPOConfig, DPOTrainer

GOLDEN = Path(__file__).parent / "golden.json"
CASES = {
    "full, another model as reference": {"reference": True},
    "full, start": {},
    "lora, start": {"lora": True},
    "lora, checkpointing": {"lora": True, "gradient_checkpointing": True},
    "accumulated": {"reference": True, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 3},
}


@needs_trl
@pytest.mark.parametrize("name", CASES)
@pytest.mark.sweep(1)
def test_three_steps_equal_trl(name, tmp_path):
    """Loss, every logged metric and the weights after 3 SGD steps, within 1e-4."""
    from trl import DPOConfig as TheirConfig
    from trl import DPOTrainer as TheirTrainer

    ours, our_evaluation, our_weights = run(DPOConfig, DPOTrainer, tmp_path / "ours", CASES[name])
    theirs, their_evaluation, their_weights = run(TheirConfig, TheirTrainer, tmp_path / "theirs", CASES[name])
    assert len(ours) == len(theirs) == 3
    # What TRL averages over micro-batches instead of tokens differs when a step has several; rewards and losses do not.
    per_token = {"entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected"}
    skipped = per_token if "gradient_accumulation_steps" in CASES[name] else set()
    for mine, their in zip(ours, theirs, strict=True):
        for metric in set(METRICS) - skipped:
            assert mine[metric] == pytest.approx(their[metric], abs=1e-4, rel=1e-4), metric
    # TRL's evaluation averages batches, the last of which is smaller; ours averages rows.
    assert our_evaluation.keys() >= their_evaluation.keys() - {"num_tokens"}
    assert our_weights.keys() == their_weights.keys()
    for parameter, value in our_weights.items():
        torch.testing.assert_close(value, their_weights[parameter], atol=1e-4, rtol=1e-4)


@pytest.mark.sweep(1)
@pytest.mark.parametrize("name", CASES)
def test_three_steps_equal_the_golden_numbers(name, tmp_path):
    """The same against numbers that TRL 1.16.0 gave (`python tests/parity/make_golden.py`)."""
    golden = json.loads(GOLDEN.read_text())[name]
    steps, _, weights = run(DPOConfig, DPOTrainer, tmp_path, CASES[name])
    per_token = {"entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected"}
    skipped = per_token if "gradient_accumulation_steps" in CASES[name] else set()
    for mine, expected in zip(steps, golden["steps"], strict=True):
        for metric in set(METRICS) - skipped:
            assert mine[metric] == pytest.approx(expected[metric], abs=1e-4, rel=1e-4), metric
    found = digest(weights)
    assert found.keys() == golden["weights"].keys()
    for parameter, sums in golden["weights"].items():
        assert found[parameter] == pytest.approx(sums, abs=1e-5, rel=1e-3), parameter


def test_the_comparison_can_fail(tmp_path):
    """Negative control: another beta gives other numbers than the golden ones."""
    golden = json.loads(GOLDEN.read_text())["full, another model as reference"]
    steps, _, _ = run(DPOConfig, DPOTrainer, tmp_path, {"reference": True, "beta": 0.2})
    assert steps[0]["loss"] != pytest.approx(golden["steps"][0]["loss"], abs=1e-4, rel=1e-4)
