"""Values that follow from a configuration: pure functions, steps and tokens only."""

import math
from dataclasses import replace

from bitscale.config.presets import INT8_ROWS, preset, with_bits
from bitscale.config.schema import Config, ModelConfig, OptimConfig, Point, QuantConfig, Span
from bitscale.config.spec import CodeSpec, Product, QuantSpec
from bitscale.errors import ConfigError


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


def residual_peak(cfg: Config) -> float:
    """Largest ε of the residual x wᵀ; 0: there is none."""
    peak = cfg.transition.residual.peak
    return quant_spec(cfg.quant).residual if peak is None else peak


def residual_steps(cfg: Config) -> int:
    """Steps from the transition on after which ε is 0; by default the run's last step has none."""
    over, start = cfg.transition.residual.over, transition_step(cfg)
    if over is not None:
        return span_steps(over, cfg)
    return 0 if start is None else num_steps(cfg) - 1 - start


def moments_of(optim: OptimConfig) -> tuple[str, ...]:
    """What the optimizer keeps in fp32 for every element of a parameter, beside the master."""
    return ("exp_avg",) if optim.name == "lion" else ("exp_avg", "exp_avg_sq")


def packs_codes(cfg: Config) -> bool:
    """Whether ranks keep the codes that they exchange packed; ZeRO-3 is chosen for memory."""
    wanted = cfg.engine.packed_codes
    return cfg.engine.ternary_gather and (cfg.engine.zero_stage == 3 if wanted is None else wanted)


def num_kv_heads(cfg: Config) -> int:
    return cfg.model.num_kv_heads or cfg.model.num_heads


def has_bias(m: ModelConfig, layer: str) -> bool:
    """Whether the linear `layer` of a block (q, k, v, o, gate, up, down) has a bias."""
    match m.bias:
        case "qkv":
            return layer in ("q", "k", "v")
        case "attention":
            return layer in ("q", "k", "v", "o")
    return m.bias


def num_pipeline_stages(cfg: Config) -> int:
    """Stages that the layers are cut into: one for each of the pp ranks, two with DualPipeV."""
    return cfg.parallel.pp * (2 if cfg.parallel.pipeline_schedule == "dualpipev" else 1)


def stop_step(cfg: Config) -> int:
    """Step after which this session ends (the budget, or `train.stop_step` before it)."""
    return min(num_steps(cfg), cfg.train.stop_step or num_steps(cfg))


def quant_spec(quant: QuantConfig) -> QuantSpec:
    """The preset with the section's overrides. Raises ConfigError for what cannot be combined."""
    base = preset(quant.preset)
    weight = _weight_spec(quant, base.weight)
    activation = _activation_spec(quant, base)
    # Codes are summed only where one scale a row and a token can follow the sum.
    product: Product = base.product
    if product == "integer" and (activation is None or not weight.scales_rows):
        product = "dequantized"
    try:
        return replace(
            base,
            weight=weight,
            activation=activation,
            product=product,
            norm=quant.norm or base.norm,
            gradient=quant.gradient or base.gradient,
            deadzone_bias=(
                base.deadzone_bias if quant.deadzone_bias is None else quant.deadzone_bias
            ),
            gradient_bits=quant.gradient_bits,
        )
    except ConfigError as error:
        raise ConfigError(f"quant (preset {quant.preset}): {error}") from None


def _weight_spec(quant: QuantConfig, part: CodeSpec) -> CodeSpec:
    if part.measure == "learned" and quant.weight_scale is not None:
        raise ConfigError(
            f"quant.weight_scale={quant.weight_scale!r} contradicts preset {quant.preset!r}, which "
            "learns its scales; leave it out, or use another preset"
        )
    granularity = quant.granularity or part.granularity
    changes = {
        "measure": quant.weight_scale or part.measure,
        "granularity": granularity,
        # A preset's group size goes with its granularity.
        "group_size": quant.group_size or (part.group_size if granularity == "group" else None),
        "num_shards": quant.num_shards,
        "rounding": quant.rounding or part.rounding,
        "eps": quant.eps,
    }
    try:
        bits: int | None = quant.weight_bits
        if bits is None and not part.is_ternary and changes["measure"] != part.measure:
            bits = part.num_levels.bit_length() - 1  # the step depends on the measure
        if bits is None:
            return replace(part, **changes)  # type: ignore[arg-type]
        plain = replace(part, numerator=1.0, code_min=-1, code_max=1)
        return with_bits(replace(plain, **changes), bits)  # type: ignore[arg-type]
    except ConfigError as error:
        raise ConfigError(f"quant (preset {quant.preset}): {error}") from None


def _activation_spec(quant: QuantConfig, base: QuantSpec) -> CodeSpec | None:
    bits = quant.activation_bits or (16 if base.activation is None else 8)
    if bits == 16:
        if quant.activation_max is not None:
            raise ConfigError(
                f"quant.activation_max={quant.activation_max} means nothing with 16-bit "
                f"activations (preset {quant.preset}); leave it out, or set quant.activation_bits=8"
            )
        return None
    part = base.activation or INT8_ROWS
    rounding = part.rounding
    if quant.rounding is not None and quant.rounding != "stochastic":
        rounding = quant.rounding
    return replace(
        part,
        numerator=float(quant.activation_max or part.numerator),
        rounding=rounding,
        eps=quant.eps,
    )
