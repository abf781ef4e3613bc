"""How long an optimizer step takes at least, and a run at a stated share of that speed.

Three lower bounds of a stage's time: arithmetic at peak rates; memory traffic, of which only the
unavoidable is counted (weights read once a pass, saved tensors written and read once, the update);
bytes sent. None of them overlaps with itself and all overlap with one another, so the largest
bounds the step; a pipeline's bubble lengthens what happens in passes.
"""

from dataclasses import dataclass, replace
from typing import Literal

from bitscale.config import num_steps, tokens_per_step, transition_step
from bitscale.errors import ConfigError
from bitscale.model import cost
from bitscale.model.cost import Flops, Phase
from bitscale.plan.gpus import Arithmetic
from bitscale.plan.layout import Layout, Stage
from bitscale.plan.wire import Traffic, traffic

Limit = Literal["compute", "memory", "wire"]
SECONDS_PER_DAY = 86400.0


@dataclass(frozen=True)
class StepFlops:
    """Per token, of the whole model on all ranks."""

    forward: Flops
    backward: Flops
    recomputed: Flops

    @property
    def model(self) -> float:
        """What MFU counts: without recomputation (arXiv:2204.02311, appendix B)."""
        return self.forward.total + self.backward.total


@dataclass(frozen=True)
class Bound:
    """The shortest possible optimizer step in one phase."""

    seconds: dict[Limit, float]  # each with the bubble
    mfu: float  # model FLOPs over peak 16-bit FLOPs in that time; int8 can lift it beyond 1

    @property
    def step_seconds(self) -> float:
        return max(self.seconds.values())

    @property
    def limit(self) -> Limit:
        return max(self.seconds, key=lambda name: self.seconds[name])


def step_flops(layout: Layout, phase: Phase) -> StepFlops:
    m, seq_len = layout.cfg.model, layout.cfg.data.seq_len
    forward = cost.forward_flops(m, seq_len)
    recomputed = cost.recomputed_flops(
        m,
        seq_len,
        phase,
        layout.way,
        layout.cfg.train.activation_checkpointing,
        num_layers=None,
    )
    return StepFlops(forward, forward.times(2), recomputed)


def bound(layout: Layout, phase: Phase) -> Bound:
    """Of the slowest stage."""
    stages = [_stage_seconds(layout, stage, phase) for stage in layout.distinct_stages]
    slowest = max(stages, key=lambda seconds: max(seconds.values()))
    peak = layout.cluster.world_size * layout.cluster.gpu.flops_per_second(_plain(layout))
    ideal = step_flops(layout, phase).model * tokens_per_step(layout.cfg) / peak
    return Bound(slowest, ideal / max(slowest.values()))


def phase_steps(layout: Layout) -> dict[Phase, int]:
    """Steps of the run in 16 bit and ternary; a ramp counts as ternary."""
    steps, start = num_steps(layout.cfg), transition_step(layout.cfg)
    sixteen = steps if start is None else start
    return {"16 bit": sixteen, "ternary": steps - sixteen}


def run_days(layout: Layout, mfu: dict[Phase, float]) -> float:
    """Days to the token budget at these MFUs."""
    peak = layout.cluster.world_size * layout.cluster.gpu.flops_per_second(_plain(layout))
    flops = step_flops(layout, "16 bit").model * tokens_per_step(layout.cfg)
    seconds = sum(
        steps * flops / (peak * mfu[phase]) for phase, steps in phase_steps(layout).items()
    )
    return seconds / SECONDS_PER_DAY


def _stage_seconds(layout: Layout, stage: Stage, phase: Phase) -> dict[Limit, float]:
    passes, flow = layout.num_micro_batches, traffic(layout, stage, phase)
    compute = _compute_seconds(layout, stage, phase)
    in_pass, at_end = _memory_seconds(layout, stage, phase)
    stretch = 1 + layout.bubble
    return {
        "compute": stretch * passes * compute,
        "memory": stretch * passes * in_pass + at_end,
        "wire": stretch * sum(_seconds(layout, t) for t in flow if t.in_pass)
        + sum(_seconds(layout, t) for t in flow if not t.in_pass),
    }


