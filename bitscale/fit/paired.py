"""Paired comparisons over seeds, and what may be concluded from an interval."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Verdict = Literal["confirmed", "contradicted", "not seen", "underpowered"]
MIN_SEEDS = 5  # below, there is no verdict


class Interval(NamedTuple):
    """A mean (or another estimate) with its 95% confidence interval."""

    value: float
    low: float
    high: float
    num_seeds: int

    def __str__(self) -> str:
        return f"{self.value:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Student's t interval of the mean; infinitely wide for fewer than two values."""
    from scipy import stats

    sample = np.asarray(values, dtype=np.float64)
    if len(sample) < 2:
        value = float(sample[0]) if len(sample) else math.nan
        return Interval(value, -math.inf, math.inf, len(sample))
    error = float(sample.std(ddof=1)) / math.sqrt(len(sample))
    reach = float(stats.t.ppf(0.5 + confidence / 2, len(sample) - 1)) * error
    mean = float(sample.mean())
    return Interval(mean, mean - reach, mean + reach, len(sample))


def judge_sign(interval: Interval, predicted: str, margin: float) -> Verdict:
    """Whether a difference has the predicted sign.

    confirmed: the interval lies on the predicted side of 0 (zero: within ±margin; at_most: below
    the margin); contradicted: on the other side (zero, at_most: wholly beyond the margin); not
    seen: it holds 0 and is within ±margin, so that an effect that matters would have shown; else
    underpowered.
    """
    if interval.num_seeds < MIN_SEEDS or not math.isfinite(interval.low):
        return "underpowered"
    if predicted == "zero":
        if -margin <= interval.low and interval.high <= margin:
            return "confirmed"
        beyond = interval.low > margin or interval.high < -margin
        return "contradicted" if beyond else "underpowered"
    if predicted == "at_most":
        if interval.high <= margin:
            return "confirmed"
        return "contradicted" if interval.low > margin else "underpowered"
    sign = 1.0 if predicted == "positive" else -1.0
    low, high = sorted((sign * interval.low, sign * interval.high))
    if low > 0:
        return "confirmed"
    if high < 0:
        return "contradicted"
    return "not seen" if max(-low, high) <= margin else "underpowered"


def judge_range(interval: Interval, predicted: tuple[float, float]) -> Verdict:
    """Whether a best point lies in the predicted range: its interval within, outside, or across."""
    low, high = predicted
    if interval.num_seeds < MIN_SEEDS:
        return "underpowered"
    if low <= interval.low and interval.high <= high:
        return "confirmed"
    if interval.high < low or interval.low > high:
        return "contradicted"
    return "underpowered"


def best_interval(
    losses_PS: NDArray[np.float64], positions_P: Sequence[float], *, resamples: int = 2000
) -> Interval:
    """The position whose mean loss is lowest, with a percentile bootstrap interval over seeds.

    The interval reaches half-way to the neighbouring positions, as nothing was run between.
    P positions, S seeds. The resampling is seeded: the same losses give the same interval.
    """
    count = losses_PS.shape[1]
    where = np.asarray(positions_P, dtype=np.float64)
    best = float(where[losses_PS.mean(axis=1).argmin()])
    draw = np.random.default_rng(0).integers(0, count, size=(resamples, count))
    found = where[losses_PS[:, draw].mean(axis=2).argmin(axis=0)]
    low, high = np.quantile(found, [0.025, 0.975], method="nearest")
    below, above = where[where < low], where[where > high]
    return Interval(
        best,
        float((low + below.max()) / 2) if len(below) else float(low),
        float((high + above.min()) / 2) if len(above) else float(high),
        count,
    )
