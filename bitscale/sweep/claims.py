"""The page of claims: written from the results, never by hand."""

import os
from collections.abc import Sequence
from pathlib import Path

from bitscale.fit.paired import MIN_SEEDS
from bitscale.fit.table import Row
from bitscale.recorder import format_count, format_duration
from bitscale.sweep.campaign import Campaign
from bitscale.sweep.results import write_csv
from bitscale.sweep.verdict import Judgement

_RULES = f"""\
## Rules

Each sweep file states its claims, with the predicted direction and the margin that would matter,
before its cells are trained. A figure is the mean over seeds of a paired difference, with
Student's 95% interval (for a best point: the point of the lowest mean loss, and the range that it
takes in 2,000 resamplings of the seeds, half-way to the neighbouring points). Nothing is corrected
for the number of claims: of those on a sign, 1 in 20 is called confirmed or contradicted where
there is no effect at all.

- **confirmed**: the interval lies on the predicted side of 0 (for *no difference*: within the
  margin; for a best point: within the predicted range).
- **contradicted**: it lies on the other side (beyond the margin; outside the range).
- **not seen**: it holds 0 and stays within the margin: an effect that matters would have shown.
- **underpowered**: it holds 0 and reaches beyond the margin (for *no difference* and *at most*: it
  crosses the margin; for a best point: an end of the range), or fewer than {MIN_SEEDS} seeds have
  finished, or a cell diverged: the seeds in which it did not are no fair sample.
"""


def write_claims(
    path: Path,
    campaign: Campaign,
    rows: Sequence[Row],
    judgements: Sequence[Judgement],
    figures: Path,
) -> None:
    """Write the page to `path`, with relative links to the figures, and its table beside it."""
    lines = ["# The claims of the seeds", "", *_head(campaign, rows), ""]
    lines += ["| claim | source | predicted | our figure | seeds | tokens | verdict |"]
    lines += ["|---|---|---|---|---|---|---|"]
    lines += [_line(judgement) for judgement in judgements]
    lines += ["", _RULES, *_size(rows), ""]
    for sweep in campaign.sweeps:
        lines += [f"## {sweep.spec.title or sweep.name}", ""]
        lines += [f"`{sweep.path}`. {_counts(sweep.name, rows)}", ""]
        lines += [f"- {j.sentence}" for j in judgements if j.sweep == sweep.name]
        figure = os.path.relpath(figures / f"{sweep.name}.svg", path.parent)
        lines += ["", f"![{sweep.name}]({figure})", ""]
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.partial")
    staging.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    staging.replace(path)
    write_csv(rows, path.with_suffix(".csv"))


def _head(campaign: Campaign, rows: Sequence[Row]) -> list[str]:
    done = [row for row in rows if row["valid_loss"]]
    commits = sorted({row["commit"] for row in done if row["commit"]})
    versions = sorted({row["versions"] for row in done if row["versions"]})
    days = sorted({row["sweep_started"][:10] for row in done if row["sweep_started"]})
    unique = {row["hash"]: row["train_seconds"] or 0 for row in done}
    seeds = ", ".join(map(str, sorted({row["seed"] for row in rows})))
    over = f", `{campaign.over}` over every base" if campaign.over else ""
    return [
        f"Written by `bitscale sweep ... --report --claims` from {len(done)} finished cells of "
        f"{len(rows)} ({len(unique)} runs, {format_duration(sum(unique.values()))} of training "
        f"steps), seeds {seeds}{over}; {', '.join(days) or 'nothing yet'}; "
        f"commit {', '.join(commits) or '?'}; {'; '.join(versions)}."
    ]


def _size(rows: Sequence[Row]) -> list[str]:
    smallest, largest = (format_count(f(row["parameters"] for row in rows)) for f in (min, max))
    return [
        f"These are models of {smallest} to {largest} parameters: the table says whether an effect",
        "exists at this size, not how large it is at another.",
    ]


def _line(judgement: Judgement) -> str:
    claim = judgement.claim
    if not isinstance(claim.predicted, str):
        predicted, unit = "{} to {}".format(*claim.predicted), claim.of
    else:
        signs = {
            "negative": "below 0",
            "positive": "above 0",
            "zero": f"within ±{claim.margin:g}",
            "at_most": f"at most {claim.margin:g}",
        }
        predicted, unit = signs[claim.predicted], claim.measure
    figure = f"{unit} {judgement.interval}" if judgement.seeds else "no data"
    tokens = ", ".join(format_count(count) for count in judgement.tokens)
    fields = (
        claim.text,
        claim.source,
        predicted,
        figure,
        str(len(judgement.seeds)),
        tokens,
        f"**{judgement.verdict}**" + (f" ({judgement.note})" if judgement.note else ""),
    )
    return f"| {' | '.join(field.replace('|', '/') for field in fields)} |"


def _counts(name: str, rows: Sequence[Row]) -> str:
    mine = [row for row in rows if row["sweep"] == name]
    parameters = sorted({row["parameters"] for row in mine})
    sizes = ", ".join(format_count(count) for count in parameters)
    share = min(row["ternary_parameters"] / row["parameters"] for row in mine)
    finished = sum(row["valid_loss"] is not None for row in mine)
    diverged = sum(row["status"] == "diverged" for row in mine)
    text = (
        f"{sizes} parameters, {share:.0%} of them or more in ternary layers; "
        f"{finished} of {len(mine)} cells finished"
    )
    return f"{text}, {diverged} diverged." if diverged else f"{text}."
