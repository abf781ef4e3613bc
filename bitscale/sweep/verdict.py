"""What the finished cells say about the claims of a sweep, by rules fixed beforehand."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from bitscale.errors import ConfigError
from bitscale.fit.paired import (  # fmt: skip
    Interval,
    Verdict,
    best_interval,
    judge_range,
    judge_sign,
    mean_interval,
)
from bitscale.fit.table import Row, number
from bitscale.sweep.results import FIGURES
from bitscale.sweep.spec import Claim, Sweep
from bitscale.sweep.store import DIVERGED, FINISHED


class Judgement(NamedTuple):
    """A claim with its figure."""

    sweep: str
    claim: Claim
    interval: Interval
    seeds: tuple[int, ...]  # that entered
    tokens: tuple[int, ...]  # budgets of the runs compared
    verdict: Verdict
    note: str = ""  # what the figure does not say

    @property
    def sentence(self) -> str:
        unit = f" {self.claim.of}" if self.claim.best else f" {self.claim.measure}"
        note = f"; {self.note}" if self.note else ""
        if not self.seeds:
            return f"{self.claim.text}: underpowered (no seed has all its cells{note})."
        return (
            f"{self.claim.text}: {self.verdict} ({self.interval}{unit}, "
            f"{len(self.seeds)} seeds, 95%{note})."
        )


def judge(sweep: Sweep, rows: Sequence[Row]) -> list[Judgement]:
    """Every claim of `sweep` by the rows of its finished cells.

    A diverged cell has no loss to enter a mean. Seeds in which it did not diverge are no fair
    sample, so that a claim with such a cell is underpowered.
    """
    mine = [row for row in rows if row["sweep"] == sweep.name]
    return [_judged(sweep.name, claim, mine) for claim in sweep.spec.claims]


def _judged(name: str, claim: Claim, rows: Sequence[Row]) -> Judgement:
    labels = tuple(claim.contrast) or claim.best
    found = _judge(name, claim, [row for row in rows if row["status"] == FINISHED])
    lost = sorted(
        {row["seed"] for row in rows if row["label"] in labels and row["status"] == DIVERGED}
    )
    if lost:
        which = ", ".join(map(str, lost))
        return found._replace(verdict="underpowered", note=f"a cell diverged with seed {which}")
    return found


def _judge(name: str, claim: Claim, rows: Sequence[Row]) -> Judgement:
    labels = tuple(claim.contrast) or claim.best
    found = {(row["label"], row["seed"]): row for row in rows if row["label"] in labels}
    if claim.measure not in FIGURES:
        raise ConfigError(
            f"claim {claim.id!r}: {claim.measure!r} is no measure; use one of {', '.join(FIGURES)}"
        )
    values = {key: number(row.get(claim.measure)) for key, row in found.items()}
    seeds = sorted({seed for _, seed in found})
    whole = [
        seed
        for seed in seeds
        if all(math.isfinite(values.get((label, seed), math.nan)) for label in labels)
    ]
    tokens = tuple(sorted({row["tokens"] for row in found.values()}))
    note = ""
    if claim.best:
        interval = _best(claim, found, values, whole)
        verdict = judge_range(interval, claim.predicted)  # type: ignore[arg-type]
        tried = [number(row.get(claim.of)) for row in found.values()]
        if whole and _is_outermost(interval.value, tried):
            note = "the outermost point that was run: the best may lie beyond"
    else:
        sums = [sum(w * values[label, s] for label, w in claim.contrast.items()) for s in whole]
        interval = mean_interval(sums)
        verdict = judge_sign(interval, str(claim.predicted), claim.margin)
    return Judgement(name, claim, interval, tuple(whole), tokens, verdict, note)


def _is_outermost(value: float, tried: Sequence[float]) -> bool:
    """Whether something could lie beyond `value`: nothing is beyond 0, a share of nothing."""
    return value != 0 and value in (min(tried), max(tried))


def _best(
    claim: Claim,
    found: dict[tuple[str, int], Row],
    values: dict[tuple[str, int], float],
    seeds: list[int],
) -> Interval:
    if not seeds:
        return Interval(math.nan, -math.inf, math.inf, 0)
    losses = np.array([[values[label, seed] for seed in seeds] for label in claim.best])
    positions = [number(found[label, seeds[0]].get(claim.of)) for label in claim.best]
    if not all(map(math.isfinite, positions)):
        raise ConfigError(
            f"claim {claim.id!r}: {claim.of!r} is no number in every cell of `best`; use a column "
            "of RESULTS that is"
        )
    return best_interval(losses, positions)
