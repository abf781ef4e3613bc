"""Values that follow from a configuration: pure functions, steps and tokens only."""

import math

from bitscale.config.schema import Config, Point, Span


def tokens_per_step(cfg: Config) -> int:
    """Tokens that one optimizer step consumes over all ranks."""
    return cfg.train.global_batch_size * cfg.data.seq_len


def num_steps(cfg: Config) -> int:
    """Optimizer steps in the whole budget (a token budget is rounded up to whole steps)."""
    if cfg.train.steps is not None:
        return cfg.train.steps
    assert cfg.train.tokens is not None
    return math.ceil(cfg.train.tokens / tokens_per_step(cfg))


def span_steps(span: Span, cfg: Config) -> int:
    """Length of `span` in optimizer steps, rounded to the nearest."""
    if span.steps is not None:
        return span.steps
    if span.tokens is not None:
        return round(span.tokens / tokens_per_step(cfg))
    assert span.fraction is not None
    return round(span.fraction * num_steps(cfg))


def point_step(point: Point, cfg: Config) -> int:
    """Step index (0-based: the first step that is already past `point`)."""
    if point.step is not None:
        return point.step
    if point.tokens is not None:
        return round(point.tokens / tokens_per_step(cfg))
    assert point.fraction is not None
    return round(point.fraction * num_steps(cfg))


def transition_step(cfg: Config) -> int | None:
    """First step of the transition (its λ is ramp(0)); None if the run stays in 16 bit."""
    at = cfg.transition.at
    return None if at is None else point_step(at, cfg)


def num_kv_heads(cfg: Config) -> int:
    return cfg.model.num_kv_heads or cfg.model.num_heads


def stop_step(cfg: Config) -> int:
    """Step after which this session ends (the budget, or `train.stop_step` before it)."""
    return min(num_steps(cfg), cfg.train.stop_step or num_steps(cfg))
