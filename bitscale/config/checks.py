"""Conditions that span several keys, checked once, before anything is started."""

import json
import math

from bitscale.config.derived import (
    num_kv_heads,
    num_pipeline_stages,
    num_steps,
    quant_spec,
    residual_peak,
    residual_steps,
    span_steps,
    transition_step,
)
from bitscale.config.schema import Config, ModelConfig
from bitscale.config.spec import SPARSE_BLOCK, kernel_measure, max_exact_inputs
from bitscale.errors import ConfigError

# DeepSpeed keys that bitscale derives; letting a raw section change them would make the
# configuration say one thing and the engine do another.
_OWNED_DEEPSPEED_KEYS = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size / (micro_batch_size x ranks)",
    "gradient_clipping": "optim.clip",
    "bf16": "train.dtype",
    "fp16": "train.dtype",
    "data_types": "train.dtype",
    "optimizer": "optim",
    "scheduler": "optim.schedule",
    "pipeline": "parallel.pp",
    "wandb": "log.wandb",
    "comet": "log.comet",
}

# DeepSpeed's ZeRO options that put masters or their 16-bit copies elsewhere, or (leaf modules) use
# several layers' weights at once.
_FOREIGN_SHARES = (
    "offload_optimizer",
    "offload_param",
    "zenflow",
    "zero_hpz_partition_size",
    "mics_shard_size",
    "zero_quantized_weights",
    "stage3_module_granularity_threshold",
)


def check(cfg: Config) -> None:
    """Raise ConfigError for the first impossible combination."""
    _check_model(cfg)
    _check_engine(cfg)
    _check_optimizer(cfg)
    _check_schedule(cfg)
    _check_transition(cfg)
    _check_guard(cfg)
    _check_quant(cfg)
    _check_parallel(cfg)
    _check_ternary_gather(cfg)


