"""The typed configuration: every key that a run understands, its type, default and meaning.

Configuration is inert: frozen, no I/O, nothing derived behind the reader's back. Values that
follow from others (number of steps, transition step) are functions in `derived.py`; conditions
that span several keys are in `checks.py`.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Beta = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]  # 1 is refused by Adam


class Section(BaseModel):
    """Base of every section: unknown keys and implicit conversions are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Point(Section):
    """A moment of the run, given in exactly one unit."""

    step: NonNegativeInt | None = None
    tokens: NonNegativeInt | None = None
    fraction: Fraction | None = None

    @model_validator(mode="after")
    def _one_unit(self) -> Self:
        if sum(v is not None for v in (self.step, self.tokens, self.fraction)) != 1:
            raise ValueError("give exactly one of step, tokens, fraction")
        return self


class Span(Section):
    """A length of the run, given in exactly one unit."""

    steps: NonNegativeInt | None = None
    tokens: NonNegativeInt | None = None
    fraction: Fraction | None = None

    @model_validator(mode="after")
    def _one_unit(self) -> Self:
        if sum(v is not None for v in (self.steps, self.tokens, self.fraction)) != 1:
            raise ValueError("give exactly one of steps, tokens, fraction")
        return self


class RopeScaling(Section):
    """Context extension of the rotary embedding (names as in Hugging Face configurations)."""

    type: Literal["linear", "llama3"]
    factor: Annotated[float, Field(ge=1)]
    low_freq_factor: PositiveFloat = 1.0
    high_freq_factor: PositiveFloat = 4.0
    original_context: PositiveInt = 8192


class ModelConfig(Section):
    """Shape of a Llama-family decoder. `vocab_size: null` takes the corpus's tokenizer."""

    vocab_size: PositiveInt | None = None
    num_layers: PositiveInt
    d_model: PositiveInt
    num_heads: PositiveInt
    num_kv_heads: PositiveInt | None = None  # null: as many as num_heads
    d_ff: PositiveInt
    mlp: Literal["swiglu", "relu2_glu", "relu2"] = "swiglu"
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_affine: bool = True  # OLMo-1B's layernorm has no weight
    norm_eps: PositiveFloat = 1e-5
    rope_theta: PositiveFloat = 10000.0
    rope_scaling: RopeScaling | None = None
    sub_norm: bool = False  # SubLN: a norm before the output and down projections
    qk_norm: bool = False
    tie_embeddings: bool = True
    bias: bool = False
    head_bits: Literal[8, 16] = 16
    init_std: PositiveFloat = 0.02


class QuantConfig(Section):
    """What λ = 1 means for the decoder's linear layers."""

    weight_scale: Literal["absmean", "absmedian"] = "absmean"
    activation_bits: Literal[8, 16] = 8  # 16: weight-only quantization
    eps: PositiveFloat = 1e-5
    kernel: Literal["reference"] = "reference"


class CorpusConfig(Section):
    """One prepared corpus (a directory written by `bitscale prepare`) and its share."""

    path: str
    weight: PositiveFloat = 1.0


class DataConfig(Section):
    corpora: tuple[CorpusConfig, ...] = Field(min_length=1)
    seq_len: PositiveInt
    reset_attention: bool = False  # attend within a document only
    seed: NonNegativeInt = 0


class OptimConfig(Section):
    """AdamW and the learning-rate schedule (formulas: docs/schedules.md)."""

    lr: PositiveFloat
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1
    clip: NonNegativeFloat = 1.0  # global gradient norm; 0 turns clipping off
    schedule: Literal["constant", "linear", "cosine", "wsd", "trilm"] = "cosine"
    warmup: Span = Span(fraction=0.02)
    min_lr_ratio: Fraction = 0.1
    decay: Span = Span(fraction=0.2)  # wsd: length of the final decay
    horizon: Span | None = None  # linear, cosine, trilm: where the schedule ends; null: the run
    trilm_lr_ratio: Fraction = 0.6  # trilm: peak after the drop over peak before
    trilm_drop_at: Fraction = 0.5


RampShape = Literal["none", "linear", "paper", "exponential", "sigmoid", "cosine"]


class RampConfig(Section):
    """How λ goes from 0 to 1 once the transition has begun."""

    shape: RampShape = "none"
    over: Span = Span(steps=0)


class TransitionConfig(Section):
    """16 bit -> ternary. `at: null` never switches; `at: {step: 0}` is ternary from scratch."""

    at: Point | None = None
    ramp: RampConfig = RampConfig()
    activation_ramp: RampConfig | None = None  # null: as `ramp`
    optimizer_state: Literal["keep", "reset", "keep_second_moment"] = "keep"
    lr: Literal["continue", "rewarm", "decay"] = "continue"
    lr_rewarm: Span = Span(fraction=0.02)
    weight_decay: Literal["constant", "off", "off_at"] = "constant"
    weight_decay_off_at: Point = Point(fraction=2 / 3)


class TrainConfig(Section):
    steps: PositiveInt | None = None  # exactly one of steps, tokens
    tokens: PositiveInt | None = None
    stop_step: PositiveInt | None = None  # end this session early, schedules unchanged
    global_batch_size: PositiveInt  # sequences per optimizer step
    micro_batch_size: PositiveInt
    dtype: Literal["bf16", "fp32"] = "bf16"
    seed: NonNegativeInt = 0
    activation_checkpointing: bool = False
    eval_every: NonNegativeInt = 0  # steps; 0: only at the end
    eval_batches: NonNegativeInt = 0  # global batches of validation text; 0: all of it

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        if (self.steps is None) == (self.tokens is None):
            raise ValueError("give exactly one of steps, tokens")
        return self


class EngineConfig(Section):
    zero_stage: Literal[0, 1, 2, 3] = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"
    num_threads: NonNegativeInt = 0  # CPU threads per rank; 0: cores / local ranks
    deepspeed: dict[str, Any] = {}  # raw DeepSpeed keys, merged on top of the derived ones


class CheckpointConfig(Section):
    every: NonNegativeInt = 0  # steps; 0: only at the end and on SIGTERM
    keep_last: PositiveInt = 2
    keep_every: NonNegativeInt = 0  # steps; 0: keep only the last ones


class LogConfig(Section):
    every: PositiveInt = 10  # steps
    telemetry_every: NonNegativeInt = 50  # steps; 0: off
    tensorboard: bool = True


class RunConfig(Section):
    dir: str


class Config(Section):
    """A whole run. Field order is the order in which a reader meets the questions."""

    run: RunConfig
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    optim: OptimConfig
    transition: TransitionConfig = TransitionConfig()
    quant: QuantConfig = QuantConfig()
    engine: EngineConfig = EngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
