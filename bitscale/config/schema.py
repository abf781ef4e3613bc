"""The typed configuration: every key that a run understands, its type, default and meaning.

Configuration is inert: frozen, no I/O, nothing derived behind the reader's back. Values that
follow from others (number of steps, transition step) are functions in `derived.py`; conditions
that span several keys are in `checks.py`.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
# Token counts are written as 4e9 too; a whole number stays a whole number.
_whole = BeforeValidator(lambda v: int(v) if isinstance(v, float) and v.is_integer() else v)
PositiveTokens = Annotated[PositiveInt, _whole]
NonNegativeTokens = Annotated[NonNegativeInt, _whole]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Beta = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]  # 1 is refused by Adam


class Section(BaseModel):
    """Base of every section: unknown keys and implicit conversions are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Point(Section):
    """A moment of the run, given in exactly one unit."""

    step: NonNegativeInt | None = None  # 0-based optimizer step
    tokens: NonNegativeTokens | None = None  # tokens seen, rounded to the nearest step
    fraction: Fraction | None = None  # of all steps

    @model_validator(mode="after")
    def _one_unit(self) -> Self:
        if sum(v is not None for v in (self.step, self.tokens, self.fraction)) != 1:
            raise ValueError("give exactly one of step, tokens, fraction")
        return self


class Span(Section):
    """A length of the run, given in exactly one unit."""

    steps: NonNegativeInt | None = None  # optimizer steps
    tokens: NonNegativeTokens | None = None  # tokens, rounded to the nearest step
    fraction: Fraction | None = None  # of all steps

    @model_validator(mode="after")
    def _one_unit(self) -> Self:
        if sum(v is not None for v in (self.steps, self.tokens, self.fraction)) != 1:
            raise ValueError("give exactly one of steps, tokens, fraction")
        return self


class RopeScaling(Section):
    """Context extension of the rotary embedding (names as in Hugging Face configurations)."""

    # linear: every frequency / factor; llama3: long wavelengths only
    type: Literal["linear", "llama3"]
    factor: Annotated[float, Field(ge=1)]  # new context over the original one
    low_freq_factor: PositiveFloat = 1.0  # llama3: turns below which a frequency is stretched
    high_freq_factor: PositiveFloat = 4.0  # llama3: turns above which it is kept
    original_context: PositiveInt = 8192  # llama3: positions of the pretraining before


class ModelConfig(Section):
    """Shape of a Llama-family decoder. `vocab_size: null` takes the corpus's tokenizer."""

    vocab_size: PositiveInt | None = None  # null: the tokenizer's
    num_layers: PositiveInt  # decoder blocks
    d_model: PositiveInt  # width of the residual stream
    num_heads: PositiveInt  # query heads; head width d_model / num_heads
    num_kv_heads: PositiveInt | None = None  # null: as many as num_heads
    d_ff: PositiveInt  # width inside the feed-forward
    mlp: Literal["swiglu", "relu2_glu", "relu2"] = "swiglu"  # relu2: ReLU squared
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"  # layernorm has no bias
    norm_affine: bool = True  # OLMo-1B's layernorm has no weight
    norm_eps: PositiveFloat = 1e-5  # added to the mean square or variance
    post_norm: bool = False  # norms after attention and feed-forward (OLMo 2), not before
    rope_theta: PositiveFloat = 10000.0  # base of the rotary frequencies
    rope_scaling: RopeScaling | None = None  # null: none
    # SubLN: a norm before the output and down projections; transition: blended in with λ
    sub_norm: bool | Literal["transition"] = False
    # RMSNorm of queries and keys, per head; width: of all heads together (OLMo 2)
    qk_norm: bool | Literal["width"] = False
    tie_embeddings: bool = True  # the head shares the embedding
    # in the linear layers of the blocks; attention: in its four only; qkv: in its first three only
    bias: bool | Literal["attention", "qkv"] = False
    head_bits: Literal[8, 16] = 16  # 8: 8-bit weights and activations, following λ
    init_std: PositiveFloat = 0.02  # std of N(0, std²); / sqrt(2 · layers) in o and down


