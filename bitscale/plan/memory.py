"""What one rank holds, by part, at its fullest moment.

The engine's parts follow DeepSpeed 0.19.8 with our settings (fp32 accumulation and reduction):

    stage 0, fp32   plain gradients, Adam on the weights themselves
    stage 1, bf16   BF16_Optimizer: bf16 gradients of one pass, and a whole fp32 sum of them
    stage 1, fp32   DeepSpeedZeroOptimizer: whole gradients, a reduction bucket of fixed size
    stage 2         a bucket instead of gradients, the fp32 sum in shares
    stage 3         weights in shares too; those in use are gathered (zero3.py)
"""

from dataclasses import dataclass

from bitscale.config import ModelConfig, OptimConfig, moments_of, packs_codes
from bitscale.model import cost
from bitscale.model.cost import Phase
from bitscale.plan.layout import Layout, Stage, zero_option
from bitscale.plan.zero3 import VISIT, Gathered, Use, gathered

PARTS = (
    "weights",
    "gathered weights",
    "codes and copies",
    "gradients",
    "fp32 accumulation",
    "optimizer",
    "communication buffers",
)
_UNREDUCED_ELEMENTS = 500_000_000  # what BF16_Optimizer and stage 0 put into one reduction


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank."""

    parts: dict[str, float]  # PARTS
    activations: dict[str, float]  # by kind, at the start of a backward pass
    logits: float  # and what follows from them, at the same moment
    workspace: float  # gradients within a block, which are there after them
    block: float  # of one block of one micro-batch: what it saves, and gradients within it
    layers: float  # of `activations`: what the blocks keep
    recomputed: float  # of one block: what it computes again, and gradients within it
    passing_gradients: float  # of `parts`: those that exist only from backward pass to update
    block_gradients: float  # of those: of the block whose backward pass is the last
    other_passes: float  # of `activations`: of micro-batches whose backward pass is yet to come
    reduction_copy: float  # of the gradients, after the backward pass

    @property
    def moments(self) -> dict[str, float]:
        """Bytes when a backward pass begins, in its recomputed blocks, in its last block, and when
        gradients are reduced. Between the first and the third, gradients take the place of
        activations block by block: one of the two ends is the higher."""
        always = sum(self.parts.values()) - self.passing_gradients
        moments = {
            "start of the backward pass": always
            + sum(self.activations.values())
            + max(self.logits, self.workspace),
            "end of the backward pass": always
            + self.passing_gradients
            - self.block_gradients
            + self.other_passes
            + self.block,
            "reduction of the gradients": always + self.passing_gradients + self.reduction_copy,
        }
        if self.recomputed:
            moments["recomputation of a block"] = always + self.layers + self.recomputed
        return moments

    @property
    def peak(self) -> float:
        return max(self.moments.values())

    @property
    def peak_moment(self) -> str:
        return max(self.moments, key=lambda name: self.moments[name])


def memory(layout: Layout, stage: Stage, phase: Phase) -> Memory:
    """Of a rank of `stage` during `phase`."""
    at, cfg = layout.setting(phase), layout.cfg
    held = layout.parameters(stage)
    copy = layout.tied_copy(stage)
    num_elements = held.total - copy  # that this stage's optimizer knows
    share = num_elements / layout.dp
    b, zero = layout.bytes, cfg.engine.zero_stage
    moment_bytes = 4.0 * len(moments_of(cfg.optim))
    matrices = [m.numel for m in cost.block_matrices(cfg.model, layout.tp)]
    table = held.embedding or held.head
    largest = max(table, *matrices)
    weights = float(b * (held.total - layout.exchanged_codes(stage, phase)))
    gathered_elements = 0.0
    if zero == 3:
        persistent = persistent_elements(layout, stage, phase)
        weights = b * (share + persistent)
        gathered_elements = gathered_weights(layout, stage, phase).peak_elements
    parts = {
        "weights": weights,
        "gathered weights": b * gathered_elements,
        "codes and copies": _copies(layout, stage, phase),
        "gradients": float(b * (num_elements if zero < 2 else largest)),
        "fp32 accumulation": 4.0 * copy
        + {0: 0.0, 1: 4.0 * num_elements if b == 2 else 4.0 * share}.get(zero, 4.0 * share),
        "optimizer": moment_bytes * num_elements if zero == 0 else (4.0 + moment_bytes) * share,
        "communication buffers": _buffers(layout, stage, phase, num_elements),
    }
    flat_copy = zero == 0 or (zero == 1 and b == 2)
    logits = 0.0
    if stage.has_head:
        tokens = layout.micro_batch_tokens
        logits = cost.loss_saved_bytes(cfg.model, at, tokens)
        logits += cost.loss_workspace_bytes(cfg.model, at, tokens)
    activations = _activations(layout, stage, phase)
    saved = sum(cost.block_saved_bytes(cfg.model, at).values())
    again = cost.recomputed_bytes(cfg.model, at)
    workspace = layout.micro_batch_tokens * cost.block_workspace_bytes(cfg.model, at)
    if phase == "ternary" and layout.way == "kernels" and cfg.quant.kernel == "reference":
        tokens = layout.micro_batch_tokens
        workspace += cost.reference_workspace_bytes(cfg.model, at, tokens)
    if layout.exchanged_codes(stage, phase) and packs_codes(cfg):
        workspace += max(matrices)  # the int8 codes of one at a time
    # BF16_Optimizer empties them after each pass, and frees them after the step.
    is_passing = b == 2 and (zero >= 2 or layout.num_micro_batches == 1)
    return Memory(
        parts=parts,
        activations=activations,
        logits=logits,
        workspace=workspace,
        block=layout.micro_batch_tokens * (saved + again) + workspace,
        layers=stage.num_layers * stage.in_flight * layout.micro_batch_tokens * saved,
        recomputed=layout.micro_batch_tokens * again + workspace if again else 0.0,
        passing_gradients=parts["gradients"] if is_passing else 0.0,
        block_gradients=float(b * sum(matrices)) if is_passing and zero < 2 else 0.0,
        other_passes=sum(activations.values()) * (stage.in_flight - 1) / stage.in_flight,
        # More than so many elements in one tensor are reduced in place.
        reduction_copy=4.0 * num_elements
        if flat_copy and num_elements <= _UNREDUCED_ELEMENTS
        else 0.0,
    )


def checkpoint_bytes(layout: Layout) -> int:
    """Of one checkpoint of ours: fp32 master and moments of every parameter, once."""
    return state_bytes(layout.cfg.optim, layout.cfg.model)


def state_bytes(optim: OptimConfig, m: ModelConfig) -> int:
    """The same, of no particular cluster; `m` with its vocabulary."""
    kinds = ("master", *moments_of(optim))
    return 4 * len(kinds) * cost.parameters(m).total


def persistent_elements(layout: Layout, stage: Stage, phase: Phase) -> int:
    """Parameters too small for ZeRO-3 to partition between steps."""
    threshold = zero_option(layout.cfg, "stage3_param_persistence_threshold")
    m, held = layout.cfg.model, layout.parameters(stage)
    block = [matrix.numel for matrix in cost.block_matrices(m, layout.tp)]
    if layout.exchanged_codes(stage, phase):
        block = []
    sizes = stage.num_layers * [*block, *cost.block_vectors(m, layout.tp)]
    sizes += [held.embedding, held.head, held.final_norm]
    return sum(size for size in sizes if size <= threshold)


def gathered_weights(layout: Layout, stage: Stage, phase: Phase) -> Gathered:
    """What ZeRO-3 gathers in one micro-batch of `stage`."""
    cfg = layout.cfg
    threshold = zero_option(cfg, "stage3_param_persistence_threshold")
    held = layout.parameters(stage)
    sizes = {
        matrix.name: matrix.numel
        for matrix in cost.block_matrices(cfg.model, layout.tp)
        if matrix.numel > threshold
    }
    first = [Use("embedding", held.embedding)] if held.embedding > threshold else []
    last = [Use("head", held.head)] if held.head > threshold else []
    if stage.has_head and not held.head:
        last = list(first)
    blocks = [_block_uses(index, sizes) for index in range(stage.num_layers)]
    if layout.exchanged_codes(stage, phase):
        blocks = [[Use(None, use.numel) for use in block] for block in blocks]
    uses = [VISIT, *first, VISIT, *(use for block in blocks for use in block)]
    uses += [VISIT, *last, *last, VISIT]
    for block in reversed(blocks):
        if cfg.train.activation_checkpointing == "full":
            # Recomputation ends inside the last layer, which so keeps its weight.
            uses += block[:-1]
        uses += block[::-1]
    return gathered(
        tuple(uses + first),
        zero_option(cfg, "stage3_max_reuse_distance"),
        zero_option(cfg, "stage3_prefetch_bucket_size"),
        zero_option(cfg, "stage3_max_live_parameters"),
    )


def _block_uses(index: int, sizes: dict[str, int]) -> list[Use]:
    """The modules of a block in the order in which they run; containers and norms only visit."""
    order = ("", "", "", "q", "k", "v", "o", "", "", "up", "gate", "down")
    return [Use((index, name), sizes[name]) if name in sizes else VISIT for name in order]


def _copies(layout: Layout, stage: Stage, phase: Phase) -> float:
    """Codes and blended or dequantized weights: made once a step, or by each forward pass and
    kept for its backward pass."""
    cfg, b = layout.cfg, layout.bytes
    if phase == "16 bit":
        return 0.0
    matrices = layout.parameters(stage).matrices
    a_step: float
    a_step, a_pass, unprepared = cost.weight_copies(phase, layout.way, b)
    are_exchanged = layout.exchanged_codes(stage, phase) > 0
    is_zero3 = cfg.engine.zero_stage == 3 and not are_exchanged
    if is_zero3 or layout.spec.weight.rounding == "stochastic":
        a_step, a_pass = 0, unprepared
    if are_exchanged and packs_codes(cfg):
        a_step = layout.packed_code_bytes
    again = cost.recomputed_matrices(cfg.model, cfg.train.activation_checkpointing, layout.tp)
    num_blocks = stage.in_flight * stage.num_layers
    kept = matrices * stage.in_flight - again * (num_blocks - (num_blocks > 0))
    bytes_ = a_step * matrices + a_pass * kept
    if stage.has_head and cfg.model.head_bits == 8:
        shard = cost.shard(cfg.model, layout.tp)
        bytes_ += b * shard.vocab * shard.d
    return float(bytes_)


def _buffers(layout: Layout, stage: Stage, phase: Phase, num_elements: int) -> float:
    cfg, b, zero = layout.cfg, layout.bytes, layout.cfg.engine.zero_stage
    at = layout.setting(phase)
    bucket = zero_option(cfg, "reduce_bucket_size")
    filled = min(bucket, num_elements)
    twice = 1 + zero_option(cfg, "overlap_comm")
    tokens = layout.micro_batch_tokens
    bytes_ = 0.0
    if zero == 1 and b == 4:
        bytes_ += 4.0 * bucket * twice
    elif zero == 2:
        bytes_ += b * bucket * twice + (4.0 * filled if b == 2 else 0.0)
    elif zero == 3:
        bytes_ += 4.0 * bucket + 4.0 * filled  # the bucket, and its copy in order of ranks
    if layout.pp > 1:
        # DeepSpeed's pipeline keeps what a stage received and what it sends or, at the end, what
        # the head reads, and in two buffers at least.
        num_buffers = max(stage.in_flight, 2)
        bytes_ += 2 * num_buffers * at.residual_share * b * tokens * cfg.model.d_model
    if layout.tp > 1:
        # The sum over ranks, or the gathered sequence.
        bytes_ += tokens * cfg.model.d_model * (4.0 if phase == "ternary" else b)
    return bytes_


def _activations(layout: Layout, stage: Stage, phase: Phase) -> dict[str, float]:
    """By kind, of all micro-batches in flight."""
    cfg, at = layout.cfg, layout.setting(phase)
    m, tokens = cfg.model, layout.micro_batch_tokens
    kept = stage.num_layers * stage.in_flight * tokens
    kinds = {kind: kept * size for kind, size in cost.block_saved_bytes(m, at).items()}
    others = {
        # cos and sin of the rotary embedding, fp32.
        "attention": 2.0 * cost.FLOAT_BYTES * cfg.data.seq_len * (m.d_model // m.num_heads)
    }
    if stage.has_head:
        saved = cost.head_saved_bytes(m, at)
        others |= {kind: tokens * size for kind, size in saved.items()}
    if stage.has_embedding:
        others["ids"] = stage.in_flight * tokens * cost.embedding_saved_bytes()
    if cfg.data.reset_attention:
        others["attention masks"] = float(stage.in_flight * tokens * cfg.data.seq_len)  # booleans
    for kind, size in others.items():
        kinds[kind] = kinds.get(kind, 0.0) + size
    return kinds
