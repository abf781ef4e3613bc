"""`bitscale fit`: laws on a table of results, as JSON and as figures of fit and residuals."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bitscale.errors import DataError
from bitscale.fit import qat_fraction
from bitscale.fit.draw import Points, draw_fit
from bitscale.fit.estimate import Goodness, fit_law, goodness_of
from bitscale.fit.laws import LAWS, PRECISION, Floats, Law, effective_share
from bitscale.fit.paired import MIN_SEEDS, mean_interval
from bitscale.fit.table import Row, columns_of, number, read_table

ALL = (*LAWS, "qat-fraction", "capacity")
MIN_RESAMPLES = 20
_TERNARY_BITS = 2.0  # fewer bits than this count as ternary
_CAPACITY = "L(ternary, 2 w) = L(16 bit, w), equal tokens; their difference by seed, Student's t"


class Report(NamedTuple):
    """One law on one table."""

    law: str
    tree: dict[str, Any]  # JSON types
    points: Points | None  # for the figure


def fit_table(
    path: Path,
    law: str,
    *,
    sweeps: Sequence[str] = (),
    where: Sequence[tuple[str, str]] = (),
    resamples: int = 400,
) -> Report:
    """Fit `law` (a name of `ALL`) to the finished rows of the table at `path`.

    Of these only rows of `sweeps` (if any are named) whose columns are as `where` says, as text.

    Raises DataError for an unknown law and for rows that do not suffice.
    """
    if law not in ALL:
        raise DataError(f"--law {law!r} is unknown; use one of {', '.join(ALL)}")
    if resamples < MIN_RESAMPLES:
        raise DataError(
            f"--resamples {resamples} make no interval; give at least {MIN_RESAMPLES}, better 400"
        )
    rows = [row for row in read_table(path) if not sweeps or row.get("sweep") in sweeps]
    for name, text in where:
        rows = [row for row in rows if str(row.get(name)) == text]
    rows = _finished(rows)
    if not rows:
        raise DataError(f"{path} has no finished row that was asked for")
    if law == "capacity":
        return _capacity(rows, resamples)
    if law == "qat-fraction":
        return _fraction(rows, resamples)
    return _parametric(LAWS[law], rows, resamples)


def _finished(rows: Sequence[Row]) -> list[Row]:
    """Finished runs, each once, whichever sweeps it is in. A table without status counts whole."""
    chosen: dict[Any, Row] = {}
    for place, row in enumerate(rows):
        if row.get("status", "finished") == "finished":
            chosen.setdefault(row.get("hash", place), row)
    return list(chosen.values())


def _parametric(law: Law, rows: Sequence[Row], resamples: int) -> Report:
    if law.name in ("chinchilla", "precision"):  # a transition on the way is another variable
        rows = [row for row in rows if number(row.get("qat_fraction", 0.0)) in (0.0, 1.0)]
    if law.name == "chinchilla":
        rows = [row for row in rows if number(row.get("weight_bits", 16.0)) >= 16]
    if law.name == "qid" and not any("qid" in row for row in rows):
        rows = _with_qid(rows)
    if law.name == "qat-loss":
        rows = _with_phases(rows)
    kept, columns = columns_of(rows, [*law.columns, law.response])
    observed = columns.pop(law.response)
    _check_distinct(law.name, kept, columns)
    fit = fit_law(law, columns, observed, _seeds(kept), resamples=resamples)
    tree: dict[str, Any] = {
        "law": law.name,
        "formula": law.formula,
        "source": law.source,
        "assumed": law.assumed,
        "rows": fit.num_rows,
        "values": {name: value._asdict() for name, value in fit.values.items()},
        "goodness": _plain(fit.goodness),
        "bootstrap": fit.bootstrap,
    }
    if law is PRECISION:
        share = [float(effective_share(np.array(1.585), v["gamma"])) for v in fit.resamples]
        low, high = np.quantile(share, [0.025, 0.975])
        value = float(effective_share(np.array(1.585), fit.values["gamma"].value))
        tree["effective_parameters_of_ternary"] = {"value": value, "low": low, "high": high}
    return Report(law.name, tree, Points(fit.predicted, observed, law.response, law.formula))


def _seeds(rows: Sequence[Row]) -> list[int] | None:
    seeds = [number(row.get("seed")) for row in rows]
    return [int(seed) for seed in seeds] if all(map(math.isfinite, seeds)) else None


def _with_qid(rows: Sequence[Row]) -> list[Row]:
    """Ternary from the first step, less 16 bit, of equal parameters, tokens and seed."""
    twins: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        if number(row.get("weight_bits")) >= 16:
            twins.setdefault(_pair(row), []).append(number(row.get("valid_loss")))
    found = []
    for row in rows:
        partner = twins.get(_pair(row), [])
        if number(row.get("qat_fraction")) == 1.0 and len(partner) == 1:
            found.append({**row, "qid": number(row.get("valid_loss")) - partner[0]})
    if not found:
        raise DataError(
            "law 'qid' needs ternary runs with a 16-bit run of the same parameters, tokens and "
            "seed; run a sweep with both, such as configs/sweeps/width-doubling.yaml"
        )
    return found


def _pair(row: Row) -> tuple[Any, ...]:
    keys = ("parameters", "tokens", "seed", "optim.lr", "optim.weight_decay", "model.sub_norm")
    return tuple(row.get(key) for key in keys)


def _with_phases(rows: Sequence[Row]) -> list[Row]:
    """Rows with both phases, and the tokens of each per parameter-byte."""
    found = []
    for row in rows:
        share, bits = number(row.get("qat_fraction")), number(row.get("weight_bits"))
        if 0 < share < 1:
            s = qat_fraction.tokens_per_parameter_byte(row["parameters"], row["tokens"], bits)
            found.append({**row, "s_qat": share * s, "s_fp": (1 - share) * s})
    sizes = {row["parameters"] for row in found}
    if len(sizes) != 1:
        raise DataError(
            f"law 'qat-loss' is for one model size, the table has {len(sizes)} with a transition "
            "on the way; run configs/sweeps/qat-fraction.yaml into a directory of its own"
        )
    return found


def _fraction(rows: Sequence[Row], resamples: int) -> Report:
    names = ["parameters", "tokens", "weight_bits", "qat_fraction", "valid_loss"]
    kept, columns = columns_of(rows, names)
    inside = (columns["qat_fraction"] > 0) & (columns["qat_fraction"] < 1)
    kept = [row for row, keep in zip(kept, inside, strict=True) if keep]
    columns = {name: column[inside] for name, column in columns.items()}
    s = columns["tokens"] / (columns["parameters"] * columns["weight_bits"] / 8)
    # Budgets that differ by the rounding of steps only are one.
    s = np.array([float(f"{x:.2g}") for x in s])
    _check_distinct("qat-fraction", kept, {"s": s, "fraction": columns["qat_fraction"]})
    seeds = _seeds(kept) or list(range(len(kept)))
    fit = qat_fraction.fit_fraction(
        s, columns["qat_fraction"], columns["valid_loss"], seeds, resamples=resamples
    )
    outside = qat_fraction.beyond_what_was_run(s, columns["qat_fraction"], fit.a.value)
    tree: dict[str, Any] = {
        "law": "qat-fraction",
        "formula": qat_fraction.FORMULA,
        "source": qat_fraction.SOURCE,
        "assumed": "formula read in a summary of the paper; losses near the best fraction are a "
        "parabola in ln f with one curvature for all budgets (ours)",
        "rows": fit.num_rows,
        "values": {"a": fit.a._asdict(), "k": fit.curvature._asdict()},
        "paper_a": qat_fraction.PAPER_A,
        "budgets": [
            {
                "tokens_per_parameter_byte": s,
                "best_fraction": best._asdict(),
                "best_fraction_run": fit.observed_best[s],
                "best_fraction_by_the_paper": qat_fraction.best_fraction(s),
            }
            for s, best in fit.best.items()
        ],
        "range": {
            "parameters": _range(columns["parameters"]),
            "tokens_per_parameter_byte": _range(s),
            "fraction": _range(columns["qat_fraction"]),
        },
        "warnings": [
            f"at {budget:.3g} tokens per parameter-byte the best fraction lies outside the "
            f"fractions run, {low:.2f} to {high:.2f}: extrapolated"
            for budget, (low, high) in outside.items()
        ],
        "goodness": _plain(fit.goodness),
        "bootstrap": fit.bootstrap,
    }
    points = Points(fit.predicted, columns["valid_loss"], "valid_loss", qat_fraction.FORMULA)
    return Report("qat-fraction", tree, points)


def _check_distinct(law: str, rows: Sequence[Row], columns: Mapping[str, Floats]) -> None:
    """One row a point and seed: others would differ in something that the law does not know."""
    seeds = [row.get("seed") for row in rows]
    seen: dict[Any, Row] = {}
    for point in zip(seeds, *columns.values(), strict=True):
        row = rows[len(seen)]
        if point in seen and point[0] is not None:
            other = seen[point]
            raise DataError(
                f"law {law!r}: {_called(other)} and {_called(row)} are one point to it and differ "
                "in something else; choose rows with --sweep NAME or --where COLUMN=VALUE"
            )
        seen[point if point[0] is not None else len(seen)] = row


def _called(row: Row) -> str:
    return f"{row.get('sweep', 'row')}: {row.get('label', '')!r}, seed {row.get('seed')}"


def _range(values: Floats) -> list[float]:
    return [float(values.min()), float(values.max())]


def _capacity(rows: Sequence[Row], resamples: int) -> Report:
    """Ternary at twice the width beside 16 bit, paired by tokens and seed (arXiv:2407.09527).

    As a law without anything to fit: both have the same loss.
    """
    by_point: dict[tuple[bool, float, Any, Any], list[float]] = {}
    for row in rows:
        width, share = number(row.get("model.d_model")), number(row.get("qat_fraction"))
        if math.isfinite(width) and share in (0.0, 1.0):
            ternary = number(row.get("weight_bits")) < _TERNARY_BITS
            point = (ternary, width, row.get("tokens"), row.get("seed"))
            by_point.setdefault(point, []).append(number(row.get("valid_loss")))
    groups: dict[tuple[float, Any], list[tuple[float, float]]] = {}
    for (ternary, width, tokens, seed), losses in by_point.items():
        twin = by_point.get((True, 2 * width, tokens, seed), [])
        if not ternary and len(losses) == len(twin) == 1:
            groups.setdefault((width, tokens), []).append((losses[0], twin[0]))
    if not any(len(values) >= MIN_SEEDS for values in groups.values()):
        raise DataError(
            "law 'capacity' needs 16-bit runs and ternary runs of twice model.d_model, of equal "
            f"tokens and seed, {MIN_SEEDS} seeds or more; run configs/sweeps/width-doubling.yaml"
        )
    sixteen, ternary = np.array([pair for pairs in groups.values() for pair in pairs]).T
    tree = {
        "law": "capacity",
        "formula": _CAPACITY,
        "source": "arXiv:2407.09527 (b1.58 Reloaded)",
        "assumed": "",
        "rows": len(ternary),
        "pairs": [
            {"width": w, "tokens": tokens, **_difference([b - a for a, b in pairs], resamples)}
            for (w, tokens), pairs in sorted(groups.items())
        ],
        "goodness": _plain(goodness_of(ternary, ternary - sixteen, 0)),
        "bootstrap": f"seeds resampled, {resamples} times",
    }
    return Report("capacity", tree, Points(sixteen, ternary, "valid_loss", _CAPACITY))


def _difference(values: Sequence[float], resamples: int) -> dict[str, Any]:
    """The mean, by Student's t, and the ends of the percentile bootstrap's interval."""
    from scipy import stats

    t = mean_interval(values)
    if t.num_seeds < MIN_SEEDS:
        return {"difference": t._asdict(), "bootstrap": None}
    ends = stats.bootstrap(
        (values,), np.mean, n_resamples=resamples, method="percentile", rng=0
    ).confidence_interval
    return {"difference": t._asdict(), "bootstrap": [float(ends.low), float(ends.high)]}


def _plain(goodness: Goodness) -> dict[str, float | None]:
    return {k: v if math.isfinite(v) else None for k, v in goodness._asdict().items()}


def write_report(report: Report, directory: Path) -> list[Path]:
    """LAW.json and, for a law with predictions, LAW.svg. Returns their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / f"{report.law}.json"]
    paths[0].write_text(json.dumps(report.tree, indent=2) + "\n", encoding="utf-8")
    if report.points is not None:
        paths.append(directory / f"{report.law}.svg")
        draw_fit(report.points, paths[-1])
    return paths


