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
from bitscale.sweep.store import FINISHED


class Judgement(NamedTuple):
    """A claim with its figure."""

    sweep: str
    claim: Claim
    interval: Interval
    seeds: tuple[int, ...]  # that entered
    tokens: tuple[int, ...]  # budgets of the runs compared
    verdict: Verdict

    @property
    def sentence(self) -> str:
        unit = f" {self.claim.of}" if self.claim.best else f" {self.claim.measure}"
        if not self.seeds:
            return f"{self.claim.text}: underpowered (no seed has all its cells)."
        return (
            f"{self.claim.text}: {self.verdict} ({self.interval}{unit}, "
            f"{len(self.seeds)} seeds, 95%)."
        )


def judge(sweep: Sweep, rows: Sequence[Row]) -> list[Judgement]:
    """Every claim of `sweep` by the rows of its finished cells. Diverged cells enter no mean."""
    mine = [row for row in rows if row["sweep"] == sweep.name and row["status"] == FINISHED]
    return [_judge(sweep.name, claim, mine) for claim in sweep.spec.claims]


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
    if claim.best:
        interval = _best(claim, found, values, whole)
        verdict = judge_range(interval, claim.predicted)  # type: ignore[arg-type]
    else:
        sums = [sum(w * values[label, s] for label, w in claim.contrast.items()) for s in whole]
        interval = mean_interval(sums)
        verdict = judge_sign(interval, str(claim.predicted), claim.margin)
    return Judgement(name, claim, interval, tuple(whole), tokens, verdict)


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
