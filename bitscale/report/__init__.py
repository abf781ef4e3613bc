"""Reports: what happened in one or several runs, as a chart, a page and figures.

`write_report` is the whole of it: read.py (runs as arrays) -> spike.py and summary.py (figures)
-> draw.py (chart) -> page.py (HTML). docs/report.md defines the figures.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from bitscale.errors import DataError
from bitscale.recorder import METRICS_NAME
from bitscale.report.draw import draw_runs, save
from bitscale.report.page import render_page
from bitscale.report.read import read_runs
from bitscale.report.summary import Summary, console_table, summarize

__all__ = ["console_table", "default_out_dir", "write_report"]


def default_out_dir(run_paths: Sequence[Path]) -> Path:
    """`report` inside the run for one run, `report` in the current directory for several."""
    first = run_paths[0]
    if len(run_paths) > 1:
        return Path("report")
    return (first.parent if first.name == METRICS_NAME else first) / "report"


def write_report(
    run_paths: Sequence[Path],
    out_dir: Path,
    *,
    names: Sequence[str] | None = None,
    x: str = "tokens",
    smooth: int | None = None,
) -> list[Summary]:
    """Write report.png, report.html and summary.json of the runs to `out_dir`.

    `x` is "tokens" or "steps"; `smooth` the steps that the thick loss line averages over (None:
    1% of each run). Raises DataError for a missing, empty or malformed run and a bad argument.
    """
    if smooth is not None and smooth < 1:
        raise DataError(f"--smooth {smooth} is no number of steps; give 1 (raw) or more")
    runs = read_runs(run_paths, names)
    summaries = [summarize(run) for run in runs]
    chart = draw_runs(runs, x=x, smooth=smooth)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot make {out_dir}: {error.strerror}; choose another --out") from None
    save(chart, out_dir / "report.png", "png")
    (out_dir / "report.html").write_text(render_page(chart, summaries), encoding="utf-8")
    figures = {"runs": [summary._asdict() for summary in summaries]}
    (out_dir / "summary.json").write_text(
        json.dumps(figures, indent=2, allow_nan=False) + "\n", encoding="utf-8"
    )
    return summaries
