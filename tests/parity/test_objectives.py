"""Every objective and option that TRL 1.16.0 has, number by number, with a reference that differs from the policy.

The ordinary suite compares with golden numbers of TRL; `make parity` runs TRL itself. Where Tether means something else
on purpose, `docs/conventions.md` says so, and the case below names what is left out.
"""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
import torch

from support.trl_dpo import METRICS, digest, needs_trl, run
from tether import DPOConfig, DPOTrainer

GOLDEN = Path(__file__).parent / "golden_objectives.json"
# Without a reference there are no rewards against one: Tether runs none for a loss that needs none.
REWARDS = {metric for metric in METRICS if metric.startswith("rewards/")}
CASES = {
    "sigmoid": {},
    "sigmoid, beta": {"beta": 0.7},
    "hinge": {"loss_type": ["hinge"]},
    "ipo": {"loss_type": ["ipo"], "learning_rate": 0.005},
    "exo_pair": {"loss_type": ["exo_pair"], "label_smoothing": 1e-3},
    "exo_pair, more smoothing": {"loss_type": ["exo_pair"], "label_smoothing": 0.2, "beta": 0.5},
    "nca_pair": {"loss_type": ["nca_pair"]},
    "robust": {"loss_type": ["robust"], "label_smoothing": 0.2},
    "bco_pair": {"loss_type": ["bco_pair"]},
    "sppo_hard": {"loss_type": ["sppo_hard"], "learning_rate": 0.001},
    "aot": {"loss_type": ["aot"]},
    "aot, smoothing": {"loss_type": ["aot"], "label_smoothing": 0.1, "beta": 0.5},
    "aot_unpaired": {"loss_type": ["aot_unpaired"]},
    "aot_unpaired, smoothing": {"loss_type": ["aot_unpaired"], "label_smoothing": 0.1},
    "apo_zero": {"loss_type": ["apo_zero"]},
    "apo_down": {"loss_type": ["apo_down"]},
    "discopop": {"loss_type": ["discopop"]},
    "discopop, tau": {"loss_type": ["discopop"], "discopop_tau": 0.5, "beta": 0.3},
    "sft": {"loss_type": ["sft"]},
    "sigmoid_norm": {"loss_type": ["sigmoid_norm"], "beta": 2.0},
    "forward_kl": {"f_divergence_type": "forward_kl"},
    "forward_kl, hinge": {"f_divergence_type": "forward_kl", "loss_type": ["hinge"]},
    "js_divergence": {"f_divergence_type": "js_divergence"},
    "js_divergence, robust": {"f_divergence_type": "js_divergence", "loss_type": ["robust"], "label_smoothing": 0.1},
    "alpha_divergence": {"f_divergence_type": "alpha_divergence"},
    "alpha_divergence, coefficient": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.4},
    "alpha_divergence, ipo": {
        "f_divergence_type": "alpha_divergence",
        "loss_type": ["ipo"],
        "learning_rate": 0.005,
    },
    "alpha_divergence, sigmoid_norm": {"f_divergence_type": "alpha_divergence", "loss_type": ["sigmoid_norm"]},
    "ld_alpha": {"ld_alpha": 0.5},
    "ld_alpha, ipo": {"ld_alpha": 0.0, "loss_type": ["ipo"], "learning_rate": 0.005},
    "ld_alpha, aot": {"ld_alpha": 0.3, "loss_type": ["aot"]},
    "use_weighting": {"use_weighting": True},
    "use_weighting, nca_pair": {"use_weighting": True, "loss_type": ["nca_pair"]},
    "MPO": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "several, weighted": {"loss_type": ["sigmoid", "apo_zero"], "loss_weights": [0.5, 2.0], "use_weighting": True},
    "several, diverging": {
        # Not sigmoid: TRL's takes no notice of label_smoothing, with which it is cDPO here.
        "loss_type": ["hinge", "exo_pair", "sft"],
        "label_smoothing": 1e-3,
        "f_divergence_type": "js_divergence",
        "ld_alpha": 0.5,
    },
}


@pytest.fixture(scope="module", autouse=True)
def short_collections():
    """accelerate collects garbage in each run; going through the modules' objects took two thirds of these tests."""
    gc.freeze()
    yield
    gc.unfreeze()


def case(name):
    return {"near_reference": True, "logging_steps": 1, "max_steps": 3, **CASES[name]}


def ours(name, folder):
    """The same case for Tether, which refuses a reference that no loss compares with."""
    options = case(name)
    if name == "sft":
        options["near_reference"] = "unused"
    return run(DPOConfig, DPOTrainer, folder, options)


def compare(name, steps, expected):
    skipped = REWARDS if name == "sft" else set()
    assert len(steps) == len(expected) == 3
    for mine, their in zip(steps, expected, strict=True):
        for metric in set(METRICS) - skipped:
            assert mine[metric] == pytest.approx(their[metric], abs=1e-4, rel=1e-4), metric


@needs_trl
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_three_steps_equal_trl(name, tmp_path):
    """Loss, every metric of TRL, and the weights after 3 SGD steps, within 1e-4."""
    from trl import DPOConfig as TheirConfig
    from trl import DPOTrainer as TheirTrainer

    steps, _, weights = ours(name, tmp_path / "ours")
    expected, _, their_weights = run(TheirConfig, TheirTrainer, tmp_path / "theirs", case(name))
    compare(name, steps, expected)
    assert weights.keys() == their_weights.keys()
    for parameter, value in weights.items():
        torch.testing.assert_close(value, their_weights[parameter], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.sweep(8)
def test_three_steps_equal_the_golden_numbers(name, tmp_path):
    """The same against numbers that TRL 1.16.0 gave (`python tests/parity/make_golden.py`)."""
    golden = json.loads(GOLDEN.read_text())[name]
    steps, _, weights = ours(name, tmp_path)
    compare(name, steps, golden["steps"])
    found = digest(weights)
    assert found.keys() == golden["weights"].keys()
    for parameter, sums in golden["weights"].items():
        assert found[parameter] == pytest.approx(sums, abs=1e-5, rel=1e-3), parameter


def test_the_cases_differ():
    """Negative control: no two cases have the same golden numbers, so that none can stand for another."""
    golden = json.loads(GOLDEN.read_text())
    assert golden.keys() == CASES.keys()
    losses = {name: tuple(round(step["loss"], 5) for step in found["steps"]) for name, found in golden.items()}
    assert len(set(losses.values())) == len(losses)
