"""Configuration of a run: schema, loading, cross-field checks and derived values."""

from bitscale.config.checks import check_world_size
from bitscale.config.derived import (
    num_kv_heads,
    num_pipeline_stages,
    num_steps,
    point_step,
    quant_spec,
    residual_peak,
    residual_steps,
    span_steps,
    stop_step,
    tokens_per_step,
    transition_step,
)
from bitscale.config.load import config_hash, load_config, parse_config, to_tree, to_yaml
from bitscale.config.schema import (
    Checkpointing,
    Config,
    ModelConfig,
    OptimConfig,
    Point,
    QuantConfig,
    RampConfig,
    RopeScaling,
    Span,
    TransitionConfig,
)

__all__ = [
    "Checkpointing",
    "Config",
    "ModelConfig",
    "OptimConfig",
    "Point",
    "QuantConfig",
    "RampConfig",
    "RopeScaling",
    "Span",
    "TransitionConfig",
    "check_world_size",
    "config_hash",
    "load_config",
    "num_kv_heads",
    "num_pipeline_stages",
    "num_steps",
    "parse_config",
    "point_step",
    "quant_spec",
    "residual_peak",
    "residual_steps",
    "span_steps",
    "stop_step",
    "to_tree",
    "to_yaml",
    "tokens_per_step",
    "transition_step",
]
