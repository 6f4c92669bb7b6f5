"""Charts put values where they belong, and draw what is missing as missing."""

from __future__ import annotations

import json
import math
import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from tether.report.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Series,
    Values,
    histogram,
    interval_strip,
    length_strip,
    line_chart,
    ticks,
)

NAN = math.nan


def draw(*series: Series, **options) -> ElementTree.Element:
    chart = line_chart("Loss", series, **options)
    assert chart is not None
    return ElementTree.fromstring(chart)


def paths(chart: ElementTree.Element) -> list[list[tuple[float, float]]]:
    found = [path.get("d", "") for path in chart.iter("path")]
    return [[tuple(map(float, pair.split())) for pair in re.split("[ML]", d) if pair] for d in found]


def texts(chart: ElementTree.Element) -> list[str]:
    return [text.text or "" for text in chart.iter("text")]


def test_values_lie_where_the_axes_say() -> None:
    chart = draw(Series("train", [0, 5, 10], [0.0, 0.25, 1.0], "train"), bounds=(0.0, 1.0))
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    assert paths(chart) == [[(LEFT, bottom), ((LEFT + right) / 2, bottom - 0.25 * (bottom - TOP)), (right, TOP)]]
    labels = {
        text.text: float(text.get("y", "nan")) - 4 for text in chart.iter("text") if text.get("x") == str(LEFT - 8)
    }
    assert labels["0"] == bottom
    assert labels["1.0"] == TOP
    assert [text for text in texts(chart) if text.isdigit()][-6:] == ["0", "2", "4", "6", "8", "10"]


def test_a_value_that_is_not_finite_breaks_the_line_and_is_counted() -> None:
    chart = draw(Series("train", [1, 2, 3, 4, 5, 6], [1.0, 2.0, NAN, math.inf, 2.0, 1.0], "train"))
    assert [len(path) for path in paths(chart)] == [2, 2]
    note = chart.find("p")
    assert note is not None
    assert note.text == "2 train values are not finite."


def test_nothing_to_draw_is_no_chart() -> None:
    assert line_chart("Loss", []) is None
    assert line_chart("Loss", [Series("train", [], [], "train")]) is None
    assert line_chart("Loss", [Series("train", [1, 2], [NAN, -math.inf], "train")]) is None


@pytest.mark.parametrize("value", [0.0, 0.7, -3.0, 1e-12, 1e20, -1e29])
def test_one_point_and_a_flat_line_have_an_axis(value: float) -> None:
    point = draw(Series("eval", [100], [value], "eval", marked=True))
    assert paths(point) == []
    assert any(circle.get("class") == "dot" for circle in point.iter("circle"))
    flat = paths(draw(Series("train", [1, 2], [value, value], "train")))[0]
    assert flat[0][1] == flat[1][1]
    assert TOP < flat[0][1] < HEIGHT - BOTTOM


def test_extremes_of_floats_do_not_break_the_axis() -> None:
    chart = draw(Series("train", [1, 2, 3], [1e308, -1e308, 1.0], "train"), baseline=(0.0, "zero"))
    assert "2 train values are not finite." in [p.text for p in chart.iter("p")]
    assert "nan" not in ElementTree.tostring(chart, encoding="unicode")


def test_long_noisy_lines_have_a_mean_where_its_window_is_full() -> None:
    values = [float(step % 2) for step in range(36)]
    faint, bold = paths(draw(Series("train", list(range(36)), values, "train"), bounds=(0.0, 1.0)))
    assert (len(faint), len(bold)) == (36, 34)
    bottom, height = HEIGHT - BOTTOM, HEIGHT - BOTTOM - TOP
    # The mean of 0, 1, 0 is a third, of 1, 0, 1 two thirds.
    assert [y for _, y in bold[:2]] == pytest.approx([bottom - height / 3, bottom - 2 * height / 3], abs=0.01)
    assert [len(path) for path in paths(draw(Series("rate", list(range(36)), values, "train", smoothed=False)))] == [36]


def test_a_very_long_line_is_thinned_and_keeps_its_extremes() -> None:
    values = [0.0] * 20_000
    values[7_777], values[12_345] = 5.0, -5.0
    faint = paths(draw(Series("train", list(range(20_000)), values, "train"), bounds=(-5.0, 5.0)))[0]
    assert len(faint) < 700
    assert {TOP, HEIGHT - BOTTOM} <= {y for _, y in faint}


def test_legend_names_the_series_and_the_title_describes_them() -> None:
    chart = draw(Series("train", [1, 9], [0.7, 0.5], "train"), Series("eval <b>", [9], [0.6], "eval", marked=True))
    caption = chart.find("figcaption")
    assert caption is not None
    assert [span.find("svg").tail for span in caption.iter("span") if span.find("svg") is not None] == [
        "train",
        "eval <b>",
    ]
    description = next(chart.iter("title")).text or ""
    assert "train from 0.7 at step 1 to 0.5 at step 9; eval <b>" in description


