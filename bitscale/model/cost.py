"""What a decoder costs, by arithmetic alone: parameters, FLOPs, bytes saved for the backward pass.

Counts are of one tensor-parallel rank (all of them with tp=1) and, where they grow with the batch,
per token of a micro-batch. They follow `layers.py`, `decoder.py` and `quant/kernels/linear.py` term
by term; tests hold them to the modules themselves.

Symbols: D model width, S sequence, V vocabulary; of one rank: q width of its query heads, kv of
its key/value heads, f of its part of the feed-forward; b bytes of an activation.
"""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from bitscale.config import Checkpointing, ModelConfig, has_bias
from bitscale.config.spec import QuantSpec, kernel_measure

# λ = 0; 0 < λ < 1; λ = 1.
Phase = Literal["16 bit", "ramp", "ternary"]
# How a quantized layer is computed: by kernels that share codes; by the specification, in
# integers; by the specification, in floating point with a copy of the weight.
Way = Literal["kernels", "integer", "floating"]

LOSS_SLICE_TOKENS = 1024  # of which logits exist at a time: rows enough for a matrix product
FLOAT_BYTES = 4
INDEX_BYTES = 8


class Shard(NamedTuple):
    """Widths that one tensor-parallel rank holds."""

    d: int  # model width, whole on every rank
    q: int
    kv: int  # one head at least: key/value heads fewer than ranks are replicated
    f: int
    heads: int
    kv_heads: int
    vocab: int  # rounded up


class Matrix(NamedTuple):
    """One weight of a block, as the rank holds it."""

    name: str
    rows: int
    columns: int

    @property
    def numel(self) -> int:
        return self.rows * self.columns


class Parameters(NamedTuple):
    matrices: int  # weights of the linear layers of all blocks, those that turn ternary
    vectors: int  # norms and biases of all blocks
    embedding: int
    head: int  # 0 where it shares the embedding
    final_norm: int

    @property
    def total(self) -> int:
        return sum(self)


class Flops(NamedTuple):
    """Multiplications and additions, by the arithmetic that can do them."""

    matrices: float  # integer products at λ = 1
    attention: float  # scores and values, whole rows: the causal half is not subtracted
    head: float

    @property
    def total(self) -> float:
        return sum(self)

    def times(self, factor: float) -> "Flops":
        return Flops(*(factor * part for part in self))


class WeightCopies(NamedTuple):
    """Bytes per weight of the blocks."""

    a_step: int  # made once a step (`prepare_weights`)
    a_pass: int  # kept from each forward to its backward pass, besides
    unprepared: int  # kept by each pass where nothing is made once a step


@dataclass(frozen=True)
class Setting:
    """What the bytes saved for the backward pass depend on, besides the model."""

    phase: Phase
    way: Way
    activations_quantized: bool  # False: weight-only presets
    bytes: int  # b
    seq_len: int
    tp: int = 1
    sequence_parallel: bool = False
    reset_attention: bool = False
    checkpointing: Checkpointing = "none"

    @property
    def residual_share(self) -> float:
        """Part of the tokens whose norms and residuals this rank keeps."""
        return 1 / self.tp if self.sequence_parallel else 1.0


def way_of(spec: QuantSpec) -> Way:
    """Which arithmetic computes `spec` at λ = 1."""
    if kernel_measure(spec) is not None:
        return "kernels"
    return "integer" if spec.product == "integer" else "floating"


