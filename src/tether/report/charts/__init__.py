"""Charts as SVG in the page: lines over steps, histograms, intervals on a scale.

Drawn here and not by a library of scripts, for these reasons: no Python package ships one that fits (plotly's and
Bokeh's are larger than a page may be, uPlot is in none); a chart is also read without a script, in print, by a screen
reader and in the colours of the reader's preference, which a canvas is not; and a page runs a screen of script, the
pointer's, and no library. The script (`templates/page.js`) writes texts that were formatted here.
"""

from tether.report.charts.bars import Values, histogram, interval_strip, length_strip
from tether.report.charts.lines import Series, Style, line_chart
from tether.report.charts.scales import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, ticks

__all__ = [
    "BOTTOM",
    "HEIGHT",
    "LEFT",
    "RIGHT",
    "TOP",
    "WIDTH",
    "Series",
    "Style",
    "Values",
    "histogram",
    "interval_strip",
    "length_strip",
    "line_chart",
    "ticks",
]