Checkpointing = Literal["none", "selective", "full"]
Packing = Literal["2bit", "base3"]
PresetName = Literal[
    "b158",
    "hf",
    "onebit",
    "torchao",
    "sdu",
    "absmedian",
    "trilm",
    "twn",
    "stochastic",
    "weight_only",
    "group64",
    "group128",
    "group256",
    "int2",
    "int3",
    "int4",
    "quest",
    "paretoq",
    "tequila",
    "sherry",
]


class QuantConfig(Section):
    """What λ = 1 means for the decoder's linear layers: a preset, and what differs from it.

    `null` leaves the preset's choice (docs/quantizers.md).
    """

    preset: PresetName = "b158"  # formulas and sources: docs/quantizers.md
    # the scale: mean, lower median or maximum of |w|; twn: the mean above 0.75 of the mean
    weight_scale: Literal["absmean", "absmedian", "absmax", "twn"] | None = None
    weight_bits: Literal[2, 3, 4] | None = None  # two's complement codes instead of ternary
    # what shares a weight scale: the logical matrix, an output row, group_size columns of a row,
    # or one of num_shards equal blocks of rows or columns
    granularity: Literal["matrix", "row", "group", "row_shard", "column_shard"] | None = None
    group_size: PositiveInt | None = None  # granularity group
    num_shards: PositiveInt | None = None  # granularity row_shard, column_shard
    # of weights and activations; stochastic: of weights only
    rounding: Literal["half_even", "half_up", "half_away", "stochastic"] | None = None
    activation_bits: Literal[8, 16] | None = None  # 16: weight-only quantization
    # the code of a token's largest |x|; 128 is cut to 127
    activation_max: Literal[127, 128] | None = None
    norm: Literal["none", "layernorm"] | None = None  # of the input, affine-free, at every λ
    gradient: Literal["identity", "clip"] | None = None  # clip: 0 beyond the outermost code
    # share of the weights with code 0 that is added to the output as a bias (tequila: 0.001)
    deadzone_bias: NonNegativeFloat | None = None
    eps: PositiveFloat = 1e-5  # smallest scale of weights, smallest maximum of activations
    # of the gradient in the backward products: integers, 8 rounded stochastically; null: floating
    gradient_bits: Literal[8, 16, 24] | None = None
    # what computes b158 and absmedian. reference: plain PyTorch; cpu: compiled C and int8
    # products; triton: on NVIDIA GPUs; auto: cpu or triton where it runs (docs/kernels.md)
    kernel: Literal["auto", "reference", "cpu", "triton"] = "reference"


class CorpusConfig(Section):
    """One prepared corpus (a directory written by `bitscale prepare`) and its share."""

    path: str  # directory that `bitscale prepare` wrote
    weight: PositiveFloat = 1.0  # share of the sequences, relative to the other weights


class DataConfig(Section):
    corpora: tuple[CorpusConfig, ...] = Field(min_length=1)  # replaced whole by an override
    seq_len: PositiveInt  # tokens per sequence
    reset_attention: bool = False  # attend within a document only
    seed: NonNegativeInt = 0  # order of the sequences


class OptimConfig(Section):
    """The optimizer and the learning-rate schedule (docs/optimizers.md, docs/schedules.md)."""

    # adamw or lion; adamw8bit and muon are refused, with the reason
    name: Literal["adamw", "lion", "adamw8bit", "muon"] = "adamw"
    lr: PositiveFloat  # peak learning rate
    betas: tuple[Beta, Beta] = (0.9, 0.95)  # of the moments; lion's paper has .9, .99
    eps: PositiveFloat = 1e-8  # adamw's
    weight_decay: NonNegativeFloat = 0.1  # decoupled; of matrices only
    clip: NonNegativeFloat = 1.0  # global gradient norm; 0 turns clipping off
    # formulas: docs/schedules.md
    schedule: Literal["constant", "linear", "cosine", "wsd", "trilm"] = "cosine"
    warmup: Span = Span(fraction=0.02)  # linear, from lr / steps to lr
    min_lr_ratio: Fraction = 0.1  # learning rate at the end / lr
    decay: Span = Span(fraction=0.2)  # wsd: length of the final decay
    horizon: Span | None = None  # linear, cosine, trilm: where the schedule ends; null: the run
    trilm_lr_ratio: Fraction = 0.6  # trilm: peak after the drop over peak before
    trilm_drop_at: Fraction = 0.5  # trilm: when, as a fraction of the horizon


RampShape = Literal["none", "linear", "paper", "exponential", "sigmoid", "cosine"]


