"""How well a model prefers what is preferred: accuracy and margins of held-out pairs, whole and by groups of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tether.errors import DataError
from tether.evaluate.intervals import Interval, bootstrap_mean, share
from tether.evaluate.score_rows import ScoredRows
from tether.objectives.metrics import LENGTH_BUCKETS

LENGTH = "tokens of the longer completion"
# A column of more distinct numbers than this is cut at its quartiles; one of more distinct texts is refused.
_NUMBERS, _TEXTS = 8, 50


@dataclass(frozen=True)
class Preferred:
    """What a group of pairs shows. An interval is a value, its lower and its upper 95 % end.

    Args:
        pairs: in the group.
        ties: pairs with equal rewards, which count as wrong.
        accuracy: share of pairs whose chosen completion has the larger reward; Wilson's interval.
        margin: reward of the chosen less that of the rejected; bootstrap over pairs.
    """

    pairs: int
    ties: int
    accuracy: Interval
    margin: Interval


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation of pairs found.

    Args:
        policy: name of the model.
        reference: name of what it was compared with; None for none.
        rule: what the rewards are.
        rows: in the data; `overall.pairs` of them could be used.
        overall: of all pairs.
        chosen: mean reward of chosen completions; `rejected`: of the others.
        by: name of a column, to a group of its values, to what that group shows.
        kl: mean over tokens of KL(policy, reference), of chosen and rejected completions; None where there is none.
        no_kl: why.
        proved: whether the reference's weights have the hash that the run recorded; None: nothing to compare with.
        shorter: of the pairs of unequal lengths, the share whose shorter completion has the larger reward; None where
            there are none.
        trained_on: whether the policy's run was trained on just these rows.
    """

    policy: str
    reference: str | None
    rule: str
    rows: int
    overall: Preferred
    chosen: Interval
    rejected: Interval
    by: dict[str, dict[str, Preferred]]
    kl: dict[str, Interval] | None
    no_kl: str
    proved: bool | None
    shorter: float | None
    trained_on: bool

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON: what is not finite is null."""
        return plain(asdict(self))


def evaluate_pairs(scored: ScoredRows, policy: str, reference: str | None, columns: Sequence[str] = ()) -> Evaluation:
    """Accuracy, margins and KL of scored pairs.

    Args:
        scored: rows of two completions each.
        policy: name of the model, for the report.
        reference: the same of what it is compared with.
        columns: of the rows, by whose values pairs are grouped too.

    Raises:
        DataError: a column whose values make no groups.
    """
    margins = scored.margins
    chosen, rejected = scored.tokens[0::2], scored.tokens[1::2]
    longest, uneven = np.maximum(chosen, rejected), chosen != rejected
    grouped = {LENGTH: dict(_by_length(longest))}
    for column in columns:
        grouped[column] = dict(_by_value(column, scored))
    kl = None
    if scored.kl is not None:
        sides = {"chosen": slice(0, None, 2), "rejected": slice(1, None, 2)}
        kl = {name: bootstrap_mean(scored.kl[side]) for name, side in sides.items()}
    return Evaluation(
        policy=policy,
        reference=reference,
        rule=scored.rule,
        rows=len(scored.rows),
        overall=_preferred(margins),
        chosen=bootstrap_mean(scored.rewards[0::2]),
        rejected=bootstrap_mean(scored.rewards[1::2]),
        by={
            column: {name: _preferred(margins[inside]) for name, inside in groups.items() if inside.any()}
            for column, groups in grouped.items()
        },
        kl=kl,
        no_kl=scored.no_kl,
        proved=scored.proved,
        shorter=float(((margins > 0) == (chosen < rejected))[uneven].mean()) if uneven.any() else None,
        trained_on=scored.trained_on,
    )


def _preferred(margins: np.ndarray) -> Preferred:
    right, ties = int((margins > 0).sum()), int((margins == 0).sum())
    return Preferred(len(margins), ties, share(right, len(margins)), bootstrap_mean(margins))


def _by_length(longest: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    low = 0
    for high in (*LENGTH_BUCKETS, None):
        yield (f"above {low}", longest > low) if high is None else (f"{low + 1}-{high}", _between(longest, low, high))
        low = high or low


def _between(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Above `low`, at most `high`."""
    return (values > low) & (values <= high)


def _by_value(column: str, scored: ScoredRows) -> Iterator[tuple[str, np.ndarray]]:
    every = list(scored.rows[column])
    values = [every[row] for row in scored.source_rows.tolist()]
    distinct = {value if isinstance(value, (str, int, float, bool)) else str(value) for value in values}
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in distinct)
    if numbers and len(distinct) > _NUMBERS:
        yield from _by_quartile(np.array(values, dtype=np.float64))
        return
    if len(distinct) > _TEXTS:
        raise DataError(
            f"The column {column!r} has {len(distinct)} distinct values in {len(values)} rows, too many to group by "
            f"(at most {_TEXTS}). Choose one that tells kinds of rows apart."
        )
    shown = [value if isinstance(value, (str, int, float, bool)) else str(value) for value in values]
    for value in sorted(distinct, key=lambda value: (str(type(value)), value)):
        yield str(value), np.array([one == value for one in shown])


def _by_quartile(values: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    edges = np.unique(np.quantile(values, [0.25, 0.5, 0.75]))
    low = -math.inf
    for high in (*edges, math.inf):
        name = (
            f"up to {high:g}" if low == -math.inf else f"above {low:g}" if high == math.inf else f"{low:g} to {high:g}"
        )
        yield name, _between(values, low, high)
        low = high


def plain(value: Any) -> Any:
    """Values as JSON has them; numbers that are not finite become None.

    >>> plain({"a": (1.0, float("inf"))})
    {'a': [1.0, None]}
    """
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
