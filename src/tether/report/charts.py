"""Charts as inline SVG: lines over steps, and an interval on a scale. No script; colours come from the page's style."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tether.report.html import Html, join, tag
from tether.report.numbers import MINUS, number

Style = Literal["train", "eval", "chosen", "rejected"]

WIDTH, HEIGHT = 480, 232
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 10, 36
_HOVER_POINTS = 150
_DRAWN_POINTS = 600
_SMOOTHED_FROM = 24
_LARGEST = 1e30
# A y axis spans at least this share of its values, or its labels would be long and its line mostly rounding.
_NARROWEST = 1e-3


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Args:
        label: for the legend.
        steps: the x values.
        values: the y values, as many; those that are not finite break the line and are counted under the chart.
        style: which colour it has.
        marked: draw it dashed with a dot at each value, as evaluations are.
        smoothed: draw a bold running mean over the values when they are many and not marked.
    """

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    style: Style
    marked: bool = False
    smoothed: bool = True

    def drawable(self) -> list[tuple[float, float]]:
        """Its points that have a place on the chart."""
        return [(x, y) for x, y in zip(self.steps, self.values, strict=True) if _fits(y)]

    def segments(self) -> list[list[tuple[float, float]]]:
        """Its points, split where a value is not finite."""
        runs: list[list[tuple[float, float]]] = [[]]
        for x, y in zip(self.steps, self.values, strict=True):
            if _fits(y):
                runs[-1].append((x, y))
            elif runs[-1]:
                runs.append([])
        return [run for run in runs if run]


@dataclass(frozen=True)
class Scale:
    """Where a value of the data lies on the canvas."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 2)


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    baseline: tuple[float, str] | None = None,
    bounds: tuple[float, float] | None = None,
) -> Html | None:
    """Draw series over steps, with axes, ticks, a legend and a description for screen readers.

    Args:
        title: above the chart.
        series: the lines; those without a single finite value are left out.
        baseline: a value to mark across the chart, and what to call it.
        bounds: the y axis, where the quantity has natural limits; None to fit it to the data.

    Returns:
        A `figure`; None when nothing can be drawn.
    """
    shown = [line for line in series if line.drawable()]
    if not shown:
        return None
    points = [point for line in shown for point in line.drawable()]
    ys = [y for _, y in points] + ([baseline[0]] if baseline else [])
    x_scale = Scale(*_padded(min(x for x, _ in points), max(x for x, _ in points), 0.0), LEFT, WIDTH - RIGHT)
    y_scale = Scale(*(bounds or _padded(min(ys), max(ys), 0.06, _NARROWEST)), HEIGHT - BOTTOM, TOP)
    svg = tag(
        "svg",
        tag("title", _description(title, shown)),
        _axes(x_scale, y_scale),
        _baseline(baseline, y_scale) if baseline else None,
        (_line(line, x_scale, y_scale) for line in shown),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
    )
    return tag("figure", tag("figcaption", tag("b", title), _legend(shown)), svg, _footnote(shown))


def histogram(title: str, values: Sequence[float], *, bins: int = 40) -> Html | None:
    """Draw how often values fall into bins of equal width; what lies above the 99th percentile is in the last bin.

    Args:
        title: above the chart.
        values: any numbers, of which those that are not finite are left out.
        bins: how many.

    Returns:
        A `figure`; None when there is no value.
    """
    finite = sorted(value for value in values if _fits(value))
    if not finite:
        return None
    low, high = finite[0], max(finite[round(0.99 * (len(finite) - 1))], finite[0] + 1)
    counts = [0] * bins
    for value in finite:
        counts[min(int((value - low) / (high - low) * bins), bins - 1)] += 1
    x_scale, y_scale = Scale(low, high, LEFT, WIDTH - RIGHT), Scale(0, max(counts) * 1.06, HEIGHT - BOTTOM, TOP)
    width = (WIDTH - RIGHT - LEFT) / bins
    bars = [
        tag(
            "rect",
            x=round(LEFT + place * width, 2),
            y=y_scale(count),
            width=round(width - 0.6, 2),
            height=round(HEIGHT - BOTTOM - y_scale(count), 2),
            class_="dot",
        )
        for place, count in enumerate(counts)
        if count
    ]
    described = (
        f"{title}: {len(finite)} values, median {number(finite[len(finite) // 2])}, largest {number(finite[-1])}"
    )
    svg = tag(
        "svg",
        tag("title", described),
        _axes(x_scale, y_scale),
        tag("g", bars, class_="train"),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
    )
    return tag("figure", tag("figcaption", tag("b", title)), svg)


def interval_strip(value: float, low: float, high: float, mark: float, limits: tuple[float, float]) -> Html | None:
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

    return tag(
        "svg",
        tag("title", f"{number(value, 3)}, interval {number(low, 3)} to {number(high, 3)}, against {number(mark)}"),
        tag("line", x1=4, x2=236, y1=12, y2=12, class_="rail"),
        tag("line", x1=at(mark), x2=at(mark), y1=3, y2=21, class_="mark"),
        tag("line", x1=at(low), x2=at(high), y1=12, y2=12, class_="interval"),
        tag("circle", cx=at(value), cy=12, r=4.5, class_="estimate"),
        viewBox="0 0 240 24",
        role="img",
        class_="strip",
    )


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round values that divide a range.

    Args:
        low: start of the range.
        high: its end, above `low`.
        count: about how many.

    Returns:
        Values inside the range, rising.

    >>> ticks(0, 200), [round(tick, 2) for tick in ticks(0.31, 0.72)]
    ([0.0, 50.0, 100.0, 150.0, 200.0], [0.4, 0.5, 0.6, 0.7])
    """
    rough = (high - low) / count
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10, 20) if factor * magnitude >= rough * 0.8)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, min(last, first + 2 * count) + 1)]