@pytest.mark.parametrize(
    ("low", "high", "first", "last", "step"),
    [(0, 200, 0, 200, 50), (0.31, 0.72, 0.4, 0.7, 0.1), (-3, 3, -3, 3, 1), (2e-6, 5.1e-5, 1e-5, 5e-5, 1e-5)],
)
def test_ticks_are_round_and_even(low: float, high: float, first: float, last: float, step: float) -> None:
    found = ticks(low, high)
    assert (found[0], found[-1]) == (pytest.approx(first), pytest.approx(last))
    assert [b - a for a, b in pairwise(found)] == pytest.approx([step] * (len(found) - 1))


@pytest.mark.parametrize("low", [-1e25, -7.3, 0.0, 3e-9, 123456.0])
@pytest.mark.parametrize("span", [1e-6, 0.3, 17.0, 1e26])
def test_tick_labels_are_distinct(low: float, span: float) -> None:
    chart = draw(Series("train", [1, 2], [low, low + span], "train"))
    labels = [text.text for text in chart.iter("text") if text.get("x") == str(LEFT - 8)]
    assert 1 <= len(labels) == len(set(labels)) <= 12


def test_steps_are_labelled_by_whole_numbers() -> None:
    chart = draw(Series("train", [1, 2, 3], [0.1, 0.2, 0.3], "train"))
    assert [text.text for text in chart.iter("text") if text.get("text-anchor") == "middle"] == ["1", "2", "3"]


def test_an_interval_is_drawn_to_scale_and_cut_at_the_ends() -> None:
    strip = ElementTree.fromstring(interval_strip(0.75, 0.5, 1.5, 0.5, (0.0, 1.0)) or "")
    lines = {
        line.get("class"): (float(line.get("x1", "nan")), float(line.get("x2", "nan"))) for line in strip.iter("line")
    }
    assert lines == {"rail": (4, 236), "mark": (120, 120), "interval": (120, 236)}
    assert interval_strip(NAN, 0.1, 0.2, 0.5, (0.0, 1.0)) is None
    assert interval_strip(0.0, 0.0, 0.0, 0.0, (0.0, 0.0)) is None


def pointer(chart: ElementTree.Element) -> dict:
    return json.loads(chart.get("data-pointer", ""))


def test_the_pointer_finds_each_value_where_it_is_drawn() -> None:
    chart = draw(
        Series("train", [0, 5, 10], [0.0, 0.25, 1.0], "train"),
        Series("eval", [10, 20], [0.5, NAN], "eval", marked=True),
        bounds=(0.0, 1.0),
    )
    found = pointer(chart)
    assert found["l"] == ["step 0", "step 5", "step 10"]
    train, evaluation = found["s"]
    assert train["t"] == ["0", "0.25", "1"]
    assert list(zip(found["x"], train["y"], strict=True))[:3] == paths(chart)[0]
    assert (evaluation["n"], evaluation["t"], evaluation["y"][0]) == ("eval", ["", "", "0.5"], None)


def test_the_pointer_of_a_long_line_has_its_ends_and_every_evaluation() -> None:
    steps = list(range(5000))
    found = pointer(draw(Series("train", steps, [1.0] * 5000, "train"), Series("eval", [777], [2.0], "eval", True)))
    assert 300 <= len(found["l"]) <= 301
    assert {"step 0", "step 777", "step 4,999"} <= set(found["l"])


def test_a_histogram_counts_each_value_once_and_shows_the_mark() -> None:
    values = [*[0.0] * 5, *[1.0] * 3, 0.5]
    chart = ElementTree.fromstring(
        histogram("Margins", [Values("a", values), Values("b", [0.5])], bins=2, mark=0.5) or ""
    )
    assert [line["t"] for line in pointer(chart)["s"]] == [["5", "4"], ["0", "1"]]
    heights = [float(bar.get("height", "nan")) for bar in chart.iter("rect")]
    assert heights[1] / heights[0] == pytest.approx(4 / 5, abs=1e-3)
    assert (LEFT + WIDTH - RIGHT) / 2 in [float(line.get("x1", "nan")) for line in chart.iter("line")]
    assert histogram("Margins", [Values("a", [NAN])]) is None


def test_lengths_lie_on_one_scale() -> None:
    strip = ElementTree.fromstring(length_strip({"min": 0, "p50": 25, "p90": 50, "max": 100}, 100) or "")
    (dot,) = strip.iter("circle")
    assert float(dot.get("cx", "nan")) == 4 + 232 / 4
    assert length_strip({"min": 0, "p50": 1}, 100) is None
