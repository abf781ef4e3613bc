"""Fitting a law: a robust fit from several starts, bootstrap intervals, goodness."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bitscale.errors import DataError
from bitscale.fit.laws import Columns, Floats, Law, Values

HUBER_DELTA = 1e-3  # of ln(loss), as in arXiv:2203.15556; of the first fit
_NUM_STARTS = 12
_FAR = 1e3
_LOG_BOUND = math.log(1e3)  # a scaled value beyond this factor of 1 means nothing


class Goodness(NamedTuple):
    """Of the predicted losses, in nats."""

    r_squared: float
    residual_sd: float
    aicc: float  # of Gaussian residuals; inf with too few rows


class Estimate(NamedTuple):
    """A fitted value with its 95% interval."""

    value: float
    low: float
    high: float


class Fit(NamedTuple):
    law: Law
    values: dict[str, Estimate]
    goodness: Goodness
    predicted: Floats
    residuals: Floats  # observed - predicted
    num_rows: int
    bootstrap: str  # how the intervals were made
    resamples: Sequence[Values]


def fit_law(
    law: Law,
    columns: Mapping[str, Floats],
    observed: Floats,
    seeds: Sequence[int] | None = None,
    *,
    resamples: int = 200,
) -> Fit:
    """Fit `law` to `observed`, with percentile bootstrap intervals of `resamples` refits.

    Args:
        seeds: of every row. With five seeds or more, each with the same points, whole seeds are
            resampled; otherwise residuals are.

    Deterministic. Raises DataError for fewer rows than free values + 2, for a regressor that does
    not vary, and for losses that are not above 0.
    """
    _check(law, columns, observed)
    means = {name: float(np.exp(np.log(columns[name]).mean())) for name in law.scaled}
    scaled = {name: columns[name] / means.get(name, 1.0) for name in law.columns}
    data = _Data(law, scaled, observed, HUBER_DELTA if law.logarithmic else 3 * HUBER_DELTA)
    best = min((_minimize(data, start) for start in _starts(law)), key=lambda fit: fit[1])[0]
    data = data._replace(delta=_delta(data, best))
    best = _minimize(data, best)[0]
    predicted = law.predict(scaled, _values(law, best))
    refits, how = _bootstrap(data, predicted, best, seeds, resamples)
    every = [law.unscale(_values(law, theta), means) for theta in refits]
    center = law.unscale(_values(law, best), means)
    estimates = {}
    for name in law.starts:
        low, high = np.quantile([values[name] for values in every], [0.025, 0.975])
        estimates[name] = Estimate(center[name], float(low), float(high))
    residuals = observed - predicted
    goodness = goodness_of(observed, residuals, len(law.starts))
    return Fit(law, estimates, goodness, predicted, residuals, len(observed), how, every)


def goodness_of(observed: Floats, residuals: Floats, num_values: int) -> Goodness:
    """R², residual standard deviation (n - k degrees of freedom), and AICc."""
    n, k = len(observed), num_values
    squares = float((residuals**2).sum())
    total = float(((observed - observed.mean()) ** 2).sum())
    aicc = math.inf
    if n - k - 1 > 0:
        aicc = n * math.log(max(squares, 1e-300) / n) + 2 * k + 2 * k * (k + 1) / (n - k - 1)
    return Goodness(
        r_squared=1.0 - squares / total if total else math.nan,
        residual_sd=math.sqrt(squares / max(n - k, 1)),
        aicc=aicc,
    )


def _check(law: Law, columns: Columns, observed: Floats) -> None:
    needed = len(law.starts) + 2
    if len(observed) < needed:
        raise DataError(
            f"law {law.name!r} has {len(law.starts)} free values and the table {len(observed)} "
            f"rows for it; it needs {needed}: finish more cells, or choose another --law"
        )
    for name in law.columns:
        if np.ptp(columns[name]) == 0:
            raise DataError(
                f"law {law.name!r}: all rows have {name} = {columns[name][0]:g}; vary it in the "
                "sweep, or choose another --law"
            )
    for name in law.scaled:
        if not (columns[name] > 0).all():
            raise DataError(
                f"law {law.name!r}: a row has {name} = {columns[name].min():g}, and the law takes "
                "its logarithm; leave the row out (--where), or mend it"
            )
    if law.logarithmic and not (observed > 0).all():
        raise DataError(f"law {law.name!r}: {law.response} must be above 0 in every row")


def _starts(law: Law) -> list[Floats]:
    """Points between the smallest and largest start of every value, the middle first."""
    low = np.log([pair[0] for pair in law.starts.values()])
    high = np.log([pair[1] for pair in law.starts.values()])
    shares = np.random.default_rng(0).uniform(size=(_NUM_STARTS - 1, len(low)))
    return [(low + high) / 2, *(low + share * (high - low) for share in shares)]


def _values(law: Law, theta: Floats) -> dict[str, float]:
    return dict(zip(law.starts, np.exp(theta).tolist(), strict=True))


class _Data(NamedTuple):
    law: Law
    columns: Columns
    observed: Floats
    delta: float  # Huber's, of ln(loss) or of the loss

    def errors(self, theta: Floats) -> Floats:
        with np.errstate(all="ignore"):  # at values far from any fit
            predicted = self.law.predict(self.columns, _values(self.law, theta))
            ratio = self.law.logarithmic
            error = np.log(predicted / self.observed) if ratio else predicted - self.observed
        return np.nan_to_num(error, nan=_FAR, posinf=_FAR, neginf=-_FAR)


def _delta(data: _Data, best: Floats) -> float:
    """Huber's usual 1.345 robust standard deviations of the residuals, at least that of before.

    With much smaller ones the fit is one of absolute deviations: twice as uncertain, and its
    bootstrap intervals too narrow.
    """
    errors = data.errors(best)
    spread = 1.4826 * float(np.median(np.abs(errors - np.median(errors))))
    return max(data.delta, 1.345 * spread)


def _minimize(data: _Data, start: Floats) -> tuple[Floats, float]:
    """The values (their logarithms) of least Huber loss near `start`, and that loss."""
    from scipy.optimize import least_squares

    start = np.clip(start, -_LOG_BOUND * 0.99, _LOG_BOUND * 0.99)
    found: Any = least_squares(
        data.errors,
        start,
        bounds=(-_LOG_BOUND, _LOG_BOUND),
        loss="huber",
        f_scale=data.delta,
        x_scale="jac",
        max_nfev=400,
    )
    return found.x, float(found.cost)


def _bootstrap(
    data: _Data, predicted: Floats, best: Floats, seeds: Sequence[int] | None, resamples: int
) -> tuple[list[Floats], str]:
    """Refits, begun at the fit, and what was resampled."""
    law, columns, observed, _ = data
    random = np.random.default_rng(0)
    groups = _seed_groups(columns, seeds)
    found = []
    for _ in range(resamples):
        if groups is not None:
            rows = np.concatenate([groups[i] for i in random.integers(0, len(groups), len(groups))])
            part = {name: column[rows] for name, column in columns.items()}
            found.append(_minimize(data._replace(columns=part, observed=observed[rows]), best)[0])
            continue
        drawn = _with_residuals(law, observed, predicted, random)
        found.append(_minimize(data._replace(observed=drawn), best)[0])
    how = "seeds resampled" if groups is not None else "residuals resampled"
    return found, f"{how}, {resamples} times"


def _with_residuals(
    law: Law, observed: Floats, predicted: Floats, random: np.random.Generator
) -> Floats:
    """The prediction with residuals drawn from the fit's, at their scale for n - k."""
    inflated = math.sqrt(len(observed) / max(len(observed) - len(law.starts), 1))
    residuals = np.log(observed / predicted) if law.logarithmic else observed - predicted
    drawn: Floats = random.choice(inflated * (residuals - residuals.mean()), size=len(observed))
    return np.asarray(predicted * np.exp(drawn) if law.logarithmic else predicted + drawn)


def _seed_groups(columns: Columns, seeds: Sequence[int] | None) -> list[Any] | None:
    """Rows of every seed, if there are at least five and all have the same points."""
    if seeds is None or len(set(seeds)) < 5:
        return None
    numbers = np.asarray(seeds)
    groups = [np.flatnonzero(numbers == seed) for seed in sorted(set(seeds))]
    points = [sorted(zip(*(c[rows] for c in columns.values()), strict=True)) for rows in groups]
    return groups if all(point == points[0] for point in points) else None
