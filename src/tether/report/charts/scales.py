"""Where values lie on the canvas of a chart, and which round ones are named beside its axes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tether.report.numbers import MINUS, number

WIDTH, HEIGHT = 480, 232
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 10, 36
CANVAS = {
    "width": WIDTH,
    "height": HEIGHT,
    "left": LEFT,
    "right": WIDTH - RIGHT,
    "top": TOP,
    "bottom": HEIGHT - BOTTOM,
}
_LARGEST = 1e30
_TICKS = 5  # on an axis, about


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


@dataclass(frozen=True)
class Axes:
    """Marks beside a chart: places on the canvas and what is written there."""

    x: list[tuple[float, str]]
    y: list[tuple[float, str]]
    unit: str


def axes(x_scale: Scale, y_scale: Scale, unit: str, *, whole: bool) -> Axes:
    """Ticks of both axes.

    Args:
        x_scale: across.
        y_scale: upwards.
        unit: what lies across.
        whole: only whole numbers from 0 on, as steps are: a tick at step 2.5 would name one that does not exist.
    """
    across, up = ticks(x_scale.low, x_scale.high), ticks(y_scale.low, y_scale.high)
    if whole:
        across = [value for value in across if value == round(value) and value >= 0]
    step = up[1] - up[0] if len(up) > 1 else abs(up[0]) if up else 1.0
    named = [(x_scale(value), number(round(value, 12))) for value in across]
    return Axes(named, [(y_scale(value), _tick_label(value, step or 1.0)) for value in up], unit)


def fits(value: float) -> bool:
    """Whether a value can be drawn; beyond the limit the span of an axis could overflow."""
    return math.isfinite(value) and abs(value) < _LARGEST


def padded(low: float, high: float, share: float, least: float = 0.0) -> tuple[float, float]:
    """A range with `share` of itself on both sides, at least `least` of its values wide; a point gets some room."""
    size = max(abs(low), abs(high))
    if high - low < 1e-30 or high - low < 1e-12 * size:
        margin = size * 0.1 if size > 1e-30 else 1.0
    else:
        margin = max(share * (high - low), (least * size - (high - low)) / 2)
    return low - margin, high + margin


def ticks(low: float, high: float) -> list[float]:
    """Round values that divide a range.

    Args:
        low: start of the range.
        high: its end, above `low`.

    Returns:
        Values inside the range, rising.

    >>> ticks(0, 200), [round(tick, 2) for tick in ticks(0.31, 0.72)]
    ([0.0, 50.0, 100.0, 150.0, 200.0], [0.4, 0.5, 0.6, 0.7])
    """
    rough = (high - low) / _TICKS
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10, 20) if factor * magnitude >= rough * 0.8)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, min(last, first + 2 * _TICKS) + 1)]


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
