"""Number by number with TRL 1.16.0's RewardTrainer."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForSequenceClassification

from tether import RewardConfig, RewardTrainer
from tiny import CONFIGS, pair_rows, tiny_tokenizer
from trl_runs import assert_equal, run

trl = pytest.importorskip("trl")
METRICS = ("accuracy", "margin", "min_reward", "mean_reward", "max_reward")


def classifier():
    torch.manual_seed(0)
    config = LlamaConfig(**{**CONFIGS["llama"][1], "vocab_size": len(tiny_tokenizer())}, num_labels=1)
    model = LlamaForSequenceClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5.0)
    return model


def with_margins():
    return [{**row, "margin": 0.3 * (i % 4)} for i, row in enumerate(pair_rows())]


@pytest.mark.parametrize(
    ("rows", "settings"),
    [
        pytest.param(pair_rows(), {}, marks=pytest.mark.slow),
        (with_margins(), {}),
        pytest.param(pair_rows(), {"center_rewards_coefficient": 0.05}, marks=pytest.mark.slow),
        # Pairs that are longer are dropped by both.
        pytest.param(pair_rows(), {"max_length": 50}, marks=pytest.mark.slow),
    ],
    ids=["plain", "margins", "centred", "longer pairs dropped"],
)
def test_three_steps_equal_trl(rows, settings, tmp_path):
    runs = [
        run(*classes, tmp_path / classes[0].__module__, rows, model=classifier(), evaluation=pair_rows(7), **settings)
        for classes in ((RewardTrainer, RewardConfig), (trl.RewardTrainer, trl.RewardConfig))
    ]
    assert_equal(*runs, METRICS)


@pytest.mark.slow
def test_an_adapter_equals_trl(tmp_path):
    """The head is trained in full beside it, as TRL advises."""
    runs = []
    for classes in ((RewardTrainer, RewardConfig), (trl.RewardTrainer, trl.RewardConfig)):
        lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS", init_lora_weights=False)
        torch.manual_seed(0)
        runs.append(run(*classes, tmp_path, pair_rows(), model=classifier(), peft_config=lora, seed=5))
    assert_equal(*runs, METRICS)


def test_the_comparison_can_fail(tmp_path):
    """Negative control: another coefficient gives other numbers."""
    classes = RewardTrainer, RewardConfig
    runs = [
        run(*classes, tmp_path, pair_rows(), model=classifier(), center_rewards_coefficient=value)
        for value in (0.05, 0.06)
    ]
    with pytest.raises(AssertionError, match="loss"):
        assert_equal(*runs, METRICS)
