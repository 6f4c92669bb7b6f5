"""Number by number with TRL 1.16.0's experimental CPOTrainer, SimPO and AlphaPO included; see `test_orpo.py`."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig

from tether import CPOConfig, CPOTrainer
from tiny import pair_rows
from trl_runs import assert_equal, experimental, run, without_bos

pytest.importorskip("trl")
METRICS = (
    *(f"rewards/{name}" for name in ("chosen", "rejected", "accuracies", "margins")),
    *("logps/chosen", "logps/rejected"),
)
UNLIKE = ("logits/chosen", "logits/rejected")
CASES = {
    "sigmoid": {},
    "smoothed": {"label_smoothing": 0.2, "cpo_alpha": 0.3, "beta": 0.4},
    "hinge": {"loss_type": "hinge"},
    "ipo": {"loss_type": "ipo", "beta": 0.5},
    "simpo": {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 1.0},
    "simpo with likelihood": {"loss_type": "simpo", "cpo_alpha": 0.5, "label_smoothing": 0.1},
    "alphapo": {"loss_type": "alphapo", "alpha": 0.25, "beta": 1.5},
}


def both(tmp_path, **arguments):
    found = []
    for classes in ((CPOTrainer, CPOConfig), experimental("cpo")):
        torch.manual_seed(0)
        folder = tmp_path / classes[0].__module__
        found.append(run(*classes, folder, pair_rows(), processing_class=without_bos(), **arguments))
    return found


@pytest.mark.sweep(1)
@pytest.mark.parametrize(
    "name",
    [
        name if name in ("sigmoid", "assistant only", "simpo") else pytest.param(name, marks=pytest.mark.slow)
        for name in CASES
    ],
)
def test_three_steps_equal_trl(name, tmp_path):
    """Summed log-probs, or means over tokens for `ipo`, `simpo` and `alphapo`; the likelihood of chosen completions."""
    ours, theirs = both(tmp_path, evaluation=pair_rows(7), **CASES[name])
    # Without a likelihood TRL logs one of 0.
    likelihood = ours.args.cpo_alpha > 0
    metrics, unlike = ((*METRICS, "nll_loss"), UNLIKE) if likelihood else (METRICS, (*UNLIKE, "nll_loss"))
    assert_equal(ours, theirs, metrics, unlike=unlike)


@pytest.mark.slow
def test_an_adapter_equals_trl(tmp_path):
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    ours, theirs = both(tmp_path, peft_config=lora, seed=5, learning_rate=0.5)
    assert_equal(ours, theirs, (*METRICS, "nll_loss"), unlike=UNLIKE)


def test_the_comparison_can_fail(tmp_path):
    """Negative control: another margin gives other numbers."""
    runs = [
        run(CPOTrainer, CPOConfig, tmp_path, pair_rows(), loss_type="simpo", simpo_gamma=gamma) for gamma in (0.5, 0.6)
    ]
    with pytest.raises(AssertionError, match="loss"):
        assert_equal(*runs, (), unlike=tuple(runs[1].steps[0]))
