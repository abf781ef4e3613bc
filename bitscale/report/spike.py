"""The loss spike at the transition: how high, and how many tokens until it is gone.

docs/report.md defines every quantity; this is that definition as code.
"""

import math
from typing import NamedTuple

import numpy as np

from bitscale.report.read import Floats, Run

# Rolling means come from a cumulative sum, so equal losses differ by rounding of this order.
ROUNDING = 1e-9


class Transition(NamedTuple):
    """Where a run became ternary. `first` indexes the first affected row of `Run.train`."""

    first: int
    step: int  # that row's step
    tokens: int  # seen before it


class Spike(NamedTuple):
    """Losses in nats per token."""

    pre_loss: float  # L0
    peak_loss: float
    height: float  # 0 if the loss never rose above L0
    noise: float  # standard error of one smoothed loss, from the steps before the transition
    tokens_to_recover: int | None  # None: not within the run


def find_transition(run: Run) -> Transition | None:
    """The transition by its event or, lacking one, by λ_w rising from 0; None without one.

    A run that is ternary from its first step has none: there is no loss before to compare with.

    An event at step S says that the transition lies at S; step S itself is counted as before it
    unless S already trained with λ > 0 (its loss cannot have been affected otherwise).
    """
    steps = run.train["step"]
    strength = np.maximum(run.train["lambda_weight"], run.train["lambda_activation"])
    event = next((line for line in run.events if line["event"] == "transition"), None)
    if event is not None:
        first = int(np.searchsorted(steps, event["step"]))
        if first < len(steps) and steps[first] == event["step"] and strength[first] == 0:
            first += 1
        if first in (0, len(steps)):
            return None  # ternary from the start, or no ternary step was trained yet
    else:
        ternary = np.flatnonzero(run.train["lambda_weight"] > 0)
        if len(ternary) == 0 or ternary[0] == 0:
            return None
        first = int(ternary[0])
    return Transition(first, int(steps[first]), int(run.train["tokens"][first - 1]))


def spike_windows(num_steps: int) -> tuple[int, int]:
    """W, the steps averaged before the transition, and m, the window of the smoothed loss."""
    before = max(8, math.ceil(0.02 * num_steps))
    return before, max(4, before // 8)


def measure_spike(run: Run, transition: Transition, num_steps: int) -> Spike | None:
    """Compare the smoothed loss after the transition with the mean loss before it.

    `num_steps` is the run's planned length. Steps with a NaN or infinite loss are left out.
    None if fewer than one step before or one window after the transition was recorded.
    """
    before_window, window = spike_windows(num_steps)
    loss, tokens = run.train["loss"], run.train["tokens"]
    before = loss[max(0, transition.first - before_window) : transition.first]
    before = before[np.isfinite(before)]
    after = np.flatnonzero(np.isfinite(loss))
    after = after[after >= transition.first]
    if len(before) == 0 or len(after) < window:
        return None
    pre_loss = float(before.mean())
    smooth = rolling_mean(loss[after], window)
    rows = after[window - 1 :]  # the row at which each window ends

    ramp = run.train["lambda_weight"][transition.first :]
    ramp_end = transition.first + int(np.argmax(ramp))  # argmax: the first row of full strength
    in_search = max(1, int(np.searchsorted(rows, ramp_end + before_window, side="right")))
    peak = int(np.argmax(smooth[:in_search]))
    noise = float(before.std(ddof=1)) / math.sqrt(window) if len(before) > 1 else math.nan

    limit = pre_loss + ROUNDING * abs(pre_loss)
    height = float(smooth[peak]) - pre_loss if smooth[peak] > limit else 0.0
    recovered = np.flatnonzero(smooth[peak:] <= limit)
    tokens_to_recover: int | None = None
    if height == 0:
        tokens_to_recover = 0
    elif len(recovered) > 0:
        tokens_to_recover = int(tokens[rows[peak + recovered[0]]]) - transition.tokens
    return Spike(pre_loss, float(smooth[peak]), height, noise, tokens_to_recover)


def rolling_mean(values: Floats, window: int) -> Floats:
    """Mean of every full window: len(values) - window + 1 values."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    result: Floats = (sums[window:] - sums[:-window]) / window
    return result
