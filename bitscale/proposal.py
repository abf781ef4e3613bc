"""A ramp that follows from a measured loss over λ, by a stated rule. docs/probe.md explains it.

Equal rises of the loss on equal steps: let R(λ) be the rise of the held-out loss at fixed weights,
made monotone, and u the share of the ramp that has passed. The ideal ramp is λ*(u) with R(λ*(u)) =
u R(1). Of the shapes that `transition.ramp` has, the one nearest to λ* is proposed, so long that no
step of it raises the loss by more than a bound.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bitscale.quant.schedule import ramp_value

IDEAL = "equal rises"
SHAPES = ("linear", "paper", "exponential", "sigmoid", "cosine")
DEFAULT_MAX_RISE = 0.01  # nats a step
_RESOLUTION = 1000  # points of u
_ROUNDING = 1e-9
_OUTLIER = 3.0  # times the mean damage
_SIGNIFICANT = 2.0  # standard errors

Floats = NDArray[np.float64]


class Proposal(NamedTuple):
    """`shape` and `num_steps` of the ramp; "none" and 0 where it costs nothing measurable."""

    shape: str
    num_steps: int
    ideal_num_steps: int  # of λ* under the same bound
    distances: dict[str, float]  # root mean square of λ - λ* by shape
    why: str

    @property
    def overrides(self) -> list[str]:
        """For `bitscale train`."""
        steps = f"transition.ramp.over.steps={self.num_steps}"
        return [f"transition.ramp.shape={self.shape}", steps]


def propose_ramp(
    strengths: Sequence[float],
    rises: Sequence[float],
    *,
    error: float,
    max_rise: float = DEFAULT_MAX_RISE,
) -> Proposal:
    """The ramp for a loss that rises by `rises` nats at the λ of `strengths` (from 0 to 1).

    `error` is the standard error of the rise at λ = 1, `max_rise` the largest rise a step.
    """
    whole = float(np.maximum.accumulate(rises)[-1])
    if whole <= _SIGNIFICANT * error or whole <= max_rise:
        why = f"the whole switch raises the loss by {whole:.4f} nats, within its measuring error"
        if whole > _SIGNIFICANT * error:
            why = f"the whole switch raises the loss by {whole:.4f} nats, allowed in one step"
        return Proposal("none", 0, 0, {}, why)
    u = np.linspace(0.0, 1.0, _RESOLUTION + 1)
    ideal = ideal_ramp(strengths, rises, u)
    distances = {
        shape: float(np.sqrt(np.mean((shape_over(shape, u) - ideal) ** 2))) for shape in SHAPES
    }
    # The paper's ramp jumps at its end, however long it is: it may have to be left out.
    jump = _last_rise(strengths, rises, "paper")
    nearest, second, *_ = sorted(distances, key=distances.__getitem__)
    left_out = nearest == "paper" and jump > max_rise
    shape = second if left_out else nearest
    num_steps = _fewest_steps(strengths, rises, shape, max_rise)
    but = f" (but for paper, whose jump at the end is {jump:.3f} nats)" if left_out else ""
    return Proposal(
        shape,
        num_steps,
        _ceil(whole / max_rise),
        distances,
        f"{shape} is nearest to equal rises on equal steps{but}; over {num_steps:,} steps none "
        f"raises the loss at these weights by more than {max_rise:g} nats",
    )


def ideal_ramp(strengths: Sequence[float], rises: Sequence[float], u: Floats) -> Floats:
    """λ*(u): the inverse of the share of the rise, which is interpolated linearly in λ."""
    share = np.maximum.accumulate(np.maximum(rises, 0.0))
    # Where the rise stands still λ* jumps: as steep as can be told from a jump.
    places = share / share[-1] + 1e-12 * np.arange(len(share))
    result: Floats = np.interp(u, places, np.asarray(strengths, dtype=np.float64))
    result[u >= 1.0] = strengths[-1]
    return result


def drawn_ramps(
    strengths: Sequence[float], rises: Sequence[float]
) -> list[tuple[str, Floats, Floats]]:
    """(name, share u, λ) of the ideal ramp, if the loss rises at all, and of every shape."""
    u = np.linspace(0.0, 1.0, 201)
    shapes = [(shape, u, shape_over(shape, u)) for shape in SHAPES]
    if max(rises) <= 0.0:
        return shapes
    return [(IDEAL, u, ideal_ramp(strengths, rises, u)), *shapes]


def shape_over(shape: str, u: Floats) -> Floats:
    """λ of `transition.ramp.shape` when the share u of the ramp has passed."""
    return np.array([ramp_value(shape, float(x) * _RESOLUTION, _RESOLUTION) for x in u])


def start_later(damages: Sequence[tuple[str, float, float]]) -> list[str]:
    """Groups of (name, rise, error) that cost far more than the others: more than three times the
    mean of all rises (falls count as 0), and more than their measuring error explains."""
    if not damages:
        return []
    mean = sum(max(rise, 0.0) for _, rise, _ in damages) / len(damages)
    return [
        name
        for name, rise, error in damages
        if rise > _OUTLIER * mean and rise > _SIGNIFICANT * error
    ]


def _monotone(strengths: Sequence[float], rises: Sequence[float], at: Floats) -> Floats:
    result: Floats = np.interp(at, strengths, np.maximum.accumulate(np.maximum(rises, 0.0)))
    return result


def _fewest_steps(
    strengths: Sequence[float], rises: Sequence[float], shape: str, max_rise: float
) -> int:
    """Steps of a ramp none of which raises the loss by more than `max_rise`."""
    num_steps = _ceil(max(rises) / max_rise)
    while True:
        ramp = [ramp_value(shape, step, num_steps) for step in range(num_steps + 1)]
        largest = float(np.diff(_monotone(strengths, rises, np.array(ramp))).max())
        if largest <= max_rise * (1 + _ROUNDING):
            return num_steps
        num_steps = max(num_steps + 1, _ceil(num_steps * largest / max_rise))


def _last_rise(strengths: Sequence[float], rises: Sequence[float], shape: str) -> float:
    """What is left to rise just before the end of the ramp."""
    before = _monotone(strengths, rises, shape_over(shape, np.array([1.0 - 1e-9])))
    return float(np.max(rises) - before[0])


def _ceil(value: float) -> int:
    return max(1, math.ceil(value * (1 - _ROUNDING)))