def show(report: Report) -> list[str]:
    """The fit in lines for people."""
    tree = report.tree
    lines = [f"{tree['law']}: {tree['formula']}", f"  source: {tree['source']}"]
    if tree["assumed"]:
        lines.append(f"  assumed: {tree['assumed']}")
    for pair in tree.get("pairs", []):
        d, ends = pair["difference"], pair["bootstrap"]
        bootstrap = f"; bootstrap [{ends[0]:+.4f}, {ends[1]:+.4f}]" if ends else ""
        lines.append(
            f"  width {pair['width']:g}: {d['value']:+.4f} [{d['low']:+.4f}, {d['high']:+.4f}] "
            f"nats, {d['num_seeds']} seeds, {pair['tokens']:,} tokens{bootstrap}"
        )
    for name, value in tree.get("values", {}).items():
        lines.append(f"  {name} = {value['value']:.4g} [{value['low']:.4g}, {value['high']:.4g}]")
    for budget in tree.get("budgets", []):
        best = budget["best_fraction"]
        lines.append(
            f"  at {budget['tokens_per_parameter_byte']:.3g} tokens per parameter-byte: best QAT "
            f"fraction {best['value']:.2f} [{best['low']:.2f}, {best['high']:.2f}]; lowest mean "
            f"loss at {budget['best_fraction_run']:.2f}; the paper's law says "
            f"{budget['best_fraction_by_the_paper']:.2f}"
        )
    lines += [f"  WARNING: {warning}" for warning in tree.get("warnings", [])]
    share = tree.get("effective_parameters_of_ternary")
    if share:
        lines.append(
            f"  ternary parameters count as {share['value']:.2f} [{share['low']:.2f}, "
            f"{share['high']:.2f}] of 16-bit ones"
        )
    if "goodness" in tree:
        g = tree["goodness"]
        aicc = "-" if g["aicc"] is None else f"{g['aicc']:.1f}"
        lines.append(
            f"  {tree['rows']} rows, R2 {g['r_squared']:.4f}, residual sd {g['residual_sd']:.4f} "
            f"nats, AICc {aicc}; {tree['bootstrap']}"
        )
    return lines
