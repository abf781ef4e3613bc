"""The chart: loss and λ on the left, learning rate, gradient norm and ternary codes beside them.

Drawn without pyplot (no global state, no display). Colours come from a Theme: the PNG gets plain
ones, the page gets the same drawing with CSS variables in their place (see page.py).
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from bitscale.report.read import Floats, Run
from bitscale.report.spike import find_transition

# Okabe and Ito's palette, which all common forms of colour blindness can tell apart, without its
# black and yellow (lost on a dark or a light page). Then the dashes change.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES = ("solid", (0, (5, 1.5)), (0, (1.5, 1.2)))
INK, MUTED, GRID = "#22262b", "#6b727a", "#e4e7ea"
WIDTH_INCHES, HEIGHT_INCHES, DPI = 10.0, 7.5, 120  # 1200 x 900 pixels
MAX_POINTS = 1500  # a line; more cannot be seen and would swell the page

STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "sans-serif"],
    "font.size": 9,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "axes.titlecolor": INK,
    "axes.titlepad": 5,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.major.size": 2.5,
    "ytick.major.size": 0,
    "text.parse_math": False,  # a run name may hold dollar signs
    "svg.fonttype": "none",
    "svg.hashsalt": "bitscale",
}


class Curve(NamedTuple):
    """How a run is drawn: x is tokens or steps of every train row."""

    run: Run
    x: Floats
    smooth_loss: Floats
    color: str
    dashes: Any
    transition_x: float | None


class Chart(NamedTuple):
    """A drawn figure, its panels by name, and what it shows over `x` ("tokens" or "steps")."""

    figure: Any
    panels: dict[str, Any]
    curves: list[Curve]
    x: str


def draw_runs(runs: Sequence[Run], *, x: str, smooth: int | None) -> Chart:
    """Draw all runs over `x` ("tokens" or "steps"), with the loss smoothed over `smooth` steps.

    `smooth` None is 1% of each run's steps. Smoothing never reaches across the transition.
    """
    curves = [_curve(run, index, x, smooth) for index, run in enumerate(runs)]
    with matplotlib.rc_context(STYLE):
        figure, panels = _lay_out(any(len(run.telemetry.step) for run in runs))
        _draw_loss(panels["loss"], curves)
        _draw_strength(panels["lambda"], curves)
        _draw_line(panels["lr"], curves, "lr")
        _draw_gradient_norm(panels["grad_norm"], curves)
        if "zeros" in panels:
            _draw_telemetry(panels["zeros"], curves, "zeros", x)
            _draw_telemetry(panels["flipped"], curves, "flipped", x)
        for panel in panels.values():
            _mark_transitions(panel, curves)
        _mark_rollbacks(panels["loss"], curves, x)
        _finish_axes(panels, curves, x)
        _add_legend(figure, curves)
        figure.draw_without_rendering()
    return Chart(figure, panels, curves, x)


def save(chart: Chart, file: Any, kind: str) -> None:
    """Write the chart as "png" (1200 x 900 pixels) or "svg" to a path or a binary stream."""
    metadata = {"Date": None} if kind == "svg" else None
    with matplotlib.rc_context(STYLE):
        chart.figure.savefig(
            file, format=kind, dpi=DPI, metadata=metadata, transparent=kind == "svg"
        )


def smooth_segment(loss: Floats, half: int) -> Floats:
    """Centred mean over 2·half + 1 steps, truncated at both ends; non-finite steps left out."""
    finite = np.isfinite(loss)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, loss, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    rows = np.arange(len(loss))
    low, high = np.maximum(rows - half, 0), np.minimum(rows + half + 1, len(loss))
    number = counts[high] - counts[low]
    result: Floats = np.where(
        number > 0, (sums[high] - sums[low]) / np.maximum(number, 1), math.nan
    )
    return result


def thin(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """Keep the lowest and the highest point of each of MAX_POINTS / 2 stretches, in order."""
    if len(x) <= MAX_POINTS:
        return x, y
    kept: list[int] = []
    for rows in np.array_split(np.arange(len(x)), MAX_POINTS // 2):
        part = y[rows]
        extremes = {
            int(rows[np.argmin(np.where(np.isfinite(part), part, math.inf))]),
            int(rows[np.argmax(np.where(np.isfinite(part), part, -math.inf))]),
        }
        kept += sorted(extremes)
    return x[kept], y[kept]


def _curve(run: Run, index: int, x: str, smooth: int | None) -> Curve:
    xs = run.train["tokens" if x == "tokens" else "step"]
    loss = run.train["loss"]
    half = (max(1, round(len(loss) / 100)) if smooth is None else smooth) // 2
    transition = find_transition(run)
    first = transition.first if transition else 0
    smooth_loss = np.concatenate(
        [smooth_segment(loss[:first], half), smooth_segment(loss[first:], half)]
    )
    transition_x = None
    if transition:
        transition_x = float(transition.tokens if x == "tokens" else transition.step - 1)
    dashes = DASHES[index // len(SERIES) % len(DASHES)]
    return Curve(run, xs, smooth_loss, SERIES[index % len(SERIES)], dashes, transition_x)


def _lay_out(with_telemetry: bool) -> tuple[Any, dict[str, Any]]:
    spacing = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06, wspace=0.02, hspace=0.02)
    figure = Figure(figsize=(WIDTH_INCHES, HEIGHT_INCHES), layout=spacing)
    grid = figure.add_gridspec(4, 2, width_ratios=[1.75, 1])
    loss = figure.add_subplot(grid[0:3, 0])
    panels = {"loss": loss, "lambda": figure.add_subplot(grid[3, 0], sharex=loss)}
    right = ["lr", "grad_norm"] + (["zeros", "flipped"] if with_telemetry else [])
    rows = 4 // len(right)
    for i, name in enumerate(right):
        panels[name] = figure.add_subplot(grid[i * rows : (i + 1) * rows, 1], sharex=loss)
    titles = {
        "loss": "Training loss, nats per token (line: smoothed, ○: validation)",
        "lambda": "Ternary strength λ (line: weights, dots: activations)",
        "lr": "Learning rate",
        "grad_norm": "Gradient norm",
        "zeros": "Zero codes (median layer, band: all)",
        "flipped": "Codes changed per interval",
    }
    for name, panel in panels.items():
        panel.set_title(titles[name])
    return figure, panels


def _draw_loss(panel: Any, curves: Sequence[Curve]) -> None:
    raw_alpha = 0.28 if len(curves) == 1 else 0.16
    for curve in curves:
        x, y = thin(curve.x, curve.run.train["loss"])
        panel.plot(x, y, color=curve.color, alpha=raw_alpha, linewidth=0.6)
    for order, curve in enumerate(curves):
        x, y = thin(curve.x, curve.smooth_loss)
        panel.plot(
            *(x, y), color=curve.color, linestyle=curve.dashes, linewidth=1.8, zorder=3 + order / 99
        )
    for curve in curves:
        valid = curve.run.valid
        panel.plot(
            valid["tokens" if curve.x is curve.run.train["tokens"] else "step"],
            valid["loss"],
            linestyle="none",
            marker="o",
            markersize=5,
            markerfacecolor="white",
            markeredgecolor=curve.color,
            markeredgewidth=1.4,
            zorder=5,
        )
    panel.set_ylim(*loss_limits(curves))
    panel.yaxis.set_major_locator(MaxNLocator(nbins=8))


def loss_limits(curves: Sequence[Curve]) -> tuple[float, float]:
    """The smoothed curves from their first 3% on: the start would flatten everything else."""
    parts = [curve.smooth_loss[len(curve.smooth_loss) * 3 // 100 :] for curve in curves]
    parts += [curve.run.valid["loss"][1:] for curve in curves]
    shown = np.concatenate(parts)
    shown = shown[np.isfinite(shown)]
    if len(shown) == 0:
        return 0.0, 1.0
    low, high = float(shown.min()), float(shown.max())
    margin = 0.06 * (high - low) or 0.1
    return low - margin, high + margin


def _draw_strength(panel: Any, curves: Sequence[Curve]) -> None:
    for curve in curves:
        train = curve.run.train
        style = {"color": curve.color, "linewidth": 1.5}
        panel.plot(
            *thin(curve.x, train["lambda_weight"]), linestyle=curve.dashes, alpha=0.9, **style
        )
        if not np.array_equal(train["lambda_weight"], train["lambda_activation"]):
            x, y = thin(curve.x, train["lambda_activation"])
            panel.plot(x, y, linestyle=(0, (1, 1.2)), **style)
    panel.set_ylim(-0.06, 1.06)
    panel.yaxis.set_major_locator(FixedLocator([0, 0.5, 1]))


def _draw_line(panel: Any, curves: Sequence[Curve], field: str, **style: Any) -> None:
    for curve in curves:
        x, y = thin(curve.x, curve.run.train[field])
        panel.plot(
            *(x, y), color=curve.color, linestyle=curve.dashes, **{"linewidth": 1.3, **style}
        )
    panel.yaxis.set_major_locator(MaxNLocator(nbins=4))


def _draw_gradient_norm(panel: Any, curves: Sequence[Curve]) -> None:
    _draw_line(panel, curves, "grad_norm", linewidth=0.7, alpha=0.8)
    norms = np.concatenate([curve.run.train["grad_norm"] for curve in curves])
    if (norms[np.isfinite(norms)] > 0).any():
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.yaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))


def _draw_telemetry(panel: Any, curves: Sequence[Curve], field: str, x: str) -> None:
    for curve in curves:
        telemetry = curve.run.telemetry
        train = curve.run.train
        # Telemetry lines carry no token count: take it from the train lines.
        at = np.interp(telemetry.step, train["step"], train["tokens"])
        xs = at if x == "tokens" else telemetry.step
        spread = getattr(telemetry, field)
        panel.fill_between(
            xs, spread[:, 0], spread[:, 2], color=curve.color, alpha=0.18, linewidth=0
        )
        panel.plot(xs, spread[:, 1], color=curve.color, linestyle=curve.dashes, linewidth=1.5)
    panel.set_ylim(bottom=0)
    panel.yaxis.set_major_locator(MaxNLocator(nbins=4))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))


def _mark_transitions(panel: Any, curves: Sequence[Curve]) -> None:
    single = len(curves) == 1
    for curve in curves:
        if curve.transition_x is not None:
            color = MUTED if single else curve.color
            panel.axvline(
                curve.transition_x, color=color, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1.5
            )


def _mark_rollbacks(panel: Any, curves: Sequence[Curve], x: str) -> None:
    """A cross below the top at each step from which the run's guard went back."""
    for curve in curves:
        steps = [line["detected_step"] for line in curve.run.events if line["event"] == "rollback"]
        train = curve.run.train
        at = np.interp(steps, train["step"], train["tokens"]) if x == "tokens" else steps
        panel.plot(
            at,
            [0.97] * len(steps),
            transform=panel.get_xaxis_transform(),
            linestyle="none",
            marker="x",
            markersize=6,
            markeredgewidth=1.6,
            color=curve.color,
            zorder=6,
        )
        if steps:
            panel.set_title(panel.get_title(loc="left").removesuffix(")") + ", ✕: rolled back)")