def _fits(value: float) -> bool:
    # Beyond this, the span of an axis could overflow.
    return math.isfinite(value) and abs(value) < _LARGEST


def _padded(low: float, high: float, share: float, least: float = 0.0) -> tuple[float, float]:
    """A range with `share` of itself on both sides, at least `least` of its values wide; a point gets some room."""
    size = max(abs(low), abs(high))
    if high - low < 1e-30 or high - low < 1e-12 * size:
        margin = size * 0.1 if size > 1e-30 else 1.0
    else:
        margin = max(share * (high - low), (least * size - (high - low)) / 2)
    return low - margin, high + margin


def _tick_label(value: float, step: float) -> str:
    if abs(value) < step / 2:
        return "0"
    # Digits that tell neighbouring ticks apart; a step of 2.5 needs one more than its magnitude.
    digits = max(1, math.floor(math.log10(abs(value) / step) + 1e-9) + 2)
    if abs(value) >= 1e6 or step < 1e-4:
        mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
        return f"{float(mantissa):.{digits}g}e{int(exponent)}".replace("-", MINUS)
    if abs(value) >= 1e4:
        return f"{value / 1000:.{digits}g}k".replace("-", MINUS)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    decimals += abs(round(step, decimals) - step) > step * 1e-6
    return f"{value:.{decimals}f}".replace("-", MINUS)


def _axes(x_scale: Scale, y_scale: Scale) -> Html:
    parts = []
    y_ticks = ticks(y_scale.low, y_scale.high)
    for value in y_ticks:
        y = y_scale(value)
        label = _tick_label(value, y_ticks[1] - y_ticks[0] if len(y_ticks) > 1 else abs(value) or 1.0)
        parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid"))
        parts.append(tag("text", label, x=LEFT - 8, y=y + 4, text_anchor="end"))
    # Steps are whole numbers: a tick at step 2.5 would name a step that does not exist.
    x_ticks = [value for value in ticks(x_scale.low, x_scale.high) if value == round(value) and value >= 0]
    for value in x_ticks:
        x = x_scale(value)
        parts.append(tag("line", x1=x, x2=x, y1=HEIGHT - BOTTOM, y2=HEIGHT - BOTTOM + 4, class_="axis"))
        parts.append(tag("text", number(value), x=x, y=HEIGHT - BOTTOM + 17, text_anchor="middle"))
    bottom = HEIGHT - BOTTOM
    parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=bottom, y2=bottom, class_="axis"))
    parts.append(tag("text", "step", x=WIDTH - RIGHT, y=HEIGHT - 5, text_anchor="end", class_="unit"))
    return join(parts)


