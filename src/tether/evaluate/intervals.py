"""95 % intervals for what an evaluation reports, by scipy: shares, and differences of means."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

from tether.errors import ConfigError

_NUMBERS_AT_ONCE = 4_000_000
# A value, the lower and the upper end.
Interval = tuple[float, float, float]


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    r"""Wilson's 95 % interval of a share; right for small samples and for shares near 0 and 1 too.

    Args:
        successes: how many of the trials.
        n: how many trials.

    Returns:
        Lower and upper end, from 0 to 1; `(0.0, 1.0)` without any trial.

    Raises:
        ConfigError: fewer than 0 or more than n successes.

    Reference:
        Probable Inference, the Law of Succession, and Statistical Inference. E. B. Wilson, 1927.

    Example:
        >>> low, high = wilson_interval(5, 10)
        >>> round(low, 4), round(high, 4)
        (0.2366, 0.7634)
    """
    if not 0 <= successes <= n:
        raise ConfigError(f"{successes} successes of {n} trials. Allowed: from 0 to the number of trials.")
    if n == 0:
        return 0.0, 1.0
    interval = stats.binomtest(successes, n).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def mean_interval(mean: float, deviation: float, n: int) -> tuple[float, float]:
    """Student's 95 % interval of a mean.

    Args:
        mean: of the values.
        deviation: their standard deviation, with n in its denominator.
        n: how many there are.

    Returns:
        Lower and upper end; infinite for fewer than two values, which say nothing of their spread.

    Example:
        >>> low, high = mean_interval(1.0, 2.0, 25)
        >>> round(low, 4), round(high, 4)
        (0.1574, 1.8426)
    """
    if n < 2:
        return -float("inf"), float("inf")
    half = float(stats.t.ppf(0.975, n - 1)) * deviation / (n - 1) ** 0.5
    return mean - half, mean + half


def bootstrap_mean_difference(
    before: Sequence[float] | np.ndarray,
    after: Sequence[float] | np.ndarray,
    *,
    paired: bool = True,
    seed: int = 0,
    resamples: int = 10_000,
) -> tuple[float, float, float]:
    """Mean of `after` less mean of `before`, with a 95 % percentile bootstrap interval.

    Args:
        before: values `[N]`.
        after: values `[M]`; if paired, `[N]`, each of the same thing as the value before it.
        paired: resample the N differences; otherwise both samples, each for itself.
        seed: of the resampling; the same seed gives the same interval.
        resamples: how many samples are drawn.

    Returns:
        The difference, the lower and the upper end.

    Raises:
        ConfigError: fewer than two values, values that are not finite, or pairs of different number.

    Example:
        >>> bootstrap_mean_difference([0.0, 1.0], [0.5, 1.5])
        (0.5, 0.5, 0.5)
    """
    first, second = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if min(first.size, second.size) < 2 or (paired and first.size != second.size):
        raise ConfigError(
            f"There are {first.size} values before and {second.size} after. Allowed: at least two of each, and as "
            "many of the one as of the other if they are paired."
        )
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ConfigError("Some values are not finite. A mean needs finite values: remove or repair the others.")
    interval = stats.bootstrap(
        (second - first,) if paired else (second, first),
        np.mean if paired else _difference_of_means,
        n_resamples=resamples,
        batch=max(1, _NUMBERS_AT_ONCE // max(first.size, second.size)),
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(second.mean() - first.mean()), float(interval.low), float(interval.high)


def bootstrap_mean(values: Sequence[float] | np.ndarray) -> Interval:
    """Mean of values with a 95 % percentile bootstrap interval; of fewer than two the interval is unbounded.

    Args:
        values: `[N]`, finite.

    Example:
        >>> bootstrap_mean([1.0, 1.0, 1.0])
        (1.0, 1.0, 1.0)
    """
    given = np.asarray(values, dtype=np.float64)
    if given.size < 2:
        return float(given.mean()) if given.size else float("nan"), -float("inf"), float("inf")
    return bootstrap_mean_difference(np.zeros_like(given), given, resamples=2_000)


def share(successes: int, n: int) -> Interval:
    """A share with Wilson's 95 % interval; NaN of no trial.

    Example:
        >>> [round(value, 3) for value in share(5, 10)]
        [0.5, 0.237, 0.763]
    """
    return (successes / n if n else float("nan")), *wilson_interval(successes, n)


def _difference_of_means(after: np.ndarray, before: np.ndarray, axis: int) -> np.ndarray:
    return after.mean(axis=axis) - before.mean(axis=axis)
