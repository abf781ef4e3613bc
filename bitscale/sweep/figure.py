"""One figure a sweep: the final losses of its points, and its claims with their intervals."""

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bitscale.fit.paired import mean_interval
from bitscale.fit.table import Row
from bitscale.report.draw import INK, MUTED, SERIES, STYLE
from bitscale.sweep.spec import Sweep
from bitscale.sweep.store import FINISHED
from bitscale.sweep.verdict import Judgement

_COLOURS = {
    "confirmed": "#009e73",
    "contradicted": "#d55e00",
    "not seen": "#0072b2",
    "underpowered": MUTED,
}

_PREDICTED = {
    "negative": "← predicted",
    "positive": "predicted →",
    "zero": "predicted: 0",
    "at_most": "predicted: below the margin",
}


def draw_sweep(
    sweep: Sweep, rows: Sequence[Row], judgements: Sequence[Judgement], path: Path
) -> None:
    """Write `path` (.svg or .png): points per seed and mean with interval; claims beside them."""
    mine = [row for row in rows if row["sweep"] == sweep.name and row["status"] == FINISHED]
    labels = list(dict.fromkeys(row["label"] for row in rows if row["sweep"] == sweep.name))
    with matplotlib.rc_context(STYLE):
        height = 1.4 + 0.26 * max(len(labels), 2 * len(judgements))
        figure = Figure(figsize=(10, height), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1, 1))
        _draw_points(left, labels, mine)
        _draw_claims(right, [j for j in judgements if not j.claim.best])
        figure.suptitle(sweep.spec.title or sweep.name, color=INK, fontsize=11, x=0.01, ha="left")
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = path.with_name(f".partial-{path.name}")
        undated = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(staging, format=path.suffix[1:], metadata=undated)
        staging.replace(path)


def _draw_points(axes: Axes, labels: Sequence[str], rows: Sequence[Row]) -> None:
    for place, label in enumerate(labels):
        values = [r["valid_loss"] for r in rows if r["label"] == label and r["valid_loss"]]
        axes.plot(values, [place] * len(values), "o", ms=3.5, mfc="none", mec=MUTED, mew=0.8)
        if len(values) > 1:
            interval = mean_interval(values)
            axes.plot([interval.low, interval.high], [place, place], color=SERIES[0], lw=2)
            axes.plot([interval.value], [place], "|", color=SERIES[0], ms=10, mew=2)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xlabel("validation loss, nats per token (circles: seeds; line: 95% of the mean)")


def _draw_claims(axes: Axes, judgements: Sequence[Judgement]) -> None:
    axes.axvline(0, color=MUTED, lw=0.8)
    for place, judgement in enumerate(judgements):
        colour, interval = _COLOURS[judgement.verdict], judgement.interval
        if math.isfinite(interval.low):
            axes.plot([interval.low, interval.high], [place, place], color=colour, lw=2.5)
            axes.plot([interval.value], [place], "o", color=colour, ms=5)
        margin = judgement.claim.margin
        if margin:
            axes.plot([-margin, margin], [place + 0.22] * 2, color=MUTED, lw=0.8)
        direction = _PREDICTED[str(judgement.claim.predicted)]
        text = f"{judgement.claim.id} ({direction}): {judgement.verdict}"
        at = axes.get_yaxis_transform()  # across the axes, at this height
        axes.text(0, place - 0.2, text, transform=at, fontsize=8, color=colour)
    axes.set_ylim(len(judgements) - 0.4, -0.6)
    axes.set_yticks([])
    axes.set_xlabel("paired difference, 95% interval (thin line: the margin)")