def _baseline(baseline: tuple[float, str], y_scale: Scale) -> Html | None:
    value, label = baseline
    if not y_scale.low <= value <= y_scale.high:
        return None
    y = y_scale(value)
    # Above the line, or below it where the line is at the top of the chart.
    text_y = y - 5 if y > TOP + 16 else y + 14
    return join(
        tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="baseline"),
        tag("text", label, x=WIDTH - RIGHT - 2, y=text_y, text_anchor="end", class_="unit"),
    )


def _line(series: Series, x_scale: Scale, y_scale: Scale) -> Html:
    def path(points: list[tuple[float, float]], kind: str) -> Html:
        if len(points) == 1:
            return tag("circle", cx=x_scale(points[0][0]), cy=y_scale(points[0][1]), r=2.5, class_="dot")
        return tag("path", d="M" + "L".join(f"{x_scale(x)} {y_scale(y)}" for x, y in points), class_=kind)

    def point(x: float, y: float) -> Html:
        tip = tag("title", f"{series.label}, step {number(x)}: {number(y)}")
        kind = "dot" if series.marked else "hover"
        return tag("circle", tip, cx=x_scale(x), cy=y_scale(y), r=3 if series.marked else 7, class_=kind)

    smooth = _window(series)
    parts = []
    for segment in series.segments():
        kind = "dashed" if series.marked else ("faint" if smooth else "solid")
        parts.append(path(_thinned(segment), kind))
        if smooth and len(segment) > smooth:
            parts.append(path(_thinned(_smoothed(segment, smooth)), "solid"))
    points = series.drawable()
    if series.marked or len(points) <= _HOVER_POINTS:
        parts.extend(point(x, y) for x, y in points)
    return tag("g", parts, class_=f"series {series.style}")


def _window(series: Series) -> int:
    """Values that the bold line averages over, an odd number; 0 for a line that is drawn as it is."""
    count = len(series.drawable())
    return 0 if series.marked or not series.smoothed or count < _SMOOTHED_FROM else max(3, count // 12 | 1)


def _smoothed(points: list[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    # Only where the window is full: a mean of fewer values at the ends would be noisier than the line claims to be.
    half = window // 2
    means = []
    for index in range(half, len(points) - half):
        near = points[index - half : index + half + 1]
        means.append((points[index][0], sum(y for _, y in near) / window))
    return means


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most about `_DRAWN_POINTS` of the points, with the lowest and highest of each stretch kept."""
    if len(points) <= _DRAWN_POINTS:
        return points
    stretch = math.ceil(2 * len(points) / _DRAWN_POINTS)
    kept = []
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        ends = {min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])}
        kept.extend(sorted(ends))
    return kept


def _legend(series: Sequence[Series]) -> Html | None:
    if len(series) == 1 and series[0].style == "train":
        return None
    entries = []
    for line in series:
        sample = tag("line", x1=1, x2=21, y1=5, y2=5, class_="dashed" if line.marked else "solid")
        dot = tag("circle", cx=11, cy=5, r=3, class_="dot") if line.marked else None
        swatch = tag("svg", sample, dot, viewBox="0 0 22 10", class_=f"swatch series {line.style}", aria_hidden="true")
        entries.append(tag("span", swatch, line.label))
    return tag("span", entries, class_="legend")


def _footnote(series: Sequence[Series]) -> Html | None:
    notes = []
    windows = sorted({_window(line) for line in series} - {0})
    if windows:
        notes.append(f"Faint: every log; bold: mean of {windows[-1]} neighbouring logs.")
    for line in series:
        missing = len(line.values) - len(line.drawable())
        if missing:
            verb = "value is" if missing == 1 else "values are"
            notes.append(f"{number(missing)} {line.label} {verb} not finite.")
    return tag("p", " ".join(notes), class_="note") if notes else None


def _description(title: str, series: Sequence[Series]) -> str:
    parts = []
    for line in series:
        (x0, y0), (x1, y1) = line.drawable()[0], line.drawable()[-1]
        parts.append(f"{line.label} from {number(y0)} at step {number(x0)} to {number(y1)} at step {number(x1)}")
    return f"{title}: {'; '.join(parts)}"