def check_world_size(cfg: Config, world_size: int) -> None:
    """Raise ConfigError if the model or the global batch cannot be split over the ranks."""
    if world_size < 1:
        raise ConfigError(f"world_size={world_size} is not a number of ranks; use 1 or more")
    sharing = cfg.parallel.tp * cfg.parallel.pp
    if world_size % sharing:
        nearest = max(world_size // sharing, 1) * sharing
        raise ConfigError(
            f"parallel.tp={cfg.parallel.tp} x parallel.pp={cfg.parallel.pp} does not divide "
            f"world_size={world_size}; launch {nearest} ranks, or lower tp or pp"
        )
    num_replicas = world_size // sharing
    micro, whole = cfg.train.micro_batch_size, cfg.train.global_batch_size
    if whole % (micro * num_replicas):
        unit = micro * num_replicas
        below, above = whole // unit * unit, -(-whole // unit) * unit
        near = f"{below} or {above}" if below else f"{above}"
        raise ConfigError(
            f"train.global_batch_size={whole} is not a multiple of train.micro_batch_size={micro} "
            f"x {num_replicas} data-parallel ranks (world_size={world_size}); use a global batch "
            f"of {near}, or another number of ranks"
        )
    per_pipeline, least = whole // (micro * num_replicas), num_pipeline_stages(cfg)
    if cfg.parallel.pipeline_schedule == "dualpipev" and per_pipeline < least:
        raise ConfigError(
            f"parallel.pipeline_schedule='dualpipev' needs {least} micro-batches a step for "
            f"parallel.pp={cfg.parallel.pp}, and train.global_batch_size={whole} gives "
            f"{per_pipeline}; use a global batch of {least * micro * num_replicas}, or 1f1b"
        )


def _check_model(cfg: Config) -> None:
    m = cfg.model
    if m.d_model % m.num_heads:
        raise ConfigError(
            f"model.d_model={m.d_model} is not a multiple of model.num_heads={m.num_heads}; "
            "change one of them"
        )
    if (m.d_model // m.num_heads) % 2:
        raise ConfigError(
            f"model.d_model={m.d_model} / model.num_heads={m.num_heads} gives an odd head size; "
            "rotary embeddings need an even one"
        )
    if m.num_heads % num_kv_heads(cfg):
        raise ConfigError(
            f"model.num_heads={m.num_heads} is not a multiple of "
            f"model.num_kv_heads={m.num_kv_heads}; grouped-query attention needs whole groups"
        )
    if m.norm == "layernorm" and m.sub_norm:
        raise ConfigError(
            f"model.sub_norm={json.dumps(m.sub_norm)} needs model.norm='rmsnorm' (BitNet's SubLN "
            "is an RMSNorm)"
        )


def _check_engine(cfg: Config) -> None:
    if cfg.train.dtype == "bf16" and cfg.engine.zero_stage == 0:
        # DeepSpeed then accumulates gradients in bf16, or refuses (docs/architecture.md).
        raise ConfigError(
            "engine.zero_stage=0 with train.dtype='bf16' has no fp32 gradient accumulation in "
            "DeepSpeed; use engine.zero_stage=1 (the same update) or train.dtype='fp32'"
        )
    if cfg.train.compile and (cfg.engine.zero_stage == 3 or cfg.parallel.tp > 1):
        raise ConfigError(
            f"train.compile=true makes one graph of a block, and engine.zero_stage="
            f"{cfg.engine.zero_stage} with parallel.tp={cfg.parallel.tp} communicates inside of "
            "it; use engine.zero_stage=1 or 2 with parallel.tp=1, or train.compile=false"
        )
    raw = cfg.engine.deepspeed
    for key, ours in _OWNED_DEEPSPEED_KEYS.items():
        if key in raw:
            raise ConfigError(f"engine.deepspeed.{key} is derived from {ours}; set that instead")
    zero = raw.get("zero_optimization", {})
    if isinstance(zero, dict) and "stage" in zero:
        raise ConfigError(
            "engine.deepspeed.zero_optimization.stage is derived; set engine.zero_stage instead"
        )


# Why an optimizer that DeepSpeed or others offer does not run here (docs/optimizers.md).
_REFUSED_OPTIMIZERS = {
    "muon": "runs in DeepSpeed on data-parallel ranks only, and keeps its momentum at each stage "
    "in another place, where neither policies nor checkpoints at another layout reach it",
    "adamw8bit": "keeps its moments as codes that share a scale per block, which neither policies "
    "nor checkpoints at another layout can address element by element",
}


def _check_optimizer(cfg: Config) -> None:
    name, policy = cfg.optim.name, cfg.transition.optimizer_state
    if name in _REFUSED_OPTIMIZERS:
        raise ConfigError(
            f"optim.name={name!r} {_REFUSED_OPTIMIZERS[name]}; use adamw, or lion with one moment"
        )
    if name == "lion" and policy == "keep_second_moment":
        raise ConfigError(
            "transition.optimizer_state='keep_second_moment' with optim.name='lion', which has no "
            "second moment; use keep, reset or {scale: f}"
        )


def _check_schedule(cfg: Config) -> None:
    steps = num_steps(cfg)
    warmup = span_steps(cfg.optim.warmup, cfg)
    if warmup > steps:
        raise ConfigError(f"optim.warmup is {warmup} steps, longer than the run of {steps}")
    horizon = steps if cfg.optim.horizon is None else span_steps(cfg.optim.horizon, cfg)
    if cfg.optim.schedule in ("linear", "cosine", "trilm") and warmup > horizon:
        raise ConfigError(
            f"optim.warmup is {warmup} steps, longer than optim.horizon of {horizon}: the learning "
            "rate would fall to its end right after its peak; lengthen the horizon"
        )
    if cfg.optim.schedule == "wsd" and warmup + span_steps(cfg.optim.decay, cfg) > steps:
        raise ConfigError(
            f"optim.warmup ({warmup} steps) and optim.decay "
            f"({span_steps(cfg.optim.decay, cfg)} steps) do not fit into {steps} steps; shorten one"
        )
    if cfg.train.stop_step is not None and cfg.train.stop_step > steps:
        raise ConfigError(
            f"train.stop_step={cfg.train.stop_step} lies beyond the run of {steps} steps"
        )


def _check_transition(cfg: Config) -> None:
    start = transition_step(cfg)
    if start is None:
        return
    steps, t = num_steps(cfg), cfg.transition
    if start >= steps:
        raise ConfigError(
            f"transition.at is step {start}, but the run has {steps} steps; "
            "move it earlier, or set transition.at=null for a 16-bit run"
        )
    for key, ramp in (("ramp", t.ramp), ("activation_ramp", t.activation_ramp)):
        if ramp is None:
            continue
        length = span_steps(ramp.over, cfg)
        if ramp.shape == "none" and length:
            raise ConfigError(
                f"transition.{key}.over is {length} steps but transition.{key}.shape='none'; "
                "choose a shape (linear, paper, exponential, sigmoid, cosine) or set over to 0"
            )
        if ramp.shape != "none" and not length:
            raise ConfigError(
                f"transition.{key}.shape={ramp.shape!r} needs transition.{key}.over > 0 steps"
            )
        if start + length > steps - 1:  # as exports ask: of the last step done
            raise ConfigError(
                f"transition.{key} ends at step {start + length}, but the run's last step is "
                f"{steps - 1}: the model would never be fully ternary; shorten it or start earlier"
            )
    _check_residual(cfg, start)
    if t.lr == "decay" and cfg.optim.schedule not in ("constant", "wsd"):
        raise ConfigError(
            f"transition.lr='decay' fuses the decay with the transition and needs "
            f"optim.schedule constant or wsd, not {cfg.optim.schedule!r}"
        )
    if t.lr == "decay" and cfg.optim.schedule == "wsd":
        decay_step = steps - span_steps(cfg.optim.decay, cfg)
        if start > decay_step:
            # The fused decay starts at the plateau: the learning rate would jump up again.
            raise ConfigError(
                f"transition.at is step {start}, but optim.decay already begins at step "
                f"{decay_step} and transition.lr='decay' would lift the learning rate again; "
                "shorten optim.decay, move the transition earlier, or use transition.lr=continue"
            )


def _check_residual(cfg: Config, start: int) -> None:
    if not residual_peak(cfg):
        return
    steps = num_steps(cfg)
    if start + residual_steps(cfg) > steps - 1:
        raise ConfigError(
            f"transition.residual ends at step {start + residual_steps(cfg)}, but the run's last "
            f"step is {steps - 1}: the finished model would still contain 16-bit weights; shorten "
            "transition.residual.over, or leave it out"
        )
    if cfg.parallel.tp > 1:
        raise ConfigError(
            f"transition.residual adds 16-bit products that parallel.tp={cfg.parallel.tp} does not "
            "share; use parallel.tp=1, or transition.residual.peak=0"
        )
    kernel, bits = cfg.quant.kernel, cfg.quant.gradient_bits
    if kernel not in ("auto", "reference") or bits is not None:
        raise ConfigError(
            f"transition.residual needs 16-bit products beside the quantized ones, which "
            f"quant.kernel={kernel!r} with quant.gradient_bits={bits} does not compute; use "
            "quant.kernel=reference without gradient_bits, or transition.residual.peak=0"
        )


def _check_guard(cfg: Config) -> None:
    guard, t = cfg.transition.guard, cfg.transition
    if guard.action == "stop":
        return
    if cfg.checkpoint.every == 0:
        raise ConfigError(
            f"transition.guard.action={guard.action!r} goes back to a checkpoint, and "
            "checkpoint.every=0 saves none on the way; set checkpoint.every"
        )
    ramps = [ramp for ramp in (t.ramp, t.activation_ramp) if ramp is not None]
    if guard.action == "rollback_slower" and (
        t.at is None or all(ramp.shape == "none" for ramp in ramps)
    ):
        raise ConfigError(
            "transition.guard.action='rollback_slower' needs a ramp to slow down; set "
            "transition.at and transition.ramp, or use skip_batch"
        )


def _check_quant(cfg: Config) -> None:
    spec, m = quant_spec(cfg.quant), cfg.model
    widths = {"model.d_model": m.d_model, "model.d_ff": m.d_ff}
    if spec.weight.granularity == "row_shard":
        widths["the width of keys and values"] = m.d_model // m.num_heads * num_kv_heads(cfg)
    divisor = spec.hadamard or spec.weight.group_size or spec.weight.num_shards or 1
    what = "hadamard" if spec.hadamard else spec.weight.granularity
    for name, width in widths.items():
        if spec.weight.measure == "sparse_absmean" and width % SPARSE_BLOCK:
            raise ConfigError(
                f"quant.preset={cfg.quant.preset!r} zeroes one of each {SPARSE_BLOCK} inputs, "
                f"which does not divide {name}={width}; choose another size or preset"
            )
        if width % divisor:
            raise ConfigError(
                f"quant: {divisor} ({what}) does not divide {name}={width}; "
                "choose another size or granularity"
            )
    if spec.product == "integer" and spec.activation is not None:
        limit = max_exact_inputs(spec)
        num_inputs = {"model.d_model": m.d_model, "model.d_ff": m.d_ff // cfg.parallel.tp}
        for name, number in num_inputs.items():
            if number > limit:
                raise ConfigError(
                    f"quant.preset={cfg.quant.preset!r} sums products of codes exactly for up to "
                    f"{limit} inputs of a matrix, and {name} gives it {number}; use a preset "
                    "without integer products (docs/quantizers.md), or a smaller model"
                )


def check_tensor_parallel(m: ModelConfig, tp: int) -> None:
    """Raise ConfigError if `tp` ranks cannot share the matrices of this shape."""
    for key, size in (("num_heads", m.num_heads), ("d_model", m.d_model), ("d_ff", m.d_ff)):
        if size % tp:
            raise ConfigError(
                f"parallel.tp={tp} does not divide model.{key}={size}; use tp={math.gcd(tp, size)}"
            )
    kv_heads = m.num_kv_heads or m.num_heads
    if kv_heads % tp and tp % kv_heads:
        raise ConfigError(
            f"parallel.tp={tp} neither divides nor is a multiple of the {kv_heads} key/value "
            f"heads; use tp={math.gcd(tp, kv_heads)}, or other model.num_kv_heads"
        )
    if tp > 1 and m.qk_norm == "width":
        raise ConfigError(
            f"parallel.tp={tp} shares out the heads, and model.qk_norm='width' norms all of them "
            "together; use parallel.tp=1"
        )


def _check_parallel(cfg: Config) -> None:
    """What tensor, sequence and pipeline parallelism ask of the model and of ZeRO."""
    p, m = cfg.parallel, cfg.model
    check_tensor_parallel(m, p.tp)
    if p.sequence_parallel and p.tp == 1:
        raise ConfigError(
            "parallel.sequence_parallel=true splits the sequence over the tensor parallel ranks, "
            "and parallel.tp=1; raise tp or set it to false"
        )
    if p.sequence_parallel and cfg.data.seq_len % p.tp:
        raise ConfigError(
            f"parallel.sequence_parallel splits data.seq_len={cfg.data.seq_len} over "
            f"parallel.tp={p.tp} ranks, which does not divide it; change one of them"
        )
    if p.tp > 1 and cfg.engine.zero_stage == 0:
        raise ConfigError(
            f"parallel.tp={p.tp} with engine.zero_stage=0: the gradient norm over tensor parallel "
            "ranks is DeepSpeed's ZeRO optimizer's; use engine.zero_stage=1 (the same update)"
        )
    if p.pp == 1 and p.pipeline_schedule != "1f1b":
        raise ConfigError(
            f"parallel.pipeline_schedule={p.pipeline_schedule!r} with parallel.pp=1 has no "
            "pipeline to schedule; raise pp, or leave the schedule out"
        )
    if num_pipeline_stages(cfg) > m.num_layers:
        raise ConfigError(
            f"parallel.pp={p.pp} with pipeline_schedule={p.pipeline_schedule!r} makes "
            f"{num_pipeline_stages(cfg)} stages for model.num_layers={m.num_layers}; use at most "
            "as many"
        )
    if p.pp > 1 and cfg.engine.zero_stage != 1:
        raise ConfigError(
            f"parallel.pp={p.pp} with engine.zero_stage={cfg.engine.zero_stage}: DeepSpeed's "
            "pipeline keeps gradients and weights whole (stages 2 and 3 are refused), and clips "
            "wrongly at stage 0; use engine.zero_stage=1"
        )


def _check_ternary_gather(cfg: Config) -> None:
    if not cfg.engine.ternary_gather:
        if cfg.engine.packed_codes:
            raise ConfigError(
                "engine.packed_codes=true with engine.ternary_gather=false, where codes are made "
                "of 16-bit weights and never packed; set ternary_gather=true, or packed_codes=false"
            )
        if cfg.engine.code_packing != "2bit":
            raise ConfigError(
                f"engine.code_packing={cfg.engine.code_packing!r} with "
                "engine.ternary_gather=false, where no rank sends codes; set ternary_gather=true, "
                "or leave code_packing out"
            )
        return
    stage = cfg.engine.zero_stage
    if stage == 0:
        raise ConfigError(
            "engine.ternary_gather=true with engine.zero_stage=0, which keeps whole masters on "
            "every rank; use engine.zero_stage=1, 2 or 3, or ternary_gather=false"
        )
    if cfg.parallel.pp > 1 and cfg.train.dtype == "fp32":
        raise ConfigError(
            f"engine.ternary_gather=true with parallel.pp={cfg.parallel.pp} and train.dtype='fp32':"
            " DeepSpeed's fp32 optimizer needs equally many parameter groups in every pipeline "
            "stage, which groups of ternary matrices would not be; use train.dtype=bf16, or "
            "ternary_gather=false"
        )
    if kernel_measure(quant_spec(cfg.quant)) != "absmean":
        raise ConfigError(
            f"engine.ternary_gather=true with quant.preset={cfg.quant.preset!r}: ranks add up "
            "shares of mean |w|, and only b158's scale is that of a whole matrix with codes that "
            "kernels multiply; use quant.preset=b158 without overrides, or ternary_gather=false"
        )
    zero = cfg.engine.deepspeed.get("zero_optimization", {})
    for key in _FOREIGN_SHARES if isinstance(zero, dict) else ():
        if zero.get(key):
            raise ConfigError(
                f"engine.ternary_gather=true with engine.deepspeed.zero_optimization.{key}="
                f"{json.dumps(zero[key])}: codes are made of each rank's own share of every matrix "
                "on the training device, and stay for the whole step; "
                f"leave {key} out, or set ternary_gather=false"
            )
