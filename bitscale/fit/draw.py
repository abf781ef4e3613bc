"""A fit as a figure: predicted against observed, and residuals."""

from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib.figure import Figure

from bitscale.fit.laws import Floats

_INK, _POINTS = "#6b727a", "#0072b2"
_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "bitscale",
}


class Points(NamedTuple):
    predicted: Floats
    observed: Floats
    response: str
    title: str


def draw_fit(points: Points, path: Path) -> None:
    """Write `path`, an SVG."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        ends = [min(points.observed.min(), points.predicted.min()),
                max(points.observed.max(), points.predicted.max())]  # fmt: skip
        left.plot(ends, ends, color=_INK, lw=0.8)
        left.plot(points.predicted, points.observed, "o", ms=3.5, color=_POINTS, alpha=0.7)
        left.set_xlabel(f"predicted {points.response}, nats")
        left.set_ylabel("observed")
        right.axhline(0, color=_INK, lw=0.8)
        residuals = points.observed - points.predicted
        right.plot(points.predicted, residuals, "o", ms=3.5, color=_POINTS, alpha=0.7)
        right.set_xlabel(f"predicted {points.response}, nats")
        right.set_ylabel("observed - predicted")
        figure.suptitle(points.title, fontsize=9, x=0.01, ha="left")
        figure.savefig(path, format="svg", metadata={"Date": None})
