"""Lines over steps: training, evaluation, several runs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from tether.report.charts.scales import BOTTOM, CANVAS, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Scale, axes, fits, padded
from tether.report.numbers import number
from tether.report.render import fragment

# A colour of the style sheet: `train`, `eval`, `chosen`, `rejected`, and `run0`, `run1`, … of a comparison.
Style = str
Point = tuple[float, float]

_DRAWN_POINTS = 600
_POINTED = 300
_SMOOTHED_FROM = 24
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

    def drawable(self) -> list[Point]:
        """Its points that have a place on the chart."""
        return [(x, y) for x, y in zip(self.steps, self.values, strict=True) if fits(y)]

    def segments(self) -> list[list[Point]]:
        """Its points, split where a value is not finite."""
        runs: list[list[Point]] = [[]]
        for x, y in zip(self.steps, self.values, strict=True):
            if fits(y):
                runs[-1].append((x, y))
            elif runs[-1]:
                runs.append([])
        return [run for run in runs if run]

    @property
    def window(self) -> int:
        """Values that the bold line averages over, an odd number; 0 for a line that is drawn as it is."""
        count = len(self.drawable())
        return 0 if self.marked or not self.smoothed or count < _SMOOTHED_FROM else max(3, count // 12 | 1)


@dataclass(frozen=True)
class _Shape:
    """A path, or a dot where `d` is empty."""

    kind: str
    d: str = ""
    x: float = 0.0
    y: float = 0.0


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    baseline: tuple[float, str] | None = None,
    bounds: tuple[float, float] | None = None,
    unit: str = "step",
) -> Markup | None:
    """Draw series over steps, with axes, ticks, a legend, a description for screen readers, and what the pointer shows.

    Args:
        title: above the chart.
        series: the lines; those without a single finite value are left out.
        baseline: a value to mark across the chart, and what to call it.
        bounds: the y axis, where the quantity has natural limits; None to fit it to the data.
        unit: what the x values are.

    Returns:
        A `figure`; None when nothing can be drawn.
    """
    shown = [line for line in series if line.drawable()]
    if not shown:
        return None
    points = [point for line in shown for point in line.drawable()]
    ys = [y for _, y in points] + ([baseline[0]] if baseline else [])
    x_scale = Scale(*padded(min(x for x, _ in points), max(x for x, _ in points), 0.0), LEFT, WIDTH - RIGHT)
    y_scale = Scale(*(bounds or padded(min(ys), max(ys), 0.06, _NARROWEST)), HEIGHT - BOTTOM, TOP)
    return fragment(
        "chart.html",
        title=title,
        description=_description(title, shown, unit),
        canvas=CANVAS,
        axes=axes(x_scale, y_scale, unit, whole=True),
        baseline=_baseline(baseline, y_scale),
        groups=[(line, _shapes(line, x_scale, y_scale, _DRAWN_POINTS // math.ceil(len(shown) / 2))) for line in shown],
        bars=(),
        legend=[] if len(shown) == 1 and shown[0].style == "train" else shown,
        pointer=json.dumps(_pointer(shown, x_scale, y_scale, unit), separators=(",", ":"), ensure_ascii=False),
        note=_footnote(shown),
    )


def _baseline(baseline: tuple[float, str] | None, y_scale: Scale) -> tuple[float, float, str] | None:
    """Where the line lies, where its name does, and the name."""
    if baseline is None or not y_scale.low <= baseline[0] <= y_scale.high:
        return None
    y = y_scale(baseline[0])
    # Above the line, or below it where the line is at the top of the chart.
    return y, y - 5 if y > TOP + 16 else y + 14, baseline[1]


def _shapes(series: Series, x_scale: Scale, y_scale: Scale, most: int) -> list[_Shape]:
    def path(points: list[Point], kind: str) -> _Shape:
        if len(points) == 1:
            return _Shape("dot", x=x_scale(points[0][0]), y=y_scale(points[0][1]))
        return _Shape(kind, d="M" + "L".join(f"{x_scale(x)} {y_scale(y)}" for x, y in points))

    smooth, shapes = series.window, []
    for segment in series.segments():
        shapes.append(path(_thinned(segment, most), "dashed" if series.marked else ("faint" if smooth else "solid")))
        if smooth and len(segment) > smooth:
            shapes.append(path(_thinned(_smoothed(segment, smooth), most), "solid"))
    if series.marked:
        shapes += [_Shape("dot", x=x_scale(x), y=y_scale(y)) for x, y in _thinned(series.drawable(), most)]
    return shapes


def _smoothed(points: list[Point], window: int) -> list[Point]:
    # Only where the window is full: a mean of fewer values at the ends would be noisier than the line claims to be.
    half = window // 2
    means = []
    for index in range(half, len(points) - half):
        near = points[index - half : index + half + 1]
        means.append((points[index][0], sum(y for _, y in near) / window))
    return means


def _thinned(points: list[Point], most: int) -> list[Point]:
    """At most about `most` of the points, with the lowest and highest of each stretch kept."""
    if len(points) <= most:
        return points
    stretch = math.ceil(2 * len(points) / most)
    kept = []
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        ends = {min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])}
        kept.extend(sorted(ends))
    return kept


def _pointer(series: Sequence[Series], x_scale: Scale, y_scale: Scale, unit: str) -> dict[str, Any]:
    """What the script shows beside the pointer: places across, and for each line its height and its value as text."""
    steps = sorted({x for line in series for x, _ in line.drawable()})
    kept = {steps[round(place * (len(steps) - 1) / max(_POINTED - 1, 1))] for place in range(_POINTED)}
    kept = kept if len(steps) > _POINTED else set(steps)
    evaluated = {x for line in series if line.marked and len(line.steps) <= _POINTED for x, _ in line.drawable()}
    across = sorted(kept | evaluated)
    lines = []
    for line in series:
        known = dict(line.drawable())
        found = [known.get(x) for x in across]
        heights = [None if y is None else y_scale(y) for y in found]
        lines.append({"n": line.label, "y": heights, "t": ["" if y is None else number(y) for y in found]})
    return {"x": [x_scale(x) for x in across], "l": [f"{unit} {number(x)}" for x in across], "s": lines}


def _footnote(series: Sequence[Series]) -> str:
    notes = []
    windows = sorted({line.window for line in series} - {0})
    if windows:
        notes.append(f"Faint: every log; bold: mean of {windows[-1]} neighbouring logs.")
    for line in series:
        missing = len(line.values) - len(line.drawable())
        if missing:
            verb = "value is" if missing == 1 else "values are"
            notes.append(f"{number(missing)} {line.label} {verb} not finite.")
    return " ".join(notes)


def _description(title: str, series: Sequence[Series], unit: str) -> str:
    parts = []
    for line in series:
        (x0, y0), (x1, y1) = line.drawable()[0], line.drawable()[-1]
        parts.append(f"{line.label} from {number(y0)} at {unit} {number(x0)} to {number(y1)} at {unit} {number(x1)}")
    return f"{title}: {'; '.join(parts)}"
