"""Mixtures of experts against TRL 1.16.0: the load-balancing loss, in the loss, the logs and every weight."""

from __future__ import annotations

import pytest
import torch

from support.trl_dpo import METRICS, needs_trl, run
from tether import DPOConfig, DPOTrainer

CASES = {
    "mixtral, own coefficient": {"family": "mixtral", "router_aux_loss_coef": 0.5, "reference": True},
    "mixtral, the model's coefficient": {"family": "mixtral"},
    "qwen3_moe, lora": {"family": "qwen3_moe", "router_aux_loss_coef": 0.5, "lora": True},
}


@needs_trl
@pytest.mark.parametrize("name", CASES)
@pytest.mark.sweep(1)
def test_three_steps_equal_trl(name, tmp_path):
    """Loss, every logged metric, `aux_loss` and the weights after 3 SGD steps."""
    from trl import DPOConfig as TheirConfig
    from trl import DPOTrainer as TheirTrainer

    ours, our_evaluation, our_weights = run(DPOConfig, DPOTrainer, tmp_path / "ours", CASES[name])
    theirs, their_evaluation, their_weights = run(TheirConfig, TheirTrainer, tmp_path / "theirs", CASES[name])
    assert len(ours) == len(theirs) == 3
    for mine, their in zip(ours, theirs, strict=True):
        for metric in (*METRICS, "aux_loss"):
            assert mine[metric] == pytest.approx(their[metric], abs=1e-4, rel=1e-4), metric
    assert "aux_loss" in our_evaluation.keys() & their_evaluation.keys()
    for parameter, value in our_weights.items():
        torch.testing.assert_close(value, their_weights[parameter], atol=1e-4, rtol=1e-4)
