"""Intervals: worked numbers, and that they hold what they promise."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from tether.errors import ConfigError
from tether.evaluate.intervals import bootstrap_mean_difference, mean_interval, wilson_interval

Z95 = 1.959963984540054


@pytest.mark.parametrize(
    ("successes", "n", "expected"),
    # Newcombe, Two-sided confidence intervals for the single proportion, 1998, table I, method 3.
    [(81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605)), (0, 20, (0.0, 0.1611)), (1, 29, (0.0061, 0.1718))],
)
def test_wilson_agrees_with_published_intervals(successes: int, n: int, expected: tuple[float, float]):
    assert wilson_interval(successes, n) == pytest.approx(expected, abs=5e-5)


def test_wilson_ends_are_the_shares_that_the_test_just_accepts():
    share, n = 0.3, 40
    for end in wilson_interval(12, n):
        assert abs(share - end) == pytest.approx(Z95 * np.sqrt(end * (1 - end) / n))


def test_wilson_is_symmetric_and_knows_nothing_without_trials():
    low, high = wilson_interval(7, 9)
    assert wilson_interval(2, 9) == pytest.approx((1 - high, 1 - low))
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(9, 9)[1] == 1.0
    with pytest.raises(ConfigError, match="3 successes of 2 trials"):
        wilson_interval(3, 2)


def test_a_mean_has_students_interval_and_one_value_has_none():
    values = np.array([1.0, 2.0, 4.0, 8.0])
    expected = stats.t.interval(0.95, 3, loc=values.mean(), scale=stats.sem(values))
    assert mean_interval(values.mean(), values.std(), 4) == pytest.approx(expected)
    assert mean_interval(1.0, 0.0, 1) == (-np.inf, np.inf)


def test_bootstrap_of_pairs_is_near_the_normal_interval():
    random = np.random.default_rng(1)
    before = random.normal(size=400)
    after = before + 0.2 + random.normal(scale=0.5, size=400)
    difference, low, high = bootstrap_mean_difference(before, after)
    half = Z95 * (after - before).std() / np.sqrt(400)
    assert difference == pytest.approx((after - before).mean())
    assert (low, high) == pytest.approx((difference - half, difference + half), abs=0.1 * half)


def test_bootstrap_without_pairs_does_not_use_their_order():
    random = np.random.default_rng(2)
    before = random.normal(size=300)
    after = before + 0.1
    _, low, high = bootstrap_mean_difference(before, after, paired=False)
    half = Z95 * np.sqrt(before.var() / 300 + after.var() / 300)
    assert (low, high) == pytest.approx((0.1 - half, 0.1 + half), abs=0.1 * half)
    assert bootstrap_mean_difference(before, after)[1:] == pytest.approx((0.1, 0.1))
    assert bootstrap_mean_difference(before, after[:7], paired=False)[0] == pytest.approx(
        after[:7].mean() - before.mean()
    )


def test_bootstrap_gives_the_numbers_of_resampling_by_hand():
    """Written down from the resampling by hand that scipy replaced: reports say the same as before."""
    random = np.random.default_rng(0)
    before = random.normal(size=400)
    after = before + 0.1 * random.normal(size=400)
    expected = (-0.001578572817696293, -0.011286144805382824, 0.008387913435340935)
    assert bootstrap_mean_difference(before, after) == pytest.approx(expected, abs=1e-15)
    expected = (0.0013357671969694979, -0.1519399886309814, 0.15005147924647075)
    assert bootstrap_mean_difference(before, after[:300], paired=False) == pytest.approx(expected, abs=1e-15)


def test_bootstrap_of_many_values_draws_in_parts():
    before, after = np.random.default_rng(5).normal(size=(2, 150_000))
    whole, low, high = bootstrap_mean_difference(before, after, resamples=100)
    half = Z95 * (after - before).std() / np.sqrt(150_000)
    assert (low, high) == pytest.approx((whole - half, whole + half), abs=0.3 * half)


def test_bootstrap_is_the_same_for_the_same_seed():
    before, after = np.random.default_rng(3).normal(size=(2, 20))
    assert bootstrap_mean_difference(before, after, seed=4) == bootstrap_mean_difference(before, after, seed=4)
    assert bootstrap_mean_difference(before, after, seed=4) != bootstrap_mean_difference(before, after, seed=5)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ([1.0], [1.0], "1 values before"),
        ([1.0], [1.0, 2.0], "1 values before and 2 after"),
        ([np.nan, 1.0], [1.0, 1.0], "not finite"),
    ],
)
def test_bootstrap_refuses(before: list[float], after: list[float], message: str):
    with pytest.raises(ConfigError, match=message):
        bootstrap_mean_difference(before, after)
