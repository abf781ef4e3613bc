"""λ, the quantization strength, as a pure function of the step.

λ never lives in a counter: a micro-batch, a recomputed forward pass or a restart cannot advance
it. Formulas and their sources: docs/schedules.md.
"""

import math
from typing import NamedTuple

from bitscale.config import Config, RampConfig, span_steps, transition_step

_STEEPNESS = 5.0  # exponent of the exponential ramp, and half that of the sigmoid


class Strength(NamedTuple):
    """λ of weights and of activations, each in [0, 1]: 0 is 16 bit, 1 is ternary / int8."""

    weight: float
    activation: float


SIXTEEN_BIT = Strength(0.0, 0.0)
TERNARY = Strength(1.0, 1.0)


def ramp_value(shape: str, step: int, length: int) -> float:
    """λ at `step` steps after the transition began, for a ramp of `length` steps.

    With u = step / length:
    `none` 1; `linear` u; `paper` 2σ(5u) − 1 (the code of arXiv:2502.11895, which jumps from
    .987 to 1 at u = 1); `exponential` (e^{5u} − 1) / (e^5 − 1); `sigmoid` σ(10(u − ½)) rescaled
    to run from 0 to 1; `cosine` (1 − cos πu) / 2. All are 1 from u = 1 on.
    """
    if shape == "none" or step >= length:
        return 1.0
    u = step / length
    match shape:
        case "linear":
            return u
        case "paper":
            return 2.0 * _sigmoid(5.0 * u) - 1.0
        case "exponential":
            return math.expm1(_STEEPNESS * u) / math.expm1(_STEEPNESS)
        case "sigmoid":
            low = _sigmoid(-_STEEPNESS)
            return (_sigmoid(2 * _STEEPNESS * (u - 0.5)) - low) / (1.0 - 2.0 * low)
        case "cosine":
            return (1.0 - math.cos(math.pi * u)) / 2.0
    raise AssertionError(f"unknown ramp shape {shape!r}")


def quant_strength(step: int, cfg: Config) -> Strength:
    """λ of weights and activations at 0-based `step` of the run described by `cfg`."""
    start = transition_step(cfg)
    if start is None or step < start:
        return SIXTEEN_BIT
    weight_ramp = cfg.transition.ramp
    activation_ramp = cfg.transition.activation_ramp or weight_ramp

    def value(ramp: RampConfig) -> float:
        return ramp_value(ramp.shape, step - start, span_steps(ramp.over, cfg))

    return Strength(value(weight_ramp), value(activation_ramp))


def ramp_end_step(cfg: Config) -> int | None:
    """First step at which both λ are 1; None for a run that stays in 16 bit."""
    start = transition_step(cfg)
    if start is None:
        return None
    ramps = (cfg.transition.ramp, cfg.transition.activation_ramp or cfg.transition.ramp)
    return start + max(span_steps(ramp.over, cfg) for ramp in ramps)


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))
