"""The verdict cards at the top of the page: a number, its interval, and what may be concluded from it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from tether.report.charts import interval_strip
from tether.report.numbers import as_number, number, signed
from tether.report.read import Run


@dataclass(frozen=True)
class Card:
    """A result, told apart from chance or not.

    Args:
        title: what it is.
        figure: the number.
        before: the number before training, where there is one.
        strip: the interval on a scale.
        notes: lines under it.
        verdict: what may be concluded, and `good`, `bad` or `open`.
    """

    title: str
    figure: str
    before: str | None = None
    strip: Markup | None = None
    notes: list[str] = field(default_factory=list)
    verdict: tuple[str, str] | None = None


def verdict_cards(run: Run) -> list[Card]:
    """One card for each result of `evaluation.json`, and one for the reference.

    Args:
        run: what was read.

    Returns:
        The cards; without `evaluation.json`, the accuracy of the last evaluation stands in, without an interval.
    """
    cards = []
    for name, result in run.evaluation.items():
        if isinstance(result, dict) and "before_mean" in result:
            cards.append(_change_card(name, result))
        elif isinstance(result, dict) and "value" in result:
            cards.append(_value_card(run, name, result))
    accuracy = run.last("eval_rewards/accuracies")
    if "reward_accuracy" not in run.evaluation and math.isfinite(accuracy):
        cards.insert(0, Card("Reward accuracy", number(accuracy, 3), notes=["last evaluation during training"]))
    guard = _guard_card(run.reference)
    return [*cards, guard] if guard is not None else cards


def title_of(name: str) -> str:
    """A key of a JSON file as a heading.

    >>> title_of("reward_accuracy")
    'Reward accuracy'
    """
    words = str(name).replace("_", " ").strip()
    return words[:1].upper() + words[1:]


def _interval(result: dict[str, Any], decimals: int, write: Any = number) -> str:
    low, high = as_number(result.get("low")), as_number(result.get("high"))
    if math.isnan(low) or math.isnan(high):
        return "no interval"
    return f"95 % interval {write(low, decimals)} to {write(high, decimals)}"


def _count(result: dict[str, Any], of: str) -> str:
    return f"{number(result['n'])} {of}" if "n" in result else ""


# Nats a chosen completion may lose whatever its length (longer ones: half of what they began with); measured as said in
# training/health/rules.py.
_LOST_NATS = 20.0
# Steps below which a figure says little of what was learnt: after 10, the demo's margin is a fifth of its last one.
_FEW_STEPS = 10
# Rows below which it is said that they are few: from 29 on, an accuracy that is three quarters in truth is told from
# chance in at least four sets of five. By chance one is in at most 4 % of sets, whatever their size.
_FEW_ROWS = 30
# Share of held-out rows above which it is said that they were trained on: an accuracy is then too good by as much.
_SHARED = 0.05


def doubts_about(run: Run) -> list[tuple[str, str]]:
    """What else is known of a run that speaks against a good verdict, each with `bad` or `open`.

    An accuracy counts pairs alone: it is 1 as well where both completions became impossible, the rejected one more so.

    Args:
        run: what was read.
    """
    found: list[tuple[str, str]] = []
    start, hit, before = run.first("logps/chosen"), run.last("mean_token_accuracy"), run.first("mean_token_accuracy")
    ends = [run.last(key) for key in ("eval_logps/chosen", "logps/chosen")]
    lost = start - next((end for end in ends if math.isfinite(end)), math.nan)
    if hit < before / 4 or hit == 0.0:
        found.append((f"the model no longer predicts the tokens of the data (accuracy {number(hit, 3)})", "bad"))
    if lost > max(_LOST_NATS, abs(start) / 2):
        found.append((f"chosen completions became {number(lost, 0)} nats less likely", "bad"))
    margin = run.evaluation.get("reward_margin")
    least = as_number(margin.get("low")) if isinstance(margin, dict) else run.last("eval_rewards/margins")
    if least <= 0:
        found.append(("the mean margin is not told apart from zero", "open"))
    if run.steps < _FEW_STEPS:
        found.append((f"{number(run.steps)} steps are too few to have learnt much", "open"))
    result = run.evaluation.get("reward_accuracy")
    rows = as_number(result.get("n")) if isinstance(result, dict) else math.nan
    if rows < _FEW_ROWS:
        found.append((f"{number(rows)} rows are too few to tell", "open"))
    return [*found, *_known_before(run)]


def _known_before(run: Run) -> Iterator[tuple[str, str]]:
    """Why a result is none of training, or none of rows that were held out."""
    for part in (part for name, part in run.data.items() if name.startswith("eval") and isinstance(part, dict)):
        overlap, kept = part.get("overlap"), as_number(part.get("kept"))
        shared = min(as_number(overlap.get("rows")), kept) if isinstance(overlap, dict) else math.nan
        if shared > _SHARED * kept:
            yield f"{number(shared)} of its {number(kept)} rows were trained on", "open"
    identity = run.reference.get("identity")
    if isinstance(identity, dict) and identity.get("meaning") == "none":  # else it begins with equal rewards
        result = run.evaluation.get("reward_accuracy")
        value = as_number(result.get("value")) if isinstance(result, dict) else run.last("eval_rewards/accuracies")
        first = run.first("rewards/accuracies")
        if first >= value:
            yield f"it was {number(first, 3)} in the first log already", "open"


def _value_card(run: Run, name: str, result: dict[str, Any]) -> Card:
    value, low, high = (as_number(result.get(key)) for key in ("value", "low", "high"))
    notes = [_interval(result, 3), _count(result, "held-out pairs" if name.startswith("reward_") else "rows")]
    strip = verdict = None
    if "accuracy" in name or "win_rate" in name:
        strip = interval_strip(value, low, high, 0.5, (0.0, 1.0))
        verdict = _verdict(low, high, 0.5, ("Above chance", "Below chance", "Not told apart from chance"))
    elif name.startswith("reward_margin") and math.isfinite(low) and math.isfinite(high):
        reach = 1.15 * max(abs(low), abs(high)) or 1.0
        strip = interval_strip(value, low, high, 0.0, (-reach, reach))
        verdict = _verdict(low, high, 0.0, ("Above zero", "Below zero", "Not told apart from zero"))
    doubts = doubts_about(run)
    if doubts and verdict is not None and verdict[1] == "good":
        verdict = (f"{verdict[0]}, but {'; '.join(doubt for doubt, _ in doubts)}", min(kind for _, kind in doubts))
    return Card(title_of(name), number(value, 3), None, strip, notes, verdict)


def _change_card(name: str, result: dict[str, Any]) -> Card:
    low, high = as_number(result.get("low")), as_number(result.get("high"))
    before, after = number(result.get("before_mean"), 2), number(result.get("after_mean"), 2)
    difference = as_number(result.get("difference"))
    change = f"change {signed(difference, 2)}"
    judge = f"judged by {result['judge']}" if result.get("judge") else ""
    who = ", ".join(part for part in (_count(result, "held-out prompts"), judge) if part)
    strip = None
    if math.isfinite(low) and math.isfinite(high):
        reach = 1.15 * max(abs(low), abs(high)) or 1.0
        strip = interval_strip(difference, low, high, 0.0, (-reach, reach))
    verdict = _verdict(
        low, high, 0.0, ("Rose: the interval excludes zero", "Fell: the interval excludes zero", "No clear change")
    )
    notes = [change, _interval(result, 2, signed), who]
    return Card(f"{title_of(name)}, before and after", after, before, strip, notes, verdict)


def _verdict(low: float, high: float, mark: float, words: tuple[str, str, str]) -> tuple[str, str] | None:
    if math.isnan(low) or math.isnan(high):
        return None
    if low > mark:
        return words[0], "good"
    return (words[1], "bad") if high < mark else (words[2], "open")


def _guard_card(reference: dict[str, Any]) -> Card | None:
    if not reference:
        return None
    guard = reference.get("guard")
    identity = reference.get("identity")
    meaning = identity.get("meaning") if isinstance(identity, dict) else None
    if meaning == "none":
        return Card("Reference", "None", notes=["this objective is trained without a reference"])
    if not isinstance(guard, dict):
        unmatched = "the policy does not start there, so the two were not compared"
        note = "no comparison at the start is on record" if meaning == "start" else unmatched
        return Card("Reference", title_of(str(meaning or "declared")), notes=[note])
    notes = [
        f"before the first update, a token differed by at most {number(guard.get('max_difference'))} nats",
        f"{number(guard.get('rows'))} rows compared, {number(guard.get('tolerance'))} nats allowed",
    ]
    verdict = ("Started at its reference", "good") if guard.get("passed") else ("Not the same", "bad")
    return Card("Reference guard", "Passed" if guard.get("passed") else "Failed", notes=notes, verdict=verdict)
