"""A line is said of a run that needs attention, when it does and once; a healthy run has none."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tether.training.health import Facts, Health, rules
from tether.training.health.rules import Logs

HERE = Path(__file__).resolve().parent
DEMO = Facts(adapter=True, parameters=134_515_008, learning_rate=2e-4, adam=True, max_grad_norm=1.0, beta=0.1)
GOOD: Logs = {
    "loss": 0.6,
    "learning_rate": 2e-4,
    "grad_norm": 0.8,
    "rewards/margins": 0.3,
    "rewards/accuracies": 0.8,
    "logps/chosen": -50.0,
    "kl/k3": 0.2,
}
SAMPLED: Logs = {"loss": 0.1, "kl": 0.2, "entropy": 2.0, "frac_reward_zero_std": 0.5, "completions/mean_length": 20.0}


def demo() -> list[dict[str, float]]:
    """What the demo logged: SmolLM2-135M, LoRA, 35 steps on 556 pairs of film reviews."""
    return [json.loads(line) for line in (HERE / "healthy_demo.jsonl").read_text().splitlines()]


def heard(lines: list[tuple[int, Logs]], facts: Facts = DEMO) -> list[tuple[int, str]]:
    health = Health(facts)
    return [(step, found.name) for step, logs in lines for found in health.look(logs, step)]


def test_nothing_is_said_of_the_demo() -> None:
    logs = [(int(line["step"]), line) for line in demo() if "loss" in line]
    assert len(logs) == 17
    assert heard(logs) == []


def test_the_limits_lie_beyond_what_the_demo_logs() -> None:
    """The measured basis of the figures: the extremes of a healthy run, as the comments beside them say."""
    logs = [line for line in demo() if "loss" in line]
    lost = max(logs[0]["logps/chosen"] - line["logps/chosen"] for line in logs)
    margins = [line["rewards/margins"] / (DEMO.beta or 1.0) for line in logs[1:]]
    assert lost == pytest.approx(6.7, abs=0.1)
    assert lost < rules._LOST / 2
    assert min(margins) == pytest.approx(0.04, abs=0.001)
    assert min(margins) > 1.9 * rules._NO_MARGIN
    assert margins[3] / margins[-1] == pytest.approx(0.22, abs=0.01)  # after 10 steps of 35
    assert max(line["rewards/accuracies"] for line in logs) == 0.9375 < rules._SATURATED
    assert max(line["grad_norm"] for line in logs) == pytest.approx(1.18, abs=0.01)
    assert max(line["grad_norm"] for line in logs) < rules._CLIPPED * DEMO.max_grad_norm / 8
    assert sorted(line["kl/k3"] for line in logs)[-2:] == pytest.approx([0.38, 0.66], abs=0.01)
    assert max(line["kl/k3"] for line in logs) < rules._FAR


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"rewards/margins": 0.0001}, "margin-zero"),
        ({"rewards/accuracies": 1.0}, "accuracy-saturated"),
        ({"grad_norm": 40.0}, "gradient-clipped"),
    ],
)
def test_the_demo_with_one_figure_wrong_is_spoken_of(changed: Logs, name: str) -> None:
    """The negative control of the test above: the same run, in which one thing lasts."""
    logs = [(int(line["step"]), {**line, **changed}) for line in demo() if "loss" in line and line["step"] > 2]
    assert heard(logs) == [(30, name)]


@pytest.mark.parametrize(
    ("start", "bad", "first", "name"),
    [
        (GOOD, {"rewards/margins": 0.001}, 31, "margin-zero"),
        (GOOD, {"rewards/margins": -0.001}, 31, "margin-zero"),
        (GOOD, {"rewards/accuracies": 1.0}, 31, "accuracy-saturated"),
        (GOOD, {"logps/chosen": -80.0}, 11, "chosen-collapsing"),
        (GOOD, {"grad_norm": 11.0}, 31, "gradient-clipped"),
        (GOOD, {"grad_norm": 0.0}, 11, "gradient-zero"),
        (GOOD, {"kl/k3": 1.1}, 11, "reference-far"),
        (SAMPLED, {"kl": 1.1}, 2, "reference-far"),
        (SAMPLED, {"completions/mean_length": 61.0}, 11, "lengths-exploding"),
        (SAMPLED, {"completions/clipped_ratio": 1.0}, 2, "completions-cut"),
        (SAMPLED, {"frac_reward_zero_std": 0.95}, 11, "rewards-equal"),
        (SAMPLED, {"entropy": 0.19}, 2, "entropy"),
        (SAMPLED, {"loss": 0.0}, 2, "no-loss"),
    ],
)
def test_a_state_that_lasts_is_said_once(start: Logs, bad: Logs, first: int, name: str) -> None:
    logs = [(1, start), *((step, {**start, **bad}) for step in range(2, 45))]
    assert heard(logs) == [(first, name)]


@pytest.mark.parametrize(
    ("start", "near"),
    [
        (GOOD, {"rewards/margins": 0.0021}),
        (GOOD, {"rewards/accuracies": 0.99}),
        (GOOD, {"logps/chosen": -74.0}),
        (GOOD, {"logps/chosen": -20.0}),
        (GOOD, {"grad_norm": 9.9}),
        (GOOD, {"grad_norm": 1e-12}),
        (GOOD, {"entropy": 0.001}),  # of text that was not sampled
        (SAMPLED, {"completions/mean_length": 59.0}),
        (SAMPLED, {"completions/clipped_ratio": 0.99}),
    ],
)
def test_nothing_is_said_on_this_side_of_a_limit(start: Logs, near: Logs) -> None:
    assert heard([(1, start), *((step, {**start, **near}) for step in range(2, 45))]) == []


def test_in_a_warm_up_no_margin_is_expected() -> None:
    still = {**GOOD, "rewards/margins": 0.0}
    warming = [(step, {**still, "learning_rate": 0.9e-4}) for step in range(1, 100)]
    assert heard(warming) == []
    assert heard([*warming, *((step, still) for step in range(100, 140))]) == [(129, "margin-zero")]


def test_what_has_passed_may_come_again() -> None:
    cut = {**SAMPLED, "completions/clipped_ratio": 1.0}
    logs = [(1, cut), (2, cut), (3, SAMPLED), (4, cut)]
    assert heard(logs) == [(1, "completions-cut"), (4, "completions-cut")]


@pytest.mark.parametrize(
    ("facts", "spoken"),
    [
        (Facts(adapter=True, parameters=10**9, learning_rate=5e-7, adam=True), True),
        (Facts(adapter=True, parameters=10**9, learning_rate=5e-6, adam=True), False),
        (Facts(adapter=True, parameters=10**9, learning_rate=1e-2, adam=True), True),
        (Facts(adapter=False, parameters=10**9, learning_rate=5e-7, adam=True), False),
        (Facts(adapter=False, parameters=10**9, learning_rate=2e-4, adam=True), True),
        (Facts(adapter=False, parameters=10**9, learning_rate=2e-4, adam=False), False),
        (Facts(adapter=False, parameters=10**6, learning_rate=2e-3, adam=True), False),
    ],
)
def test_a_learning_rate_is_judged_by_what_trains(facts: Facts, spoken: bool) -> None:
    assert heard([(1, {"loss": 0.6}), (2, {"loss": 0.6})], facts) == [(1, "learning-rate")] * spoken


def test_each_kind_has_its_paragraph_and_each_paragraph_its_kind() -> None:
    """The line in the terminal ends in `docs/health.md#name`."""
    root = HERE.parents[1]
    rules = (root / "src/tether/training/health/rules.py").read_text()
    names = set(re.findall(r'self\.lasting\(\s*"([a-z-]+)"', rules))
    headings = re.findall(r"^## (.+)$", (root / "docs/health.md").read_text(), re.MULTILINE)
    assert len(names) == 14
    assert {heading.lower().replace(" ", "-") for heading in headings} == names
