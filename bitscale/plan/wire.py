"""What one rank sends in an optimizer step, by collective.

A payload is the whole tensor of a collective: the reduced one, the gathered one, the one that is
scattered, or what is sent. A ring of n ranks moves (n − 1) / n of it out of each rank, twice for an
all-reduce. What data parallelism does follows DeepSpeed 0.19.8; tensor and pipeline parallelism
follow arXiv:1909.08053, arXiv:2205.05198 (sequence parallelism) and bitscale's own contract: at
λ = 1 integer sums travel in fp32, and gathered sequences as int8 codes with a scale a token.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from bitscale.config.spec import kernel_measure
from bitscale.model import cost
from bitscale.model.cost import FLOAT_BYTES, Phase
from bitscale.plan.layout import Layout, Stage
from bitscale.plan.memory import gathered_weights, persistent_elements

Collective = Literal["all-reduce", "gather", "reduce-scatter", "send"]


@dataclass(frozen=True)
class Traffic:
    name: str
    collective: Collective
    payload: float  # bytes per optimizer step
    num_ranks: int
    stride: int  # between the group's ranks
    in_pass: bool  # during micro-batches, not once at the end of the step

    @property
    def sent(self) -> float:
        """Bytes that leave each rank."""
        if self.collective == "send":
            return self.payload
        rings = 2 if self.collective == "all-reduce" else 1
        return rings * self.payload * (self.num_ranks - 1) / self.num_ranks


def traffic(layout: Layout, stage: Stage, phase: Phase) -> list[Traffic]:
    """Of a rank of `stage` during `phase`."""
    everything = (
        *_data_parallel(layout, stage, phase),
        *_tensor_parallel(layout, stage, phase),
        *_pipeline(layout, stage),
    )
    return [t for t in everything if t.num_ranks > 1 and t.payload]


def _data_parallel(layout: Layout, stage: Stage, phase: Phase) -> Iterator[Traffic]:
    zero, passes = layout.cfg.engine.zero_stage, 1
    num_elements = layout.parameters(stage).total - layout.tied_copy(stage)

    def over(name: str, collective: Collective, payload: float, in_pass: bool) -> Traffic:
        return Traffic(name, collective, payload, layout.dp, layout.tp, in_pass)

    if zero >= 2:
        passes = layout.num_micro_batches  # these stages reduce after every backward pass
    gradients = float(FLOAT_BYTES * num_elements * passes)
    if zero < 3:
        # Stage 2 too: DeepSpeed reduces a bucket whole and keeps its share.
        yield over("gradients", "all-reduce", gradients, zero == 2)
    num_codes = layout.exchanged_codes(stage, phase)
    yield over("packed codes", "gather", num_codes * layout.packed_code_bytes, False)
    if zero in (1, 2):
        updated = float(layout.bytes * (num_elements - num_codes))
        yield over("updated weights", "gather", updated, False)
    if zero == 3:
        yield over("gradients", "reduce-scatter", gradients, True)
        a_pass = gathered_weights(layout, stage, phase).num_elements
        yield over("weights in use", "gather", float(layout.bytes * a_pass * passes), True)
        small = layout.bytes * persistent_elements(layout, stage, phase)
        yield over("updated small weights", "gather", float(small), False)


def _tensor_parallel(layout: Layout, stage: Stage, phase: Phase) -> Iterator[Traffic]:
    cfg, m, b = layout.cfg, layout.cfg.model, layout.bytes
    passes, layers = layout.num_micro_batches, stage.num_layers
    tokens = layout.micro_batch_tokens * passes
    wide = float(b * tokens * m.d_model)  # bytes of one residual
    ternary = phase == "ternary" and layout.way == "kernels"
    # Integer sums of o and down travel in fp32; o's once more when a block is recomputed.
    again = cfg.train.activation_checkpointing == "full"
    num_sums = layers * (2 + again)
    # Statistics of their inputs are taken again wherever these are.
    num_inputs = 2 * layers * (1 + (cfg.train.activation_checkpointing != "none"))
    sums = num_sums * wide * (FLOAT_BYTES / b if ternary else 1)
    at_ends = wide * (stage.has_embedding + stage.has_head)

    def over(name: str, collective: Collective, payload: float, in_pass: bool = True) -> Traffic:
        return Traffic(name, collective, payload, layout.tp, 1, in_pass)

    if cfg.parallel.sequence_parallel:
        # The inputs of q, k, v and of gate, up, kept whole for the backward pass.
        input_bytes = float(tokens * (m.d_model + FLOAT_BYTES)) if ternary else wide
        name = "sequence, int8 codes" if ternary else "sequence"
        yield over(name, "gather", layers * 2 * (1 + again) * input_bytes)
        yield over("sequence at the ends", "gather", at_ends)
        yield over("sequence, gradients", "gather", 2 * layers * wide)
        yield over("sums of outputs", "reduce-scatter", sums)
        yield over("sums of gradients", "reduce-scatter", 2 * layers * wide + at_ends)
        norms = (2 * layers + stage.has_head) * m.d_model * m.norm_affine
        yield over("gradients of norms", "all-reduce", float(b * norms * passes))
    else:
        yield over("sums of outputs", "all-reduce", sums)
        yield over("sums of gradients", "all-reduce", 2 * layers * wide + at_ends)
    if stage.has_head:
        # The largest logit; the sum of exponentials and the target's logit (arXiv:1909.08053).
        yield over("loss", "all-reduce", 3.0 * FLOAT_BYTES * tokens)
    if ternary:
        # Maxima over the rows of o's and down's inputs.
        yield over("token scales", "all-reduce", float(FLOAT_BYTES * num_inputs * tokens))
        yield over("weight scales", "all-reduce", _scale_statistics(layout, stage), False)
    if m.sub_norm:
        # Sums of squares forward, in fp64, and of products backward.
        numbers = 8.0 * num_inputs + FLOAT_BYTES * 2 * layers
        yield over("sub-norms", "all-reduce", numbers * tokens)
    replicas = layout.tp // (m.num_kv_heads or m.num_heads)
    if replicas > 1:
        shard = cost.shard(m, layout.tp)
        copies = 2.0 * b * layers * shard.kv * shard.d * passes
        yield Traffic("replicated key/value heads", "all-reduce", copies, replicas, 1, True)


def _scale_statistics(layout: Layout, stage: Stage) -> float:
    """A sum and a count per matrix in fp64; for a median, counts of each value of one byte of |w|
    (and of NaN) at a time, in int64."""
    num_matrices = stage.num_layers * len(cost.block_matrices(layout.cfg.model))
    if kernel_measure(layout.spec) == "absmedian":
        return 8.0 * 257 * layout.bytes * num_matrices
    return 16.0 * num_matrices


def _pipeline(layout: Layout, stage: Stage) -> Iterator[Traffic]:
    cfg, stride = layout.cfg, layout.tp * layout.dp
    tokens = layout.micro_batch_tokens * layout.num_micro_batches
    share = layout.setting("16 bit").residual_share
    residual = share * layout.bytes * tokens * cfg.model.d_model
    neighbours = 2 if layout.pp > 1 else 1
    if not stage.has_head:
        yield Traffic("activations onward", "send", residual, neighbours, stride, True)
    if not stage.has_embedding:
        yield Traffic("gradients back", "send", residual, neighbours, stride, True)
    if cfg.model.tie_embeddings and layout.pp > 1 and (stage.has_head or stage.has_embedding):
        table = layout.parameters(stage).embedding or layout.parameters(stage).head
        far = stride * (layout.pp - 1)
        yield Traffic(
            "tied embedding", "all-reduce", float(FLOAT_BYTES * table), neighbours, far, False
        )
        if stage.has_embedding:
            updated = float(layout.bytes * table)
            yield Traffic("updated tied embedding", "send", updated, neighbours, far, False)
