"""report.html: one self-contained page with the chart, its cursor and the table of figures."""

import io
import json
import math
import re
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from bitscale.report import draw
from bitscale.report.summary import UNKNOWN, Summary, display

# The drawing's colours on a dark page; on a light one they are as drawn.
DARK = dict(
    zip(
        draw.SERIES, ("#4aa8e8", "#ff8a3d", "#2fc79a", "#e59bc4", "#f2b632", "#8fd0f5"), strict=True
    )
)
PAGE_LIGHT = "#ffffff"
DARK |= {
    draw.INK: "#e6e8ea",
    draw.MUTED: "#9aa3ac",
    draw.GRID: "#2c3238",
    PAGE_LIGHT: "#14181c",
}
CURSOR_POINTS = 400  # a run: what the cursor reads out

MEANING = {
    "steps": "optimizer steps done (of planned)",
    "train loss": "mean of the last 5% of the steps, nats per token",
    "valid loss": "last evaluation, nats per token",
    "best valid": "lowest evaluation",
    "perplexity": "last evaluation",
    "bits/byte": "last evaluation",
    "transition step": "first step with ternary strength",
    "transition tokens": "tokens seen before it",
    "spike": "peak of the smoothed loss above the mean loss before the transition",
    "recovery tokens": "from the transition until the smoothed loss is back",
    "tok/s": "median over the logging intervals",
    "rollbacks": "of the run's guard to a checkpoint (✕ in the chart)",
    "wall time": "of the attempts that led to the recorded steps",
}

STYLE = """
:root { color-scheme: light dark; %(light)s }
@media (prefers-color-scheme: dark) { :root { %(dark)s } }
body { margin: 0 auto; padding: 1.5rem; max-width: 75rem; background: var(--page);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.3rem; font-weight: 600; margin: 0 0 1rem; }
figure { margin: 0; position: relative; }
figure svg { width: 100%%; height: auto; display: block; }
#readout { position: absolute; pointer-events: none; display: none; padding: .4rem .6rem;
  background: var(--page); border: 1px solid var(--grid); border-radius: 4px;
  font-size: .8rem; font-variant-numeric: tabular-nums; white-space: pre; }
.scroll { overflow-x: auto; margin-top: 1.5rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--grid); }
td, thead th { text-align: right; white-space: nowrap; }
th { font-weight: 600; text-align: left; }
tbody th { font-weight: 400; white-space: nowrap; }
td.meaning { color: var(--muted); text-align: left; white-space: normal; min-width: 14rem; }
.swatch { display: inline-block; width: 1.2em; height: .2em; margin-right: .4em;
  vertical-align: middle; }
footer { margin-top: 1.5rem; color: var(--muted); font-size: .85rem; }
"""

SCRIPT = """
const { unit, panels, runs } = JSON.parse(document.getElementById("cursor").textContent);
const svg = document.querySelector("figure svg");
const readout = document.getElementById("readout");
const lines = panels.map((p) => {
  const line = document.createElementNS(svg.namespaceURI, "line");
  line.setAttribute("y1", p.top); line.setAttribute("y2", p.bottom);
  line.style.cssText = "stroke: var(--muted); stroke-width: .7; visibility: hidden";
  return svg.appendChild(line);
});
function hide() {
  readout.style.display = "none";
  lines.forEach((line) => { line.style.visibility = "hidden"; });
}
function nearest(xs, x) {
  let low = 0, high = xs.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (xs[middle] < x) low = middle; else high = middle;
  }
  return x - xs[low] < xs[high] - x ? low : high;
}
svg.addEventListener("pointerleave", hide);
svg.addEventListener("pointermove", (event) => {
  const toSvg = svg.getScreenCTM().inverse();
  const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(toSvg);
  const panel = panels.find(
    (p) => at.x >= p.left && at.x <= p.right && at.y >= p.top && at.y <= p.bottom);
  if (!panel) { hide(); return; }
  const share = (at.x - panel.left) / (panel.right - panel.left);
  const x = panel.xmin + share * (panel.xmax - panel.xmin);
  lines.forEach((line, i) => {
    const place = panels[i].left + share * (panels[i].right - panels[i].left);
    line.setAttribute("x1", place); line.setAttribute("x2", place);
    line.style.visibility = "visible";
  });
  const texts = runs.filter((run) => x >= run.x[0] && x <= run.x[run.x.length - 1]).map((run) => {
    const i = nearest(run.x, x);
    const loss = run.loss[i] === null ? "–" : run.loss[i].toFixed(3);
    return `loss ${loss}  λ ${run.lambda[i].toFixed(2)}  ${run.name}`;
  });
  readout.textContent = [`${Math.round(x).toLocaleString("en")} ${unit}`, ...texts].join("\\n");
  readout.style.display = "block";
  const box = svg.parentElement.getBoundingClientRect();
  const left = event.clientX - box.left, width = readout.offsetWidth;
  readout.style.left = `${left + 16 + width > box.width ? left - 16 - width : left + 16}px`;
  readout.style.top = `${event.clientY - box.top + 12}px`;
});
"""


