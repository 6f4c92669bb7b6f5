"""Histograms of one or several sets of values, and intervals and lengths on a scale."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from markupsafe import Markup

from tether.report.charts.scales import BOTTOM, CANVAS, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Scale, axes, fits
from tether.report.numbers import as_number, number
from tether.report.render import fragment


@dataclass(frozen=True)
class Values:
    """One set of values of a histogram; `style` is its colour."""

    label: str
    values: Sequence[Any]
    style: str = "train"


def histogram(
    title: str, sets: Sequence[Values], *, bins: int = 40, unit: str = "", mark: float | None = None
) -> Markup | None:
    """Draw how often values fall into bins of equal width.

    What lies beyond the 1st or 99th percentile of all is in the outermost bins.

    Args:
        title: above the chart.
        sets: of numbers, told apart by colour; those that are not finite are left out.
        bins: how many.
        unit: of the values.
        mark: a value to mark from top to bottom.

    Returns:
        A `figure`; None when there is no value.
    """
    shown = [(one, sorted(value for value in map(as_number, one.values) if fits(value))) for one in sets]
    shown = [(one, values) for one, values in shown if values]
    if not shown:
        return None
    every = sorted(value for _, values in shown for value in values)
    low, high = every[round(0.01 * (len(every) - 1))], every[round(0.99 * (len(every) - 1))]
    low, high = (low, high) if high > low else (low - 0.5, low + 0.5)
    counts = [_counted(values, low, high, bins) for _, values in shown]
    x_scale, y_scale = (
        Scale(low, high, LEFT, WIDTH - RIGHT),
        Scale(0, max(map(max, counts)) * 1.06, HEIGHT - BOTTOM, TOP),
    )
    edges = [low + place * (high - low) / bins for place in range(bins + 1)]
    return fragment(
        "chart.html",
        title=title,
        description=f"{title}: " + "; ".join(_described(one, values) for one, values in shown),
        canvas=CANVAS,
        axes=axes(x_scale, y_scale, unit, whole=False),
        baseline=None,
        groups=(),
        bars=_bars(shown, counts, x_scale, y_scale, edges, mark),
        legend=[one for one, _ in shown] if len(shown) > 1 else [],
        pointer=json.dumps(_pointer(shown, counts, x_scale, y_scale, edges), separators=(",", ":"), ensure_ascii=False),
        note="",
    )


def interval_strip(value: float, low: float, high: float, mark: float, limits: tuple[float, float]) -> Markup | None:
    """Draw an interval on a scale beside the value it must be told apart from.

    Args:
        value: the estimate.
        low: lower end of its interval.
        high: upper end.
        mark: the value of no effect, such as 0 or chance.
        limits: ends of the scale.

    Returns:
        An `svg`; None when a number is not finite.
    """
    if not all(math.isfinite(item) for item in (value, low, high, mark, *limits)) or limits[0] >= limits[1]:
        return None
    scale = Scale(*limits, 4, 236)

    def at(item: float) -> float:
        return scale(min(max(item, limits[0]), limits[1]))

    said = f"{number(value, 3)}, interval {number(low, 3)} to {number(high, 3)}, against {number(mark)}"
    return fragment("strip.html", said=said, mark=at(mark), low=at(low), high=at(high), value=at(value))


def length_strip(quantiles: Mapping[str, Any], longest: float) -> Markup | None:
    """Draw how long texts are: a line from the shortest to the longest, thick up to nine in ten, a dot at the median.

    Args:
        quantiles: `min`, `p50`, `p90` and `max`, in tokens.
        longest: end of the scale.

    Returns:
        An `svg`; None when one is missing.
    """
    found = [as_number(quantiles.get(name)) for name in ("min", "p50", "p90", "max")]
    if not all(map(fits, found)) or longest <= 0:
        return None
    scale = Scale(0.0, longest, 4, 236)
    said = f"median {number(found[1])}, nine in ten up to {number(found[2])}, longest {number(found[3])}"
    at = [scale(min(max(value, 0.0), longest)) for value in found]
    return fragment("lengths.html", said=said, low=at[0], median=at[1], most=at[2], high=at[3])


def _counted(values: Sequence[float], low: float, high: float, bins: int) -> list[int]:
    counts = [0] * bins
    for value in values:
        counts[min(max(int((value - low) / (high - low) * bins), 0), bins - 1)] += 1
    return counts


def _bars(
    shown: list[Any], counts: list[list[int]], x_scale: Scale, y_scale: Scale, edges: list[float], mark: float | None
) -> dict[str, Any]:
    """Bars of each set, `(x, y, width, height)`, and where the mark is."""
    bottom, width = y_scale(0), x_scale(edges[1]) - x_scale(edges[0])
    groups = [
        (
            one.style,
            [
                (x_scale(edges[place]), y_scale(count), round(width - 0.6, 2), round(bottom - y_scale(count), 2))
                for place, count in enumerate(row)
                if count
            ],
        )
        for (one, _), row in zip(shown, counts, strict=True)
    ]
    inside = mark is not None and x_scale.low <= mark <= x_scale.high
    return {"groups": groups, "mark": x_scale(mark) if inside and mark is not None else None}


def _pointer(
    shown: list[Any], counts: list[list[int]], x_scale: Scale, y_scale: Scale, edges: list[float]
) -> dict[str, Any]:
    middles = [(first + second) / 2 for first, second in pairwise(edges)]
    names = [f"{number(first)} to {number(second)}" for first, second in pairwise(edges)]
    lines = [
        {"n": one.label, "y": [y_scale(count) for count in row], "t": [number(count) for count in row]}
        for (one, _), row in zip(shown, counts, strict=True)
    ]
    return {"x": [x_scale(middle) for middle in middles], "l": names, "s": lines}


def _described(one: Values, values: Sequence[float]) -> str:
    middle, name = values[len(values) // 2], f"{one.label}: " if one.label else ""
    return f"{name}{len(values)} values, median {number(middle)}, largest {number(values[-1])}"