def _finish_axes(panels: dict[str, Any], curves: Sequence[Curve], x: str) -> None:
    first = curves[0]
    if len(curves) == 1 and first.transition_x is not None:
        panels["loss"].annotate(
            "16 → 1.58 bit",
            (first.transition_x, 1),
            xycoords=("data", "axes fraction"),
            xytext=(5, -3),
            textcoords="offset points",
            va="top",
            color=MUTED,
            fontsize=8.5,
        )
    last = max(curve.x[-1] for curve in curves)
    start = min(curve.x[0] for curve in curves)
    panels["loss"].set_xlim(0 if start < 0.1 * last else start, last * 1.01)
    bottom = ("lambda", "flipped" if "flipped" in panels else "grad_norm")
    for name, panel in panels.items():
        panel.xaxis.set_major_locator(MaxNLocator(nbins=8 if name in ("loss", "lambda") else 4))
        panel.xaxis.set_major_formatter(FuncFormatter(format_tick))
        panel.tick_params(labelbottom=name in bottom)
        if name in bottom:
            panel.set_xlabel("tokens seen" if x == "tokens" else "optimizer steps")


def format_tick(value: float, _position: object = None) -> str:
    """0, 500k, 20M, 1.5B."""
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{suffix}"
    return f"{value:g}"


