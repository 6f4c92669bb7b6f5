"""The papers' formulae, written a second time with `math` on plain numbers, one function per row of the table.

Nothing here is taken from the package: sigmoid and logarithms are spelled out, sums are loops, sorting is Python's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any


def s(x: float) -> float:
    """The logistic function."""
    return 1 / (1 + math.exp(-x))


def nll(x: float) -> float:
    return -math.log(s(x))


def smoothed(d: float, e: float) -> float:
    return (1 - e) * nll(d) + e * nll(-d)


def kl2(p: tuple[float, float], q: tuple[float, float]) -> float:
    """KL between two coins, each given with its complement."""
    return p[0] * math.log(p[0] / q[0]) + p[1] * math.log(p[1] / q[1])


def coin(x: float) -> tuple[float, float]:
    return s(x), s(-x)


def odds(mean_logp: float) -> float:
    p = math.exp(mean_logp)
    return p / (1 - p)


def rows(function: Callable[..., float]) -> Callable[..., list[float]]:
    """A formula of one pair as one of a batch."""

    def over(*columns: list[float], **options: float) -> list[float]:
        return [function(*numbers, **options) for numbers in zip(*columns, strict=True)]

    return over


def aot(chosen, rejected, reference_chosen, reference_rejected, beta, label_smoothing):
    policy = sorted(c - r for c, r in zip(chosen, rejected, strict=True))
    reference = sorted(c - r for c, r in zip(reference_chosen, reference_rejected, strict=True))
    return [smoothed(beta * (p - q), label_smoothing) for p, q in zip(policy, reference, strict=True)]


def aot_unpaired(chosen, rejected, beta, label_smoothing):
    return [smoothed(beta * (c - r), label_smoothing) for c, r in zip(sorted(chosen), sorted(rejected), strict=True)]


def plackett_luce(lists, beta):
    losses = []
    for scores in lists:
        likelihood = 1.0
        for k in range(len(scores)):
            likelihood *= math.exp(beta * scores[k]) / sum(math.exp(beta * other) for other in scores[k:])
        losses.append(-math.log(likelihood))
    return losses


FORMULAE: dict[str, Callable[..., Any]] = {
    "sigmoid": rows(lambda c, r, m, beta, label_smoothing: smoothed(beta * (c - r) - m, label_smoothing)),
    "sigmoid_norm": rows(lambda c, r, beta, label_smoothing: smoothed(beta * (c - r), label_smoothing)),
    "hinge": rows(lambda c, r, m, beta: max(0.0, 1 + m - beta * (c - r))),
    "ipo": rows(lambda c, r, beta: ((c - r) - 1 / (2 * beta)) ** 2),
    "exo_pair": rows(
        lambda c, r, beta, label_smoothing: kl2(coin(beta * (c - r)), (1 - label_smoothing, label_smoothing))
    ),
    "robust": rows(
        lambda c, r, beta, label_smoothing: (
            ((1 - label_smoothing) * nll(beta * (c - r)) - label_smoothing * nll(-beta * (c - r)))
            / (1 - 2 * label_smoothing)
        )
    ),
    "discopop": rows(
        lambda c, r, beta, discopop_tau: (
            (1 - s(beta * (c - r) / discopop_tau)) * nll(beta * (c - r))
            + s(beta * (c - r) / discopop_tau) * math.exp(-beta * (c - r))
        )
    ),
    "dpop": rows(lambda c, r, beta, dpop_lambda: nll(beta * (c - r - dpop_lambda * max(0.0, -c)))),
    "rpo": rows(lambda c, r, m, beta, rpo_eta: kl2(coin(rpo_eta * m), coin(beta * (c - r)))),
    "tdpo1": rows(lambda c, r, kl_c, kl_r, beta: nll(beta * (c - r) - (beta * kl_r - beta * kl_c))),
    "tdpo2": rows(
        lambda c, r, kl_c, kl_r, beta, tdpo_alpha: nll(beta * (c - r) - tdpo_alpha * (beta * kl_r - beta * kl_c))
    ),
    "aot": aot,
    "aot_unpaired": aot_unpaired,
    "nca_pair": rows(lambda c, r, beta: nll(beta * c) + nll(-beta * c) / 2 + nll(-beta * r) / 2),
    "bco_pair": rows(lambda c, r, beta: nll(beta * c) + nll(-beta * r)),
    "sppo_hard": rows(lambda c, r, beta: (c - 1 / (2 * beta)) ** 2 + (r + 1 / (2 * beta)) ** 2),
    "apo_zero": rows(lambda c, r, beta: 1 - s(beta * c) + s(beta * r)),
    "apo_down": rows(lambda c, r, beta: s(beta * c) + 1 - s(beta * (c - r))),
    "sft": rows(lambda token: -token),
    "simpo": rows(
        lambda c, r, beta, simpo_gamma, label_smoothing: smoothed(beta * (c - r) - simpo_gamma, label_smoothing)
    ),
    "cpo": rows(
        lambda c, r, mean, beta, label_smoothing, cpo_alpha: (
            smoothed(beta * (c - r), label_smoothing) - cpo_alpha * mean
        )
    ),
    "odds_ratio": rows(lambda c, r, beta: -beta * math.log(s(math.log(odds(c) / odds(r))))),
    "orpo": rows(lambda c, r, beta: -c - beta * math.log(s(math.log(odds(c) / odds(r))))),
    "plackett_luce": plackett_luce,
}

# What a pair gives whose two completions score alike, where policy and reference are the same.
AT_ZERO: dict[str, Callable[..., float]] = {
    "sigmoid": lambda beta, label_smoothing: math.log(2),
    "sigmoid_norm": lambda beta, label_smoothing: math.log(2),
    "hinge": lambda beta: 1.0,
    "ipo": lambda beta: 1 / (4 * beta**2),
    "exo_pair": lambda beta, label_smoothing: -math.log(2) - math.log(label_smoothing * (1 - label_smoothing)) / 2,
    "robust": lambda beta, label_smoothing: math.log(2),
    "discopop": lambda beta, discopop_tau: (math.log(2) + 1) / 2,
    "dpop": lambda beta, dpop_lambda: math.log(2),
    "tdpo1": lambda beta: math.log(2),
    "tdpo2": lambda beta, tdpo_alpha: math.log(2),
    "aot": lambda beta, label_smoothing: math.log(2),
    "aot_unpaired": lambda beta, label_smoothing: math.log(2),
    "nca_pair": lambda beta: 2 * math.log(2),
    "bco_pair": lambda beta: 2 * math.log(2),
    "sppo_hard": lambda beta: 1 / (2 * beta**2),
    "apo_zero": lambda beta: 1.0,
    "apo_down": lambda beta: 1.0,
    "plackett_luce": lambda beta: math.log(6),
}

# Losses of a difference of rewards: with chosen and rejected exchanged, what they say of label smoothing must hold.
FLIPPED: dict[str, Callable[[float, float, float], float]] = {
    name: lambda kept, flipped, e: (1 - e) * kept + e * flipped
    for name in ("sigmoid", "sigmoid_norm", "aot", "aot_unpaired", "simpo")
} | {"robust": lambda kept, flipped, e: ((1 - e) * kept - e * flipped) / (1 - 2 * e)}