def shard(m: ModelConfig, tp: int = 1) -> Shard:
    assert m.vocab_size is not None, "the vocabulary size is resolved before costs are counted"
    width = m.d_model // m.num_heads
    kv_heads = max((m.num_kv_heads or m.num_heads) // tp, 1)
    heads = m.num_heads // tp
    return Shard(
        m.d_model, heads * width, kv_heads * width, m.d_ff // tp, heads, kv_heads,
        -(-m.vocab_size // tp),
    )  # fmt: skip


def block_matrices(m: ModelConfig, tp: int = 1) -> tuple[Matrix, ...]:
    """The linear layers of one block, in the order of the module."""
    s = shard(m, tp)
    ups = ("up",) if m.mlp == "relu2" else ("gate", "up")
    return (
        Matrix("q", s.q, s.d),
        Matrix("k", s.kv, s.d),
        Matrix("v", s.kv, s.d),
        Matrix("o", s.d, s.q),
        *(Matrix(name, s.f, s.d) for name in ups),
        Matrix("down", s.d, s.f),
    )


def block_vectors(m: ModelConfig, tp: int = 1) -> tuple[int, ...]:
    """Sizes of the norms and biases of one block."""
    s = shard(m, tp)
    head_width = s.q // s.heads
    norms = (s.d, s.d) if m.norm_affine else ()
    widths = (s.q, s.kv) if m.qk_norm == "width" else (head_width, head_width)
    qk_norms = widths if m.qk_norm else ()
    sub_norms = (s.q, s.f) if m.sub_norm else ()
    biases = tuple(part.rows for part in block_matrices(m, tp) if has_bias(m, part.name))
    return (*norms, *qk_norms, *sub_norms, *biases)


def parameters(
    m: ModelConfig,
    *,
    num_layers: int | None = None,
    tp: int = 1,
    has_embedding: bool = True,
    has_head: bool = True,
) -> Parameters:
    """Of the whole decoder, or of a pipeline stage of `num_layers` blocks."""
    s, layers = shard(m, tp), m.num_layers if num_layers is None else num_layers
    table = s.vocab * s.d
    shares = m.tie_embeddings and has_embedding
    return Parameters(
        matrices=layers * sum(matrix.numel for matrix in block_matrices(m, tp)),
        vectors=layers * sum(block_vectors(m, tp)),
        embedding=table if has_embedding else 0,
        head=table if has_head and not shares else 0,
        final_norm=s.d if has_head and m.norm_affine else 0,
    )


def forward_flops(
    m: ModelConfig,
    seq_len: int,
    *,
    num_layers: int | None = None,
    tp: int = 1,
    has_head: bool = True,
) -> Flops:
    """Per token of one forward pass; a backward pass is twice that."""
    s, layers = shard(m, tp), m.num_layers if num_layers is None else num_layers
    return Flops(
        matrices=2.0 * layers * sum(matrix.numel for matrix in block_matrices(m, tp)),
        attention=4.0 * layers * seq_len * s.q,
        head=2.0 * s.vocab * s.d if has_head else 0.0,
    )


def blocks_per_stage(m: ModelConfig, seq_len: int, num_stages: int) -> tuple[int, ...]:
    """Blocks of each pipeline stage, balanced by FLOPs: one after the other goes to the stage that
    has least to compute; the head counts.

    Among equals the last one takes it: it holds fewer micro-batches in flight. Every stage has one.
    """
    block = forward_flops(m, seq_len, num_layers=1, has_head=False).total
    head = forward_flops(m, seq_len, num_layers=0).total
    load = [0.0] * (num_stages - 1) + [head]
    counts = [0] * num_stages
    for index in range(m.num_layers):
        empty = [i for i in range(num_stages) if not counts[i]]
        choices = empty if len(empty) >= m.num_layers - index else range(num_stages)
        chosen = min(choices, key=lambda i: (load[i], -i))
        counts[chosen] += 1
        load[chosen] += block
    return tuple(counts)


def recomputed_flops(
    m: ModelConfig,
    seq_len: int,
    phase: Phase,
    way: Way,
    checkpointing: Checkpointing,
    *,
    num_layers: int | None,
    tp: int = 1,
) -> Flops:
    """Per token, of activation checkpointing: the blocks' forward pass once more, or what lies
    between their products.

    It stops at the last tensor that is needed, which is the input of the down projection (in
    selective checkpointing also that of the output projection); only the specification's integer
    product hands over its codes when it is done.
    """
    if checkpointing == "none":
        return Flops(0.0, 0.0, 0.0)
    layers = m.num_layers if num_layers is None else num_layers
    whole = forward_flops(m, seq_len, num_layers=layers, tp=tp, has_head=False)
    multiplies = phase == "ternary" and way == "integer"
    last = {matrix.name: 2.0 * layers * matrix.numel for matrix in block_matrices(m, tp)}
    if checkpointing == "full":
        return whole._replace(matrices=whole.matrices - (0 if multiplies else last["down"]))
    return whole._replace(matrices=last["o"] + last["down"] if multiplies else 0.0)


def weight_copies(phase: Phase, way: Way, bytes_: int) -> WeightCopies:
    """Codes, and what is blended or dequantized from them."""
    if phase == "16 bit":
        return WeightCopies(0, 0, 0)
    if way == "kernels":
        made = 1 if phase == "ternary" else bytes_
        return WeightCopies(made, 0, made)
    if way == "integer" and phase == "ternary":
        return WeightCopies(1, 0, 1)
    return WeightCopies(1, bytes_, bytes_)


def block_saved_bytes(m: ModelConfig, at: Setting) -> dict[str, float]:
    """Bytes per token that one block saves for its backward pass, by kind. No weights or copies
    of them."""
    s, b, share = shard(m, at.tp), at.bytes, at.residual_share
    if at.checkpointing == "full":
        return {"layer inputs": share * b * s.d}
    num_up = 1 if m.mlp == "relu2" else 2
    # After the linear layers it never becomes one with the codes of an input.
    norm_at = replace(at, phase="16 bit") if m.post_norm else at
    norms = 2 * share * _norm(s.d, m, norm_at)
    # Gathered whole with sequence parallelism, and kept so.
    inputs = _input(s.d, 3, at) + _input(s.d, num_up, at)
    if at.checkpointing == "selective":
        # What the matrix products give, and what q, k, v and gate, up read; of norms their input,
        # unless they are fused and keep no more anyway, or follow the products (post_norm).
        return {
            "norms": norms if m.post_norm or _is_fused(m, at) else 2 * share * b * s.d,
            "inputs of linear layers": inputs,
            "attention": float(b * (s.q + 2 * s.kv)),
            "feed-forward": float(b * s.f * num_up),
        }
    if m.sub_norm and at.tp > 1:
        # Its columns spread over ranks: the input, a statistic and the result without weight.
        norms += b * (s.q + 2 * s.f) + 2 * FLOAT_BYTES
        inputs += _input(s.q, 1, at) + _input(s.f, 1, at)
    elif m.sub_norm:
        # The attention's output is saved by the attention already.
        norms += _rms_norm(s.q, at, kept_anyway=True) + _rms_norm(s.f, at)
        inputs += _input(s.q, 1, at) + _input(s.f, 1, at)
    else:
        is_new = at.phase != "16 bit" and at.activations_quantized
        inputs += (_input(s.q, 1, at) if is_new else 0) + _input(s.f, 1, at)
    if m.qk_norm:
        for width, heads in ((s.q, s.heads), (s.kv, s.kv_heads)):
            rows = 1 if m.qk_norm == "width" else heads
            norms += FLOAT_BYTES * (width + rows) + b * width
    saved = {
        "norms": norms,
        "inputs of linear layers": inputs,
        # q, k, v, the output, and the logarithm of each row's sum in fp32.
        "attention": b * (2 * s.q + 2 * s.kv) + FLOAT_BYTES * s.heads,
        "feed-forward": float(b * s.f * (1 if m.mlp == "relu2" else 3)),
    }
    if at.reset_attention:
        saved["attention masks"] = float(b * at.seq_len)  # as a bias of the scores, per layer
    return saved


def block_workspace_bytes(m: ModelConfig, at: Setting) -> float:
    """Bytes per token of gradients within a block's backward pass, at most: those of a gated
    feed-forward's output, product and both factors."""
    return 4.0 * at.bytes * shard(m, at.tp).f


def recomputed_bytes(m: ModelConfig, at: Setting) -> float:
    """Bytes per token of what a block saves anew in its backward pass, at most at once."""
    if at.checkpointing == "none":
        return 0.0
    whole = block_saved_bytes(m, replace(at, checkpointing="none"))
    if at.checkpointing == "full":
        return sum(whole.values())
    # Attention and feed-forward are recomputed one after the other, each with what is behind it.
    s, b = shard(m, at.tp), at.bytes
    kept = block_saved_bytes(m, at)
    attention = float(b * (2 * s.q + 2 * s.kv) + FLOAT_BYTES * s.heads)
    attention += whole.get("attention masks", 0.0)
    feed_forward = whole["feed-forward"] - kept["feed-forward"]
    behind = whole["inputs of linear layers"] - kept["inputs of linear layers"]
    behind += whole["norms"] - 2 * at.residual_share * _norm(s.d, m, at)
    behind_attention = behind * s.q / (s.q + s.f)
    return max(attention + behind_attention, feed_forward + behind - behind_attention)


def reference_workspace_bytes(m: ModelConfig, at: Setting, num_tokens: int) -> float:
    """Bytes of the widest backward product of a block at λ = 1, which quant.kernel=reference
    computes in fp32: copies of gradient and codes, and the result."""
    s, b = shard(m, at.tp), at.bytes
    rows = s.f + (s.d if b < FLOAT_BYTES else 0)  # an fp32 gradient needs no copy
    return float(FLOAT_BYTES * (num_tokens * rows + s.f * s.d))


def embedding_saved_bytes() -> float:
    """Bytes per token: the ids."""
    return float(INDEX_BYTES)


def head_saved_bytes(m: ModelConfig, at: Setting) -> dict[str, float]:
    """Bytes per token that the final norm and the head save."""
    s, share = shard(m, at.tp), at.residual_share
    plain = Setting("16 bit", at.way, at.activations_quantized, at.bytes, at.seq_len)
    return {
        "norms": share * _norm(s.d, m, plain),
        "inputs of linear layers": float(at.bytes * s.d),
    }


def loss_saved_bytes(m: ModelConfig, at: Setting, num_tokens: int) -> float:
    """Bytes that the loss of `num_tokens` saves: log-softmax (fp32) and targets; of more than a
    slice, the gradients of the head's input and weight instead."""
    s = shard(m, at.tp)
    if num_tokens <= LOSS_SLICE_TOKENS:
        return num_tokens * float(FLOAT_BYTES * s.vocab + INDEX_BYTES)
    return float(at.bytes * (num_tokens + s.vocab) * s.d)


def loss_workspace_bytes(m: ModelConfig, at: Setting, num_tokens: int) -> float:
    """Bytes that live beside those, for a moment: of the tokens of a slice the gradients of
    log-softmax and logits, fp32; of more than one also the log-softmax, and the sum of the
    weight's gradient, fp32."""
    s = shard(m, at.tp)
    if num_tokens <= LOSS_SLICE_TOKENS:
        return 2.0 * num_tokens * FLOAT_BYTES * s.vocab
    return LOSS_SLICE_TOKENS * 3.0 * FLOAT_BYTES * s.vocab + float(FLOAT_BYTES * s.vocab * s.d)


def recomputed_matrices(m: ModelConfig, checkpointing: Checkpointing, tp: int = 1) -> int:
    """Weights of a block whose copies are not kept from its forward to its backward pass."""
    if checkpointing == "none":
        return 0
    names = ("o", "down") if checkpointing == "selective" else None
    return sum(x.numel for x in block_matrices(m, tp) if names is None or x.name in names)


def _norm(width: int, m: ModelConfig, at: Setting) -> float:
    """A block's norm before its linear layers."""
    if m.norm == "rmsnorm":
        return _rms_norm(width, at, affine=m.norm_affine)
    return FLOAT_BYTES * (width + 2) + (at.bytes * width if m.norm_affine else 0)


def _is_fused(m: ModelConfig, at: Setting) -> bool:
    """Whether a block's norms are computed with the codes of what they give."""
    return m.norm == "rmsnorm" and at.phase == "ternary" and at.way == "kernels"


def _rms_norm(width: int, at: Setting, *, affine: bool = True, kept_anyway: bool = False) -> float:
    """`kept_anyway`: somebody else saves its input in b bytes."""
    b = at.bytes
    if at.phase == "ternary" and at.way == "kernels":
        return FLOAT_BYTES + (0 if kept_anyway else b * width)
    copy = 0 if kept_anyway and b == FLOAT_BYTES else FLOAT_BYTES * width
    return copy + FLOAT_BYTES + (b * width if affine else 0)


def _input(width: int, num_readers: int, at: Setting) -> float:
    """The input that `num_readers` layers share."""
    if at.phase == "16 bit" or not at.activations_quantized:
        return at.bytes * width
    times = 1 if at.way == "kernels" else num_readers
    if at.phase == "ternary" and at.way != "floating":
        return times * (width + FLOAT_BYTES)
    return times * at.bytes * width
