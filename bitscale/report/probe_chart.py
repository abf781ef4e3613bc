"""The chart of `bitscale probe`: loss over λ, the ramps, and the costliest layers.

Drawn from plain figures, in the style of draw.py.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from bitscale.report.draw import DPI, HEIGHT_INCHES, INK, MUTED, SERIES, STYLE, WIDTH_INCHES

_MAX_BARS = 24

Rise = tuple[float, float]  # nats, standard error
Damage = tuple[str, float, float]  # group of layers, nats, standard error
Ramp = tuple[str, Any, Any]  # name, share of the ramp, λ


def draw_probe(
    path: Path,
    loss: float,
    curves: Sequence[tuple[str, Sequence[float], Sequence[Rise]]],
    damages: Sequence[Damage],
    ramps: Sequence[Ramp],
    ideal: str,
    proposed: str,
) -> None:
    """Write a PNG.

    Args:
        loss: in 16 bit; the rises are above it.
        curves: (part of the layers, λ, rises at them).
        damages: the costliest first; the first ones are shown.
        ramps: (name, share of the ramp, λ).
        ideal, proposed: names of those to draw prominently.
    """
    with matplotlib.rc_context(STYLE):
        spacing = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06, wspace=0.04, hspace=0.04)
        figure = Figure(figsize=(WIDTH_INCHES, HEIGHT_INCHES), layout=spacing)
        grid = figure.add_gridspec(2, 2 if damages else 1)
        _draw_curves(figure.add_subplot(grid[0, 0]), loss, curves)
        _draw_ramps(figure.add_subplot(grid[1, 0]), ramps, ideal, proposed)
        if damages:
            _draw_damages(figure.add_subplot(grid[:, 1]), damages[:_MAX_BARS], len(damages))
        figure.savefig(path, format="png", dpi=DPI)


def _draw_curves(
    panel: Any, loss: float, curves: Sequence[tuple[str, Sequence[float], Sequence[Rise]]]
) -> None:
    panel.set_title(f"Rise of the held-out loss above {loss:.4f}, nats per token (± 2 σ)")
    for (part, strengths, rises), color in zip(curves, SERIES, strict=False):
        height, error = np.array(rises).T
        panel.fill_between(
            strengths,
            height - 2 * error,
            height + 2 * error,
            color=color,
            alpha=0.18,
            linewidth=0,
        )
        panel.plot(strengths, height, color=color, marker="o", markersize=3.5, label=part)
    panel.set_xlabel("λ, weights as they are")
    panel.legend(frameon=False)


def _draw_ramps(panel: Any, ramps: Sequence[Ramp], ideal: str, proposed: str) -> None:
    panel.set_title("Ramps: λ over the share of the ramp")
    colors = iter(SERIES)
    for name, share, strength in ramps:
        is_ideal, is_proposed = name == ideal, name == proposed
        panel.plot(
            share,
            strength,
            color=INK if is_ideal else next(colors),
            linewidth=2.2 if is_ideal or is_proposed else 0.9,
            linestyle="solid" if is_ideal or is_proposed else (0, (4, 2)),
            label=f"{name} (proposed)" if is_proposed else name,
        )
    panel.set_xlabel("share of the ramp")
    if ramps:
        panel.legend(frameon=False, fontsize=8)


def _draw_damages(panel: Any, damages: Sequence[Damage], number: int) -> None:
    names, rises, errors = zip(*damages, strict=True)
    shown = "" if number == len(damages) else f", the first {len(damages)} of {number}"
    panel.set_title(f"Ternary by itself: rise in nats per token (± 2 σ){shown}")
    places = np.arange(len(names))
    panel.barh(
        places,
        rises,
        xerr=[2 * error for error in errors],
        color=SERIES[0],
        ecolor=MUTED,
        error_kw={"elinewidth": 0.8},
    )
    panel.set_yticks(places, names)
    panel.invert_yaxis()
    panel.grid(axis="y", visible=False)