class RampConfig(Section):
    """How λ goes from 0 to 1 once the transition has begun."""

    shape: RampShape = "none"  # none: λ jumps to 1
    over: Span = Span(steps=0)  # from the transition on


class ResidualConfig(Section):
    """Sherry's residual ε x wᵀ, added to every quantized layer's output (docs/schedules.md)."""

    peak: NonNegativeFloat | None = None  # largest ε; null: the preset's (sherry 1, others 0)
    warmup: Fraction = 0.1  # of its length, linear from 0 to the peak; then a cosine to 0
    over: Span | None = None  # length from the transition on; null: up to the run's last step


# YAML 1.1 reads a bare `off` as false.
WeightDecayPolicy = Annotated[
    Literal["constant", "off", "off_at"], BeforeValidator(lambda v: "off" if v is False else v)
]


class GuardConfig(Section):
    """What happens when the loss leaps, or it or the gradient is not finite (docs/guard.md)."""

    spike: PositiveFloat | None = None  # nats above the running level; null: not watched
    window: PositiveInt = 64  # steps before, whose median loss is the running level
    # both go back to a checkpoint: rollback_slower goes on with a slower ramp, skip_batch without
    # the batch; stop is an error, and the last checkpoint stays as it is
    action: Literal["stop", "rollback_slower", "skip_batch"] = "stop"
    max_retries: PositiveInt = 3  # rollbacks in all; then stop
    slower: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 2.0  # the rest of the ramp
    skip_batches: PositiveInt = 1  # skip_batch: the batch of the step, and those before it


class ScaledMoments(Section):
    """The moments of before count f times as much, as if those gradients had been f times theirs.

    exp_avg · f and exp_avg_sq · f²: the next update keeps its size, and f < 1 lets the gradients of
    after it take over sooner.
    """

    scale: PositiveFloat  # f; 1 keeps, towards 0 forgets (to reset, say `reset`)


OptimizerState = Literal["keep", "reset", "keep_second_moment"] | ScaledMoments


class TransitionConfig(Section):
    """16 bit -> ternary. `at: null` never switches; `at: {step: 0}` is ternary from scratch."""

    at: Point | None = None  # first quantized step; null: 16 bit throughout
    ramp: RampConfig = RampConfig()  # λ of weights
    activation_ramp: RampConfig | None = None  # null: as `ramp`
    residual: ResidualConfig = ResidualConfig()  # ε x wᵀ beside the quantized product
    # the optimizer's moments when the transition begins; {scale: f} multiplies them
    optimizer_state: OptimizerState = "keep"
    # rewarm: a second warm-up; decay: linear, from the transition to the end
    lr: Literal["continue", "rewarm", "decay"] = "continue"
    lr_rewarm: Span = Span(fraction=0.02)  # rewarm: length of the second warm-up
    # off: from the transition on; off_at: from weight_decay_off_at on
    weight_decay: WeightDecayPolicy = "constant"
    weight_decay_off_at: Point = Point(fraction=2 / 3)  # with or without a transition
    guard: GuardConfig = GuardConfig()  # with or without a transition


class TrainConfig(Section):
    steps: PositiveInt | None = None  # exactly one of steps, tokens
    tokens: PositiveTokens | None = None  # rounded up to whole steps
    stop_step: PositiveInt | None = None  # end this session early, schedules unchanged
    global_batch_size: PositiveInt  # sequences per optimizer step
    micro_batch_size: PositiveInt  # sequences per forward pass and rank
    dtype: Literal["bf16", "fp32"] = "bf16"  # of weights and activations; masters are fp32
    seed: NonNegativeInt = 0  # initial weights
    # recomputed in the backward pass; selective: norms, attention, the gated product and codes, but
    # no matrix product; full: whole blocks
    activation_checkpointing: Checkpointing = "none"
    # torch.compile of the decoder blocks, while λ is 0 or 1; on a CPU it needs a C++ compiler
    compile: bool = False
    eval_every: NonNegativeInt = 0  # steps; 0: only at the end
    eval_batches: NonNegativeInt = 0  # global batches of validation text; 0: all of it

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        if (self.steps is None) == (self.tokens is None):
            raise ValueError("give exactly one of steps, tokens")
        return self


