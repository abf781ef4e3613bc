"""λ, the quantization strength, as a pure function of the step.

λ never lives in a counter: a micro-batch, a recomputed forward pass or a restart cannot advance
it. Formulas and their sources: docs/schedules.md.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

from bitscale.config import (
    Amendment,
    Config,
    RampConfig,
    ramp_progress,
    residual_peak,
    residual_steps,
    span_steps,
    transition_step,
)

_STEEPNESS = 5.0  # exponent of the exponential ramp, and half that of the sigmoid


class Strength(NamedTuple):
    """λ of weights and of activations, each in [0, 1]: 0 is 16 bit, 1 is ternary / int8.

    `residual` is the factor of x wᵀ that is added to a layer's output, 0 in a finished model.
    """

    weight: float
    activation: float
    residual: float = 0.0

    @property
    def is_constant(self) -> bool:
        """Whether it is one of before or after the transition, and not of a single step in it."""
        ends = (0.0, 1.0)
        return self.weight in ends and self.activation in ends and self.residual == 0.0


SIXTEEN_BIT = Strength(0.0, 0.0)
TERNARY = Strength(1.0, 1.0)


def ramp_value(shape: str, step: float, length: int) -> float:
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


def residual_value(step: int, length: int, peak: float, warmup: float) -> float:
    """ε at `step` steps after the transition began, for a residual of `length` steps.

    With u = step / length and v = warmup: peak · u / v below v, then peak · (1 + cos π (u − v) /
    (1 − v)) / 2, and 0 from u = 1 on (the code of arXiv:2601.07892, there with v = 0.1).
    """
    if step >= length:
        return 0.0
    u = step / length
    if u < warmup:
        return peak * u / warmup
    return peak * (1.0 + math.cos(math.pi * (u - warmup) / (1.0 - warmup))) / 2.0


def quant_strength(step: int, cfg: Config, amendments: Iterable[Amendment] = ()) -> Strength:
    """λ of weights and activations at 0-based `step` of the run described by `cfg`, whose ramp the
    `amendments` of its guard may have slowed down.

    The residual is λ_weight ε, so that λ = 0 is the 16-bit model whatever ε; its own ε keeps the
    plan's pace, since it must be 0 at the end.
    """
    start = transition_step(cfg)
    if start is None or step < start:
        return SIXTEEN_BIT
    weight_ramp = cfg.transition.ramp
    activation_ramp = cfg.transition.activation_ramp or weight_ramp
    progress = ramp_progress(step, start, amendments)

    def value(ramp: RampConfig) -> float:
        return ramp_value(ramp.shape, progress, span_steps(ramp.over, cfg))

    weight = value(weight_ramp)
    residual = 0.0
    peak = residual_peak(cfg)
    if peak:
        warmup = cfg.transition.residual.warmup
        residual = weight * residual_value(step - start, residual_steps(cfg), peak, warmup)
    return Strength(weight, value(activation_ramp), residual)


def ramp_end_step(cfg: Config) -> int | None:
    """First step at which both λ are 1; None for a run that stays in 16 bit."""
    start = transition_step(cfg)
    if start is None:
        return None
    ramps = (cfg.transition.ramp, cfg.transition.activation_ramp or cfg.transition.ramp)
    return start + max(span_steps(ramp.over, cfg) for ramp in ramps)


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))
