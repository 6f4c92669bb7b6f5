"""Number by number with TRL 1.16.0's experimental ORPOTrainer.

TRL puts a BOS token before every prompt where the tokenizer has one; Tether adds one where the tokenizer itself would.
The tokenizer here has none. TRL's `logits/…` are means over padding and prompts too.
"""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig

from tether import ORPOConfig, ORPOTrainer
from tiny import pair_rows
from trl_runs import assert_equal, experimental, run, without_bos

pytest.importorskip("trl")
METRICS = (
    *(f"rewards/{name}" for name in ("chosen", "rejected", "accuracies", "margins")),
    *("logps/chosen", "logps/rejected", "nll_loss", "log_odds_ratio", "log_odds_chosen"),
)
UNLIKE = ("logits/chosen", "logits/rejected")


def both(tmp_path, **arguments):
    found = []
    for classes in ((ORPOTrainer, ORPOConfig), experimental("orpo")):
        torch.manual_seed(0)
        folder = tmp_path / classes[0].__module__
        found.append(run(*classes, folder, pair_rows(), processing_class=without_bos(), **arguments))
    return found


@pytest.mark.parametrize(
    "settings", [{}, pytest.param({"beta": 0.7, "max_length": 45}, marks=pytest.mark.slow)], ids=["defaults", "cut"]
)
def test_three_steps_equal_trl(settings, tmp_path):
    """The likelihood of prompt and chosen completion, and the odds ratio."""
    ours, theirs = both(tmp_path, evaluation=pair_rows(7), **settings)
    assert_equal(ours, theirs, METRICS, unlike=UNLIKE)
    assert "reference" in vars(ours.args)
    assert ours.args.reference == "none"


@pytest.mark.slow
def test_an_adapter_equals_trl(tmp_path):
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    assert_equal(*both(tmp_path, peft_config=lora, seed=5, learning_rate=0.5), METRICS, unlike=UNLIKE)


def test_the_comparison_can_fail(tmp_path):
    """Negative control: another beta gives other numbers."""
    runs = [run(ORPOTrainer, ORPOConfig, tmp_path, pair_rows(), beta=beta) for beta in (0.1, 0.12)]
    with pytest.raises(AssertionError, match="loss"):
        assert_equal(*runs, (), unlike=tuple(runs[1].steps[0]))
