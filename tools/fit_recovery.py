"""How well `bitscale fit` finds planted values again: writes docs/results/fit-recovery.md.

    python tools/fit_recovery.py [--tables 30] [--resamples 100]      (some 10 minutes of one core)

For each law, tables of losses with known values and noise: how far the estimate lies from the
planted value, and in how many tables the 95% interval holds it.
"""

import argparse
import datetime
import importlib.metadata
import math
import platform
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from bitscale.fit.estimate import fit_law
from bitscale.fit.laws import LAWS, Floats, Law
from bitscale.fit.qat_fraction import fit_fraction

SIZES, BUDGETS = (2e5, 5e5, 1e6, 2e6, 5e6), (2e6, 5e6, 1e7, 3e7, 1e8)
_CHINCHILLA = {"E": 1.7, "A": 400.0, "B": 410.0, "alpha": 0.42, "beta": 0.38}
PLANTED: dict[str, dict[str, float]] = {
    "chinchilla": _CHINCHILLA,
    "precision": {**_CHINCHILLA, "gamma": 1.5},
    "floating-point": {**_CHINCHILLA, "k": 0.8, "delta": 2.0, "nu": 1.5},
    "qid": {"k": 0.2, "alpha": 0.25, "beta": 0.5, "gamma": 3.0},
    "qat-loss": {
        "E": 2.0,
        "B": 100.0,
        "beta": 0.4,
        "phi": 0.5,
        "omega": 0.8,
        "lambda": 0.9,
        "xi": 0.5,
        "rho": 0.4,
    },
}
NOISE = 0.003  # of ln(loss), or of the loss in nats
PLANTED_A = 4.0  # of qat-fraction


def grid(law: str) -> dict[str, Floats]:
    """Regressors of a full factorial design."""
    axes: dict[str, tuple[float, ...]] = {"parameters": SIZES, "tokens": BUDGETS}
    if law in ("precision", "qid"):
        axes["weight_bits"] = (math.log2(3), 4.0, 16.0) if law == "precision" else (2.0, 3.0, 4.0)
    if law == "floating-point":
        axes |= {"exponent_bits": (1.0, 4.0), "mantissa_bits": (1.0, 3.0), "block_size": (32, 128)}
    if law == "qat-loss":
        axes = {"tokens": BUDGETS, "share": (0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.95)}
    points = np.array(np.meshgrid(*axes.values(), indexing="ij")).reshape(len(axes), -1)
    columns = dict(zip(axes, points, strict=True))
    if "share" in columns:
        share = columns.pop("share")
        s = columns["tokens"] / (2e5 * 1.585 / 8)
        columns |= {"s_qat": share * s, "s_fp": (1 - share) * s}
    return columns


def noisy(law: Law, columns: Mapping[str, Floats], noise: float, seed: int) -> Floats:
    losses = law.predict(columns, PLANTED[law.name])
    draws = noise * np.random.default_rng(seed).standard_normal(len(losses))
    return losses * np.exp(draws) if law.logarithmic else losses + draws


def fraction_table(a: float, noise: float, seed: int, num_seeds: int = 6) -> dict[str, Floats]:
    """Three budgets, five fractions; seeds shift all their losses by .02."""
    draw = np.random.default_rng(seed)
    design = [(s, f, n) for s in (25.0, 100.0, 400.0) for f in (0.1, 0.2, 0.4, 0.6, 0.8)
              for n in range(num_seeds)]  # fmt: skip
    s, fraction, seeds = np.array(design).T
    shift = 0.02 * draw.standard_normal(num_seeds)
    loss = 3 - 0.1 * np.log(s) + 0.06 * (np.log(fraction) + a / np.log(s)) ** 2
    loss = loss + noise * draw.standard_normal(len(s)) + shift[seeds.astype(int)]
    return {"s": s, "fraction": fraction, "loss": loss, "seeds": seeds.astype(int)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tables", type=int, default=30)
    parser.add_argument("--resamples", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("docs/results/fit-recovery.md"))
    args = parser.parse_args()
    lines = []
    for name in PLANTED:
        lines += recover(name, args.tables, args.resamples)
        print("\n".join(lines[-len(PLANTED[name]) :]), flush=True)
    lines += recover_fraction(args.tables, args.resamples)
    args.out.write_text(page(lines, args.tables, args.resamples), encoding="utf-8")
    print(f"wrote {args.out}")


def recover(name: str, tables: int, resamples: int) -> list[str]:
    law, columns = LAWS[name], grid(name)
    fits = [
        fit_law(law, columns, noisy(law, columns, NOISE, seed), resamples=resamples).values
        for seed in range(tables)
    ]
    rows = len(next(iter(columns.values())))
    return [
        _row(name, rows, key, planted, [fit[key] for fit in fits])
        for key, planted in PLANTED[name].items()
    ]


def recover_fraction(tables: int, resamples: int) -> list[str]:
    fits = [
        fit_fraction(**fraction_table(PLANTED_A, NOISE, seed), resamples=resamples)
        for seed in range(tables)
    ]
    return [_row("qat-fraction", 90, "a", PLANTED_A, [fit.a for fit in fits])]


def _row(law: str, rows: int, key: str, planted: float, found: list) -> str:
    values = np.array([estimate.value for estimate in found])
    held = sum(estimate.low <= planted <= estimate.high for estimate in found)
    low, high = np.quantile(values, [0.1, 0.9])
    fields = (
        law,
        rows,
        key,
        f"{planted:g}",
        f"{np.median(values):.3g}",
        f"{low:.3g} to {high:.3g}",
        f"{held} of {len(found)}",
    )
    return f"| {' | '.join(map(str, fields))} |"


def page(lines: list[str], tables: int, resamples: int) -> str:
    versions = ", ".join(f"{n} {importlib.metadata.version(n)}" for n in ("numpy", "scipy"))
    date = datetime.datetime.now(tz=datetime.UTC).date()
    head = f"""\
# Planted values, found again

Written by `python tools/fit_recovery.py --tables {tables} --resamples {resamples}`:
{date}, {platform.machine()}, python {platform.python_version()}, {versions}.

{tables} tables of losses for each law, made from the values below with Gaussian noise of
{NOISE:.1%} of the loss (qid, qat-fraction: {NOISE} nats), fitted as `bitscale fit` does. A 95%
interval should hold the planted value in {0.95 * tables:.1f} of them; values of one law go
together, as they are estimated from one table. Designs are full grids (the tool has them); a real
table is rarely so well spread.

| law | rows | value | planted | median | middle 80% of the estimates | held by the interval |
|---|---|---|---|---|---|---|
"""
    return head + "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
