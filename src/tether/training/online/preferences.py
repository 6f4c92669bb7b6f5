"""Sampled completions and their rewards as rows that `tether train` reads: lists, pairs, labelled completions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tether.objectives.online.advantages import weighted_sum
from tether.training.online.experience import Experience, Sample
from tether.training.source.rollouts import RolloutSource

Form = Literal["ranked", "pairs", "unpaired"]
FORMS: tuple[Form, ...] = ("ranked", "pairs", "unpaired")
# Columns of a prompt's row that go on to what is trained on.
_KEPT = ("tools", "chat_template_kwargs")
# Prompts that are sampled before their rows are written. Fixed, as completions are functions of seed, chunk and row.
_CHUNK = 16


@dataclass(frozen=True)
class Answered:
    """A prompt with its completions that may be taken, and their rewards.

    Args:
        row: of the prompt, as it came.
        completions: text or messages.
        rewards: one for each.
    """

    row: dict[str, Any]
    completions: tuple[Any, ...]
    rewards: tuple[float, ...]


@dataclass(frozen=True)
class Making:
    """How rows are made of completions.

    Args:
        form: of the rows.
        margin: pairs whose rewards differ by no more than this are left out.
        threshold: of labelled completions: above it desirable, below it not; None: the mean of the prompt's others.
        truncated: completions that were cut off may be taken; training would end them where they were cut.
    """

    form: Form = "pairs"
    margin: float = 0.0
    threshold: float | None = None
    truncated: bool = False


def sampled_rows(source: RolloutSource, experience: Experience, making: Making) -> Iterator[tuple[list[Any], Counter]]:
    """Rows of each chunk of prompts, in the order of the data, and what was counted on the way.

    Args:
        source: of prompts.
        experience: samples and judges.
        making: of rows.
    """
    for wanted in source.in_order(_CHUNK):
        sample = experience.sample(wanted)
        total = weighted_sum(sample.table.values, experience.plan.weights)
        counts: Counter = Counter(prompts=len(sample.groups), completions=len(total))
        rows = []
        for one in answered(sample, total.tolist(), making, counts):
            found = rows_of(one, making)
            counts["without a preference"] += not found
            rows += found
        counts["rows"] = len(rows)
        yield rows, counts


def answered(sample: Sample, total: Sequence[float], making: Making, counts: Counter) -> Iterator[Answered]:
    """Each prompt with those of its completions that may be taken; equal ones once.

    Args:
        sample: with K completions.
        total: K rewards, NaN where none applies.
        making: of rows.
        counts: what is left out is counted here.
    """
    at = 0
    for group in sample.groups:
        taken: dict[str, tuple[Any, float]] = {}
        for one in group.completions:
            said, reward = sample.judged.completions[at], total[at]
            at += 1
            if one.finish == "length" and not making.truncated:
                counts["cut off"] += 1
            elif reward != reward:
                counts["without a reward"] += 1
            elif not _text(said).strip():
                counts["empty"] += 1
            elif repr(said) in taken:
                counts["equal to another"] += 1
            else:
                taken[repr(said)] = said, reward
        yield Answered(
            dict(group.request.row),
            tuple(said for said, _ in taken.values()),
            tuple(reward for _, reward in taken.values()),
        )


def _text(said: Any) -> str:
    return said if isinstance(said, str) else "".join(str(one.get("content") or "") for one in said)


def rows_of(one: Answered, making: Making) -> list[dict[str, Any]]:
    """Rows of one prompt; none where its completions have no preference.

    >>> one = Answered({"prompt": "Q"}, ("a", "b", "c"), (0.0, 2.0, 1.0))
    >>> rows_of(one, Making("pairs"))
    [{'prompt': 'Q', 'chosen': 'b', 'rejected': 'a', 'score_chosen': 2.0, 'score_rejected': 0.0}]
    >>> [row["completions"] for row in rows_of(one, Making("ranked"))]
    [['b', 'c', 'a']]
    >>> [(row["completion"], row["label"]) for row in rows_of(one, Making("unpaired"))]
    [('a', False), ('b', True)]
    """
    make: dict[str, Callable[[Answered, Making], list[dict[str, Any]]]]
    make = {"ranked": _ranked, "pairs": _pair, "unpaired": _unpaired}
    prompt = {name: one.row[name] for name in ("prompt", *_KEPT) if one.row.get(name) is not None}
    return [{**prompt, **row} for row in make[making.form](one, making)]


def _ordered(one: Answered) -> list[tuple[Any, float]]:
    """The best first; of completions with one reward the first, as a list has no ties."""
    found: dict[float, Any] = {}
    for said, reward in zip(one.completions, one.rewards, strict=True):
        found.setdefault(reward, said)
    return [(found[reward], reward) for reward in sorted(found, reverse=True)]


def _ranked(one: Answered, making: Making) -> list[dict[str, Any]]:
    ordered = _ordered(one)
    if len(ordered) < 2:
        return []
    return [{"completions": [said for said, _ in ordered], "scores": [reward for _, reward in ordered]}]


def _pair(one: Answered, making: Making) -> list[dict[str, Any]]:
    ordered = _ordered(one)
    if len(ordered) < 2 or ordered[0][1] - ordered[-1][1] <= making.margin:
        return []
    (chosen, high), (rejected, low) = ordered[0], ordered[-1]
    return [{"chosen": chosen, "rejected": rejected, "score_chosen": high, "score_rejected": low}]


def _unpaired(one: Answered, making: Making) -> list[dict[str, Any]]:
    rows = []
    for said, reward in zip(one.completions, one.rewards, strict=True):
        others = (sum(one.rewards) - reward) / max(1, len(one.rewards) - 1)
        against = others if making.threshold is None else making.threshold
        if reward != against and (making.threshold is not None or len(one.rewards) > 1):
            rows.append({"completion": said, "label": reward > against, "score": reward})
    return rows
