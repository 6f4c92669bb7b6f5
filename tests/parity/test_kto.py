"""Number by number with TRL 1.16.0's KTOTrainer.

TRL pairs completions for its KL estimate by turning each batch of rows in the order of the data; Tether turns the whole
set, once. The two are the same where a batch is the set, so that is what is compared. TRL 1.16 has no BCO: its removed
trainer's formula is written out here.
"""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig

from tether import KTOConfig, KTOTrainer
from tiny import pair_rows
from trl_runs import assert_equal, policy, run

trl = pytest.importorskip("trl")
METRICS = (
    *(f"{kind}/{name}" for kind in ("rewards", "logps", "logits") for name in ("chosen", "rejected")),
    "rewards/margins",
    "entropy",
)
SETTINGS = {"per_device_train_batch_size": 6, "train_sampling_strategy": "sequential", "learning_rate": 0.3}


def rows(count=6):
    """Distinct prompts and ragged, distinct completions, two of three desirable."""
    sides = ("chosen", "rejected", "chosen")
    return [
        {"prompt": row["prompt"], "completion": row[sides[i % 3]], "label": i % 3 != 1}
        for i, row in enumerate(pair_rows(count))
    ]


def both(tmp_path, **arguments):
    """A run of each; without an adapter, with a reference that differs from the policy."""
    found = []
    for classes in ((KTOTrainer, KTOConfig), (trl.KTOTrainer, trl.KTOConfig)):
        reference = {"ref_model": policy(seed=1)} if "peft_config" not in arguments else {}
        torch.manual_seed(0)
        found.append(run(*classes, tmp_path / classes[0].__module__, rows(), **reference, **{**SETTINGS, **arguments}))
    return found


@pytest.mark.sweep(1)
@pytest.mark.parametrize(
    "settings",
    [{}, pytest.param({"beta": 0.5, "desirable_weight": 0.7, "undesirable_weight": 1.4}, marks=pytest.mark.slow)],
    ids=["defaults", "weights"],
)
@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
def test_three_steps_equal_trl(loss, settings, tmp_path):
    """Training and one evaluation of one batch; with rows that are cut, where no other row's completion is taken."""
    cut = {"max_length": 40} if loss == "apo_zero_unpaired" else {}
    ours, theirs = both(tmp_path, loss_type=loss, evaluation=rows(5), **cut, **settings)
    # TRL logs a divergence of 0 for the loss that estimates none.
    known = {"metrics": (*METRICS, "kl")} if loss == "kto" else {"metrics": METRICS, "unlike": ("kl",)}
    assert_equal(ours, theirs, **known)
    if loss == "kto" and not settings:
        assert any(step["kl"] > 0 for step in ours.steps), "the baseline is tested above 0"


@pytest.mark.slow
def test_an_adapter_equals_trl(tmp_path):
    """With the adapter switched off as the reference."""
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    ours, theirs = both(tmp_path, peft_config=lora, seed=5, learning_rate=0.5)
    assert_equal(ours, theirs, (*METRICS, "kl"))


def test_bco_equals_the_removed_trainer(tmp_path):
    """Its loss at each step from the logged rewards of rows, one row a class, with the mean of earlier rewards."""
    two = [{**row, "label": i == 0} for i, row in enumerate(rows(2))]
    settings = {**SETTINGS, "per_device_train_batch_size": 2}
    found = run(KTOTrainer, KTOConfig, tmp_path, two, ref_model=policy(seed=1), loss_type="bco", **settings)
    earlier: list[float] = []
    for step in found.steps:
        chosen, rejected = step["rewards/chosen"], step["rewards/rejected"]
        delta = sum(earlier) / len(earlier) if earlier else 0.0
        losses = torch.nn.functional.logsigmoid(torch.tensor([chosen - delta, delta - rejected], dtype=torch.float64))
        assert step["delta"] == pytest.approx(delta, abs=1e-5)
        assert step["loss"] == pytest.approx(-losses.mean().item(), abs=1e-5)
        earlier += [chosen, rejected]
    assert found.steps[-1]["delta"] != 0.0


def test_the_comparison_can_fail(tmp_path):
    """Negative control: another beta gives other numbers."""
    runs = [
        run(KTOTrainer, KTOConfig, tmp_path, rows(), ref_model=policy(seed=1), beta=beta, **SETTINGS)
        for beta in (0.1, 0.11)
    ]
    with pytest.raises(AssertionError, match="loss"):
        assert_equal(*runs, (*METRICS, "kl"))
