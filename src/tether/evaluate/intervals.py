"""95 % intervals for what an evaluation reports: shares, and differences of means."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tether.errors import ConfigError

Z95 = 1.959963984540054
_NUMBERS_AT_ONCE = 4_000_000


def wilson_interval(successes: float, n: int) -> tuple[float, float]:
    r"""Wilson's 95 % interval of a share; right for small samples and for shares near 0 and 1 too.

    $(p + z^2/2n \pm z\sqrt{p(1-p)/n + z^2/4n^2}) / (1 + z^2/n)$ with $p$ = successes / n.

    Args:
        successes: how many of the trials; a tie may count one half.
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
    share = successes / n
    scale = 1 + Z95**2 / n
    center = (share + Z95**2 / (2 * n)) / scale
    half = Z95 * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n**2)) / scale
    return max(0.0, center - half), min(1.0, center + half)


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
        ConfigError: no values, values that are not finite, or pairs of different number.

    Example:
        >>> bootstrap_mean_difference([0.0, 1.0], [0.5, 1.5])
        (0.5, 0.5, 0.5)
    """
    first, second = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if min(first.size, second.size) == 0 or (paired and first.size != second.size):
        raise ConfigError(
            f"There are {first.size} values before and {second.size} after. Allowed: at least one of each, and as "
            "many of the one as of the other if they are paired."
        )
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ConfigError("Some values are not finite. A mean needs finite values: remove or repair the others.")
    random = np.random.default_rng(seed)
    if paired:
        means = _resampled_means(second - first, random, resamples)
    else:
        means = _resampled_means(second, random, resamples) - _resampled_means(first, random, resamples)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(second.mean() - first.mean()), float(low), float(high)


def _resampled_means(values: np.ndarray, random: np.random.Generator, resamples: int) -> np.ndarray:
    rows = max(1, _NUMBERS_AT_ONCE // values.size)
    return np.concatenate(
        [
            values[random.integers(values.size, size=(min(rows, resamples - start), values.size))].mean(axis=1)
            for start in range(0, resamples, rows)
        ]
    )
