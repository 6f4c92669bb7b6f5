"""Held-out pairs on the page: margins before and after, and the tokens of some pairs, by the policy's log-ratio."""

from __future__ import annotations

import math
from typing import Any

from markupsafe import Markup

from tether.report.charts import Values, histogram
from tether.report.numbers import as_number, number, signed
from tether.report.read import Run
from tether.report.texts import Limits

# Nats of a token from which its colour is one step stronger.
_SHADES = (0.05, 0.2, 0.5, 1.0, 2.0)


def pairs_section(run: Run, limits: Limits) -> dict[str, Any] | None:
    """What `pairs.json` says, in words, histograms and tokens.

    Args:
        run: what was read.
        limits: how much may be shown.

    Returns:
        The section; None where there is no such file, or no pair in it.
    """
    found = run.pairs
    after, before = (_numbers(found.get(name)) for name in ("policy", "reference"))
    if not after:
        return None
    start = found.get("meaning") == "start"
    shown = found.get("shown")
    rows = [row for row in shown if isinstance(row, dict)] if isinstance(shown, list) else []
    return {
        "words": _words(found, before, after, start=start),
        "charts": _charts(found, before, after, start=start),
        "legend": _legend(),
        "shown": [_pair(row, limits) for row in rows[: limits.pairs]],
    }


def token_style(ratio: float) -> str:
    """The class of a token's colour: `u1` to `u5` where the policy finds it likelier than the reference, `d1` to `d5`.

    >>> token_style(0.3), token_style(-5.0), token_style(0.0), token_style(float("nan"))
    ('u2', 'd5', '', 'n')
    """
    if math.isnan(ratio):
        return "n"
    strength = sum(abs(ratio) >= shade for shade in _SHADES)
    return f"{'u' if ratio > 0 else 'd'}{strength}" if strength else ""


def _words(found: dict[str, Any], before: list[float], after: list[float], *, start: bool) -> list[str]:
    of = as_number(found.get("of"))
    scored = (
        f"{number(len(after))} of {number(of)} held-out pairs" if of > len(after) else f"{number(len(after))} pairs"
    )
    name = found.get("set")
    lines = [f"Of {scored}{f' of {name}' if name else ''}, scored once more after training."]
    right = sum(margin > 0 for margin in after)
    if not before or len(before) != len(after):
        return [*lines, f"The policy finds the chosen completion likelier in {right}."]
    was, then = "Before training" if start else "Under the reference", sum(margin > 0 for margin in before)
    changes = [late - early for early, late in zip(before, after, strict=True)]
    grew = sum(change > 0 for change in changes)
    middle = sorted(changes)[len(changes) // 2]
    return [
        *lines,
        f"{was} the chosen completion was the likelier one in {then}, now it is in {right}. Its lead over the rejected "
        f"one grew in {grew} and shrank in {sum(change < 0 for change in changes)}, by a median of "
        f"{signed(middle, 2)} nats.",
    ]


def _charts(found: dict[str, Any], before: list[float], after: list[float], *, start: bool) -> list[Markup]:
    sets = [Values("before training" if start else "reference", before, "eval")] if before else []
    titles = "Chosen less rejected, log-probability"
    charts = [histogram(titles, [*sets, Values("after training", after, "train")], unit="nats", mark=0.0)]
    if before and len(before) == len(after):
        beta = as_number(found.get("beta"))
        factor, unit = (beta, "reward") if math.isfinite(beta) else (1.0, "nats")
        rewards = [factor * (late - early) for early, late in zip(before, after, strict=True)]
        title = "Reward margin after training" if unit == "reward" else "Change of the margin"
        charts.append(histogram(title, [Values("", rewards)], unit=unit, mark=0.0))
    return [chart for chart in charts if chart is not None]


def _legend() -> str:
    return (
        "Green: the policy finds the token likelier than the reference does; red: less likely. The strongest colour is "
        f"{number(_SHADES[-1])} nats or more, a factor of {math.exp(_SHADES[-1]):.1f}. Grey tokens are not scored."
    )


def _pair(row: dict[str, Any], limits: Limits) -> dict[str, Any]:
    margin, early = as_number(row.get("margin")), as_number(row.get("reference_margin"))
    note = f"Chosen less rejected: {signed(margin, 2)} nats"
    note += f", by the reference {signed(early, 2)}" if math.isfinite(early) else ""
    why = str(row.get("why", ""))
    return {
        "why": why[:1].upper() + why[1:],
        "row": number(row.get("row")),
        "note": note,
        "prompt": limits.text(str(row.get("prompt", "")).strip()),
        **{side: _side(row.get(side), limits) for side in ("chosen", "rejected")},
    }


def _side(side: Any, limits: Limits) -> dict[str, Any]:
    side = side if isinstance(side, dict) else {}
    given = side.get("tokens")
    tokens = (
        [token for token in given if isinstance(token, list) and len(token) == 2] if isinstance(given, list) else []
    )
    now, early = as_number(side.get("logp")), as_number(side.get("reference_logp"))
    note = f"{number(now, 1)} nats, {signed(now - early, 1)} against the reference" if math.isfinite(early) else ""
    known = math.isfinite(early)
    return {
        "note": note,
        "tokens": [_token(str(text), as_number(ratio), known) for text, ratio in tokens[: limits.tokens]],
        "left_out": max(len(tokens) - limits.tokens, 0)
        + (side["left_out"] if isinstance(side.get("left_out"), int) else 0),
    }


def _token(text: str, ratio: float, known: bool) -> tuple[str, str, str]:
    return text, token_style(ratio) if known else "", f"{signed(ratio, 2)} nats" if math.isfinite(ratio) else ""


def _numbers(values: Any) -> list[float]:
    return [as_number(value) for value in values] if isinstance(values, list) else []
