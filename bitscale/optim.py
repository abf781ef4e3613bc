"""Parameter groups, learning rate and weight decay: the last two pure functions of the step.

Formulas and sources: docs/schedules.md.
"""

import math
from collections.abc import Iterable

from torch import nn

from bitscale.config import Config, num_steps, point_step, span_steps, transition_step


def decayed_and_not(
    parameters: Iterable[nn.Parameter],
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Matrices decay; norms, biases and scales (fewer than two dimensions) do not."""
    trained = [p for p in parameters if p.requires_grad]
    return [p for p in trained if p.ndim >= 2], [p for p in trained if p.ndim < 2]


def learning_rate(step: int, cfg: Config) -> float:
    """Learning rate of 0-based `step`: the schedule, then the transition's LR policy."""
    start = transition_step(cfg)
    policy = cfg.transition.lr
    if start is None or step < start or policy == "continue":
        return _scheduled(step, cfg)
    if policy == "rewarm":
        length = span_steps(cfg.transition.lr_rewarm, cfg)
        return _scheduled(step, cfg) * _warmup(step - start, length)
    # "decay": one linear decay from the transition to the end (QAT fused with the cooldown).
    plateau = cfg.optim.lr * _warmup(step, span_steps(cfg.optim.warmup, cfg))
    return plateau * _linear(step - start, num_steps(cfg) - start, cfg.optim.min_lr_ratio)


def weight_decay(step: int, cfg: Config) -> float:
    """Weight decay of 0-based `step` under the transition's weight-decay policy."""
    policy = cfg.transition.weight_decay
    start = transition_step(cfg)
    off = (policy == "off" and start is not None and step >= start) or (
        policy == "off_at" and step >= point_step(cfg.transition.weight_decay_off_at, cfg)
    )
    return 0.0 if off else cfg.optim.weight_decay


def _scheduled(step: int, cfg: Config) -> float:
    o, steps = cfg.optim, num_steps(cfg)
    warmup = span_steps(o.warmup, cfg)
    horizon = steps if o.horizon is None else span_steps(o.horizon, cfg)
    peak = o.lr * _warmup(step, warmup)
    after, length = step - warmup, horizon - warmup
    match o.schedule:
        case "constant":
            return peak
        case "linear":
            return peak * _linear(after, length, o.min_lr_ratio)
        case "cosine":
            progress = _progress(after, length)
            cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
            return peak * (o.min_lr_ratio + (1.0 - o.min_lr_ratio) * cosine)
        case "wsd":
            decay = span_steps(o.decay, cfg)
            return peak * _linear(step - (steps - decay), decay, o.min_lr_ratio)
        case "trilm":
            dropped = step >= round(o.trilm_drop_at * horizon)
            ratio = o.trilm_lr_ratio if dropped else 1.0
            return peak * ratio * _linear(after, length, o.min_lr_ratio)


def _warmup(step: int, length: int) -> float:
    """Linear from 1/length at step 0 to 1; never 0, so no step is wasted."""
    return 1.0 if step + 1 >= length else (step + 1) / length


def _progress(step: int, length: int) -> float:
    """0 until the decay begins, 1 from its end on."""
    if length <= 0:
        return 1.0 if step > 0 else 0.0
    return min(max(step / length, 0.0), 1.0)


def _linear(step: int, length: int, floor: float) -> float:
    return 1.0 - (1.0 - floor) * _progress(step, length)