class EngineConfig(Section):
    zero_stage: Literal[0, 1, 2, 3] = 1  # DeepSpeed's ZeRO; 0 only with fp32
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: CUDA if there is one
    # fully ternary, ranks exchange packed codes in place of 16-bit ternary matrices
    ternary_gather: bool = False
    # with ternary_gather: codes are kept packed, not in int8; null: true at stage 3
    packed_codes: bool | None = None
    # with ternary_gather: 2 bits a code; base3: five codes to a byte, 1.6 bits
    code_packing: Packing = "2bit"
    num_threads: NonNegativeInt = 0  # CPU threads per rank; 0: cores / local ranks
    deepspeed: dict[str, Any] = {}  # raw DeepSpeed keys, merged on top of the derived ones


class ParallelConfig(Section):
    """How ranks share the model; what is left of them is data parallel: world size / (tp · pp)."""

    tp: PositiveInt = 1  # tensor parallel ranks, which share every matrix
    pp: PositiveInt = 1  # pipeline stages, which share the layers
    # dualpipev: each rank has two stages, the first rank the first and the last
    pipeline_schedule: Literal["1f1b", "dualpipev"] = "1f1b"
    sequence_parallel: bool = False  # norms and residuals split along the sequence, over tp


class CheckpointConfig(Section):
    every: NonNegativeInt = 0  # steps; 0: only at the end and on SIGTERM
    keep_last: PositiveInt = 2  # checkpoints
    keep_every: NonNegativeInt = 0  # steps; 0: keep only the last ones
    at: tuple[PositiveInt, ...] = ()  # further steps after which it is saved, and kept
    # train on while the files are written, at the price of a copy of the state in host memory
    asynchronous: bool = True


class WandbConfig(Section):
    """Weights & Biases, by DeepSpeed's monitor; its key comes from the environment."""

    project: str  # in which the run is shown
    group: str | None = None  # of runs in it
    team: str | None = None  # the entity; null: the account's default


class CometConfig(Section):
    """Comet, by DeepSpeed's monitor; its key comes from the environment."""

    project: str  # in which the experiment is shown
    workspace: str | None = None  # null: the account's default
    experiment_name: str | None = None  # null: Comet chooses one
    online: bool | None = None  # false: into an archive on disk


class LogConfig(Section):
    every: PositiveInt = 10  # steps
    telemetry_every: NonNegativeInt = 50  # steps; 0: off
    tensorboard: bool = True  # event files under run.dir, beside metrics.jsonl
    wandb: WandbConfig | None = None  # needs the package wandb
    comet: CometConfig | None = None  # needs the package comet_ml


class WatchConfig(Section):
    """How a run is watched, and when it gives up waiting (docs/watching.md)."""

    heartbeat_seconds: NonNegativeFloat = 5.0  # between two writings of a rank; 0: off
    # without progress (four times that at start-up and in a save), until a rank says where it hangs
    # and ends with exit code 3; 0: off
    hang_seconds: NonNegativeFloat = 1800.0
    # that a rank waits for the others in one collective; longer than hang_seconds, or the stacks
    # are not written
    collective_timeout_seconds: PositiveFloat = 2400.0
    # own time of the slowest rank over the median of the others, from which it is named; null: off
    straggler_ratio: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = 1.2
    metrics_port: Annotated[int, Field(gt=0, lt=65536)] | None = None  # Prometheus; null: off
    metrics_host: str = "127.0.0.1"  # address that it is bound to; 0.0.0.0: every network


class RunConfig(Section):
    dir: str  # metrics, checkpoints, resolved configuration


class Config(Section):
    """A whole run. Field order is the order in which a reader meets the questions."""

    run: RunConfig  # where it is written
    model: ModelConfig  # what is trained
    data: DataConfig  # on what
    train: TrainConfig  # how long, how large, how precise
    optim: OptimConfig  # how it learns
    transition: TransitionConfig = TransitionConfig()  # when and how it becomes ternary
    quant: QuantConfig = QuantConfig()  # what ternary means
    parallel: ParallelConfig = ParallelConfig()  # over which ranks
    engine: EngineConfig = EngineConfig()  # on which machinery
    checkpoint: CheckpointConfig = CheckpointConfig()  # how often it is saved
    log: LogConfig = LogConfig()  # how often it reports
    watch: WatchConfig = WatchConfig()  # how it is watched