def _seconds(layout: Layout, t: Traffic) -> float:
    return t.sent / (1e9 * layout.link_gb_per_second(t.num_ranks, t.stride))


def _compute_seconds(layout: Layout, stage: Stage, phase: Phase) -> float:
    """Of one micro-batch."""
    cfg, gpu = layout.cfg, layout.cluster.gpu
    m, seq_len, tp = cfg.model, cfg.data.seq_len, layout.tp
    forward = cost.forward_flops(
        m, seq_len, num_layers=stage.num_layers, tp=tp, has_head=stage.has_head
    )
    again = cost.recomputed_flops(
        m,
        seq_len,
        phase,
        layout.way,
        cfg.train.activation_checkpointing,
        num_layers=stage.num_layers,
        tp=tp,
    )
    plain = 3 * (forward.attention + forward.head) + again.attention
    seconds = plain / gpu.flops_per_second(_plain(layout))
    onward, back, num_products = product_arithmetic(layout, phase)
    seconds += (forward.matrices + again.matrices) / gpu.flops_per_second(onward)
    seconds += 2 * forward.matrices * num_products / gpu.flops_per_second(back)
    return seconds * layout.micro_batch_tokens


def product_arithmetic(layout: Layout, phase: Phase) -> tuple[Arithmetic, Arithmetic, int]:
    """Arithmetic of the blocks' products, forward and backward, and products per gradient."""
    cfg, plain = layout.cfg, _plain(layout)
    if phase != "ternary" or layout.way == "floating":
        return plain, plain, 1
    if layout.way == "integer" or cfg.quant.kernel == "reference":
        return "fp32", "fp32", 1  # codes as fp32 numbers
    is_cpu = layout.cluster.gpu.name == "cpu"
    if cfg.quant.kernel == ("triton" if is_cpu else "cpu"):
        raise ConfigError(
            f"quant.kernel={cfg.quant.kernel!r} does not run on --gpu {layout.cluster.gpu.name}; "
            "plan with quant.kernel=auto"
        )
    bits = cfg.quant.gradient_bits
    return ("int8", plain, 1) if bits is None else ("int8", "int8", bits // 8)


def _plain(layout: Layout) -> Arithmetic:
    return "bf16" if layout.cfg.train.dtype == "bf16" else "fp32"


def _memory_seconds(layout: Layout, stage: Stage, phase: Phase) -> tuple[float, float]:
    """(of a micro-batch, of the update)."""
    cfg, b, held = layout.cfg, layout.bytes, layout.parameters(stage)
    # What is recomputed is written and read as well.
    at, tokens = replace(layout.setting(phase), checkpointing="none"), layout.micro_batch_tokens
    weight_bytes = 1 if phase == "ternary" and layout.way != "floating" else b
    num_reads = 2 + (cfg.train.activation_checkpointing == "full")
    tables = held.embedding + held.head
    weights = num_reads * weight_bytes * held.matrices + 2 * b * tables
    gradients = (b + 4 + 4) * held.total  # written, and added to an fp32 sum
    saved = stage.num_layers * sum(cost.block_saved_bytes(cfg.model, at).values())
    if stage.has_head:
        saved += sum(cost.head_saved_bytes(cfg.model, at).values())
        # Whatever the slices: log-softmax, its gradient and that of the logits.
        saved += 3.0 * cost.FLOAT_BYTES * cost.shard(cfg.model, layout.tp).vocab
    a_pass = weights + gradients + 2 * tokens * saved
    # Sum, master and both moments read, the last three written; the weights written.
    shares = 1 if cfg.engine.zero_stage == 0 else layout.dp
    update = (4 * 4 + 3 * 4 + b) * held.total / shares
    if phase == "ternary":
        update += (2 * b + 1) * held.matrices  # read for the scale and for the codes
    rate = 1e9 * layout.cluster.gpu.memory_gb_per_second
    return a_pass / rate, update / rate