def render_page(chart: draw.Chart, summaries: Sequence[Summary]) -> str:
    """The whole page as text. Nothing in it is loaded from elsewhere."""
    title = escape("bitscale report: " + ", ".join(curve.run.name for curve in chart.curves))
    cursor = {
        "unit": chart.x,
        "panels": list(draw.panel_boxes(chart)),
        "runs": [_cursor_curve(curve) for curve in chart.curves],
    }
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8"/>
<meta name="viewport" content="width=device-width, initial-scale=1"/>
<title>{title}</title>
<style>{_style_sheet()}</style>
</head>
<body>
<h1>{title}</h1>
<figure>
{_inline_svg(chart)}
<div id="readout"></div>
</figure>
{_table(summaries)}
<footer>Dashed vertical lines: the transition. The same figures, unrounded: summary.json.</footer>
<script type="application/json" id="cursor">{_script_json(cursor)}</script>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _variables() -> dict[str, str]:
    """Colour of the drawing to name of its CSS variable."""
    names = {color: f"series-{i}" for i, color in enumerate(draw.SERIES)}
    return names | {
        draw.INK: "ink",
        draw.MUTED: "muted",
        draw.GRID: "grid",
        PAGE_LIGHT: "page",
    }


def _style_sheet() -> str:
    light = " ".join(f"--{name}: {color};" for color, name in _variables().items())
    dark = " ".join(f"--{name}: {DARK[color]};" for color, name in _variables().items())
    return STYLE % {"light": light, "dark": dark}


def _inline_svg(chart: draw.Chart) -> str:
    """The chart as an HTML element: no XML prologue or namespaces, colours as CSS variables."""
    buffer = io.BytesIO()
    draw.save(chart, buffer, "svg")
    svg = buffer.getvalue().decode()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = svg.replace("xlink:href=", "href=")
    svg = svg.replace("<svg", '<svg role="img" aria-label="Training curves"', 1)
    for color, name in _variables().items():
        svg = re.sub(rf"(stroke|fill): {color}", rf"\1: var(--{name})", svg)
    return svg


def _cursor_curve(curve: draw.Curve) -> dict[str, Any]:
    rows = np.unique(np.linspace(0, len(curve.x) - 1, CURSOR_POINTS).astype(int))
    loss = curve.smooth_loss[rows]
    return {
        "name": curve.run.name,
        "x": curve.x[rows].tolist(),
        "loss": [round(v, 4) if math.isfinite(v) else None for v in loss.tolist()],
        "lambda": curve.run.train["lambda_weight"][rows].round(4).tolist(),
    }


def _script_json(value: object) -> str:
    # "<" could end the script element inside a run's name.
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c")


def _table(summaries: Sequence[Summary]) -> str:
    """A column a run, a row a figure; figures that no run has are left out."""
    columns = [display(summary) for summary in summaries]
    head = "".join(
        f'<th scope="col"><span class="swatch" style="background: var(--series-'
        f'{i % len(draw.SERIES)})"></span>{escape(summary.name)}</th>'
        for i, summary in enumerate(summaries)
    )
    rows = []
    for label in columns[0]:
        cells = [column[label] for column in columns]
        if all(cell == UNKNOWN for cell in cells):
            continue
        shown = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        meaning = escape(MEANING.get(label, ""))
        rows.append(
            f'<tr><th scope="row">{label}</th>{shown}<td class="meaning">{meaning}</td></tr>'
        )
    return (
        f'<div class="scroll"><table><thead><tr><th></th>{head}<th></th></tr></thead>\n<tbody>'
        + "\n".join(rows)
        + "</tbody></table></div>"
    )
