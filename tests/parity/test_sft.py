"""Number by number with TRL 1.16.0's SFTTrainer."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig

from tether import SFTConfig, SFTTrainer
from tiny import pair_rows, tiny_tokenizer
from trl_runs import assert_equal, policy, run

trl = pytest.importorskip("trl")
METRICS = ("entropy", "mean_token_accuracy")
# ChatML that marks what the assistant wrote, as TRL needs it for its mask.
MARKED = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def completions():
    return [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pair_rows()]


def conversations():
    """Two turns each, the second answer longer than the first."""

    def said(*texts):
        return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]

    return [
        {"messages": said(row["prompt"], row["chosen"], "and the other?", row["rejected"] * (1 + i % 2))}
        for i, row in enumerate(pair_rows())
    ]


def marked_tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = MARKED
    return tokenizer


CASES = {
    "completions": (completions(), {}),
    "truncated": (completions(), {"max_length": 30}),
    "prompts too": (completions(), {"completion_only_loss": False}),
    "dft": (completions(), {"loss_type": "dft"}),
    "accumulated": (completions(), {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3}),
    "texts": ([{"text": row["prompt"] + row["chosen"]} for row in pair_rows()], {}),
    "conversations": (conversations(), {"processing_class": marked_tokenizer()}),
    "assistant only": (conversations(), {"processing_class": marked_tokenizer(), "assistant_only_loss": True}),
}


@pytest.mark.sweep(1)
@pytest.mark.parametrize(
    "name",
    [
        name if name in ("completions", "assistant only", "simpo") else pytest.param(name, marks=pytest.mark.slow)
        for name in CASES
    ],
)
def test_three_steps_equal_trl(name, tmp_path):
    """A loss averaged over the tokens of a step; also where it is accumulated over batches of unequal length."""
    rows, settings = CASES[name]
    runs = [
        run(*classes, tmp_path / classes[0].__module__, rows, evaluation=rows[:7], **settings)
        for classes in ((SFTTrainer, SFTConfig), (trl.SFTTrainer, trl.SFTConfig))
    ]
    # TRL averages these over micro-batches instead of over tokens.
    unlike = METRICS if name == "accumulated" else ()
    assert_equal(*runs, tuple(set(METRICS) - set(unlike)), unlike=unlike)


@pytest.mark.slow
def test_an_adapter_equals_trl(tmp_path):
    runs = []
    for classes in ((SFTTrainer, SFTConfig), (trl.SFTTrainer, trl.SFTConfig)):
        lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        torch.manual_seed(0)
        runs.append(run(*classes, tmp_path, completions(), peft_config=lora, seed=5, learning_rate=0.5))
    assert_equal(*runs, METRICS)


def test_the_comparison_can_fail(tmp_path):
    """Negative control: other tokens scored give other numbers."""
    runs = [
        run(SFTTrainer, SFTConfig, tmp_path, completions(), model=policy(), completion_only_loss=value)
        for value in (None, False)
    ]
    with pytest.raises(AssertionError, match="loss"):
        assert_equal(*runs, METRICS)