def _add_legend(figure: Any, curves: Sequence[Curve]) -> None:
    handles = [
        Line2D([], [], color=curve.color, linestyle=curve.dashes, linewidth=2.2) for curve in curves
    ]
    # Matplotlib leaves out labels that begin with an underscore: set the names afterwards.
    legend = figure.legend(
        handles,
        ["run"] * len(curves),
        loc="outside upper left",
        ncols=_legend_columns([curve.run.name for curve in curves]),
        frameon=False,
        handlelength=2.2,
        fontsize=9.5,
    )
    for text, curve in zip(legend.get_texts(), curves, strict=True):
        text.set_text(curve.run.name)


def _legend_columns(names: Sequence[str]) -> int:
    # About 130 characters of this size fit the width; a handle and its gaps take 9.
    return max(1, min(len(names), 130 // (9 + max(len(name) for name in names))))


def panel_boxes(chart: Chart) -> Iterator[dict[str, Any]]:
    """Each panel's place in the SVG (points, y down) and its x limits, for the page's cursor."""
    width, height = WIDTH_INCHES * 72, HEIGHT_INCHES * 72
    for name, panel in chart.panels.items():
        box = panel.get_position()
        yield {
            "name": name,
            "left": round(float(box.x0 * width), 2),
            "right": round(float(box.x1 * width), 2),
            "top": round(float((1 - box.y1) * height), 2),
            "bottom": round(float((1 - box.y0) * height), 2),
            "xmin": float(panel.get_xlim()[0]),
            "xmax": float(panel.get_xlim()[1]),
        }
