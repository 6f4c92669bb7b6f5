"""Win rates: verdicts that an order turns round are ties, and length control takes out what length alone won."""

from __future__ import annotations

import numpy as np
import pytest

from tether.errors import ConfigError
from tether.evaluate.answers.win_rate import RewardJudge, in_both_orders, length_controlled, summary
from tether.rewards import FunctionJudge, Verdict

NAMES = ("a", "b", "judge")


def test_a_function_is_asked_in_both_orders() -> None:
    asked: list[tuple[str, str]] = []

    def always_the_first(prompt: str, first: str, second: str) -> float:
        asked.append((first, second))
        return 1.0

    found = in_both_orders(FunctionJudge(always_the_first), ["p", "q"], ["x", "same"], ["y", "same"])
    assert asked == [("x", "y"), ("y", "x")]
    assert found == [Verdict(1.0, 0.0), Verdict(0.5, 0.5)]
    assert [one.turned for one in found] == [True, False]
    assert [one.first for one in found] == [0.5, 0.5]


def test_a_function_that_sees_the_answers_is_believed() -> None:
    longer = FunctionJudge(lambda prompt, first, second: float(len(first) > len(second)))
    found = in_both_orders(longer, ["p", "q"], ["long", "a"], ["b", "longer"])
    assert [one.first for one in found] == [1.0, 0.0]


def test_a_reward_prefers_the_larger_and_none_is_no_verdict() -> None:
    rewards = {"good": 2.0, "bad": 1.0, "unknown": None}
    judge = RewardJudge(lambda prompts, completions: [rewards[one] for one in completions], "r")
    found = in_both_orders(judge, ["p"] * 3, ["good", "bad", "good"], ["bad", "good", "unknown"])
    assert [one.first for one in found] == [1.0, 0.0, None]
    counted = summary(found, ["good", "bad", "good"], ["bad", "good", "unknown"], NAMES, "")
    assert (counted.prompts, counted.judged, counted.wins, counted.ties, counted.losses) == (3, 2, 1, 0, 1)
    assert counted.rate[0] == 0.5


def test_no_verdict_at_all_is_refused() -> None:
    with pytest.raises(ConfigError, match="no verdict"):
        summary([Verdict(None, 1.0)], ["a"], ["b"], NAMES, "")


def test_length_control_takes_out_what_length_won() -> None:
    generator = np.random.default_rng(3)
    differences = generator.normal(40.0, 60.0, 4000)
    # The longer answer wins with the chance that the model of the control says; alike answers are even.
    chance = 1 / (1 + np.exp(-1.5 * np.tanh(differences / differences.std())))
    scores = (generator.random(4000) < chance).astype(float)
    assert scores.mean() > 0.6
    value, low, high = length_controlled(scores, differences)
    assert value == pytest.approx(0.5, abs=0.03)
    assert low < 0.5 < high
    better = (generator.random(4000) < 1 / (1 + np.exp(-0.8 - np.log(chance / (1 - chance))))).astype(float)
    assert length_controlled(better, differences)[0] == pytest.approx(1 / (1 + np.exp(-0.8)), abs=0.03)


def test_a_model_that_always_wins_has_a_finite_rate() -> None:
    value, low, high = length_controlled(np.ones(20), np.arange(20.0))
    assert 0.9 < low <= value <= high < 1.0
