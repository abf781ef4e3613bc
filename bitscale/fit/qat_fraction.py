"""The best share of ternary (QAT) training as a function of tokens per parameter-byte.

arXiv:2509.22935 (Dremov et al.): with S = D / (N P / 8), the best fraction is

    f*(S) = exp(ln S - a / ln S) / S = exp(-a / ln S),     a = 6.7297 in the paper.

(Formula and constant read in a summary of the paper.) Here a is estimated from losses at several
fractions of each budget. Near its best point the loss of budget g is taken as a parabola in ln f,

    L = c_g + k (ln f - ln f*(S_g))²,

which is our assumption, as is one curvature k for all budgets.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from bitscale.errors import DataError
from bitscale.fit.estimate import Estimate, Goodness, goodness_of
from bitscale.fit.laws import Floats

# A candidates of a, R rows
PAPER_A = 6.7297
PAPER_MAE = 0.091  # of the fraction, over the paper's runs
_GRID_A = np.geomspace(0.05, 40.0, 600)  # steps of 1.1%
FORMULA = "f* = exp(-a / ln S), S = D / (N P / 8); L = c_g + k (ln f - ln f*(S_g))^2"
SOURCE = "arXiv:2509.22935 (Dremov et al.), optimal fraction"


def tokens_per_parameter_byte(parameters: float, tokens: float, bits: float) -> float:
    """S: tokens for every byte that the quantized parameters take."""
    return tokens / (parameters * bits / 8)


def best_fraction(s: float, a: float = PAPER_A) -> float:
    """f*(S), in (0, 1). Raises DataError for S <= 1, where the formula means nothing."""
    if s <= 1:
        raise DataError(
            f"{s:.3g} tokens per parameter-byte: the law for the QAT fraction needs more than 1; "
            "train on more tokens"
        )
    return math.exp(-a / math.log(s))


class FractionFit(NamedTuple):
    a: Estimate
    curvature: Estimate  # k, nats
    best: dict[float, Estimate]  # S of a budget -> f*
    observed_best: dict[float, float]  # S -> fraction of the lowest mean loss that was run
    goodness: Goodness
    predicted: Floats
    residuals: Floats
    num_rows: int
    bootstrap: str


def fit_fraction(
    s: Floats, fraction: Floats, loss: Floats, seeds: Sequence[int], *, resamples: int = 400
) -> FractionFit:
    """Estimate a from rows (S, f, loss); intervals by resampling seeds (rows with few seeds).

    Raises DataError without two fractions in one budget and four in all, and for losses that have
    no lowest point: they only fall, or only rise, with the fraction, or are lowest at both ends.
    """
    budgets = np.unique(s)
    pairs = {(float(x), float(f)) for x, f in zip(s, fraction, strict=True)}
    if len(pairs) < len(budgets) + 3 or (s <= 1).any():
        raise DataError(
            f"law 'qat-fraction': {len(pairs)} fractions in {len(budgets)} budgets are too few (or "
            "a budget has no more than 1 token per parameter-byte); run a sweep such as "
            "configs/sweeps/qat-fraction.yaml"
        )
    random, numbers = np.random.default_rng(0), np.asarray(seeds)
    names = np.unique(numbers)
    by_seed = len(names) >= 5
    # Which row belongs to which resampled unit: a resampling is a weight for every row.
    unit = np.searchsorted(names, numbers) if by_seed else np.arange(len(s))
    best = _minimize(s, fraction, loss, np.ones(len(s)))
    if not _has_lowest_point(best):
        raise DataError(
            "law 'qat-fraction': the losses have no lowest point between the fractions "
            f"{fraction.min():g} and {fraction.max():g}, so that the best fraction lies beyond, or "
            "nowhere; run smaller or larger fractions"
        )
    draws: list[_Parabolas] = []
    while len(draws) < resamples:
        count = int(unit.max()) + 1
        weights = np.bincount(random.integers(0, count, count), minlength=count)[unit].astype(float)
        if all(weights[s == x].sum() > 0 for x in budgets):
            draws.append(_minimize(s, fraction, loss, weights))
    a_values = np.array([draw.a for draw in draws])
    return FractionFit(
        a=_estimate(best.a, a_values),
        curvature=_estimate(best.curvature, np.array([draw.curvature for draw in draws])),
        best={
            float(x): _estimate(
                best_fraction(x, best.a), np.array([best_fraction(x, a) for a in a_values])
            )
            for x in budgets
        },
        observed_best={float(x): _lowest(fraction[s == x], loss[s == x]) for x in budgets},
        goodness=goodness_of(loss, loss - best.predicted, 2 + len(budgets)),
        predicted=best.predicted,
        residuals=loss - best.predicted,
        num_rows=len(loss),
        bootstrap=f"{'seeds' if by_seed else 'rows'} resampled, {resamples} times",
    )


def beyond_what_was_run(s: Floats, fraction: Floats, a: float) -> dict[float, tuple[float, float]]:
    """Budgets S whose best fraction lies outside the fractions run there, with these: (S: ends)."""
    found = {}
    for budget in np.unique(s):
        low, high = float(fraction[s == budget].min()), float(fraction[s == budget].max())
        if not low <= best_fraction(float(budget), a) <= high:
            found[float(budget)] = (low, high)
    return found


class _Parabolas(NamedTuple):
    a: float
    curvature: float
    predicted: Floats


def _has_lowest_point(fit: _Parabolas) -> bool:
    """False at an end of the grid of a, which stands for all values beyond, and without a curve."""
    return bool(_GRID_A[0] < fit.a < _GRID_A[-1]) and fit.curvature > 0


def _minimize(s: Floats, fraction: Floats, loss: Floats, weights: Floats) -> _Parabolas:
    """Weighted least squares: a over a fine grid, k and the floors c_g in closed form for each."""
    x_AR = (np.log(fraction) + _GRID_A[:, None] / np.log(s)) ** 2
    y_R = loss.astype(float).copy()
    centered_AR, y_means = x_AR.copy(), np.zeros(len(s))
    for budget in np.unique(s):
        rows = s == budget
        share = weights[rows] / weights[rows].sum()
        centered_AR[:, rows] -= (x_AR[:, rows] * share).sum(axis=1, keepdims=True)
        y_means[rows] = (loss[rows] * share).sum()
    y_R -= y_means
    xy_A, xx_A = (weights * centered_AR * y_R).sum(1), (weights * centered_AR**2).sum(1)
    k_A = np.maximum(xy_A / np.maximum(xx_A, 1e-300), 0.0)
    best = int((k_A**2 * xx_A - 2 * k_A * xy_A).argmin())
    predicted = y_means + k_A[best] * centered_AR[best]
    return _Parabolas(float(_GRID_A[best]), float(k_A[best]), predicted)


def _lowest(fraction: Floats, loss: Floats) -> float:
    choices = np.unique(fraction)
    return float(min(choices, key=lambda f: loss[fraction == f].mean()))


def _estimate(value: float, draws: Floats) -> Estimate:
    low, high = np.quantile(draws, [0.025, 0.975])
    return Estimate(value, float(low), float(high))
