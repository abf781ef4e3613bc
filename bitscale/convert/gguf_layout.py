"""Which GGUF architecture computes what the decoder does, and what its tensors are called.

    llama    SwiGLU, RMSNorm; rotates pairs of neighbours, so rows of q and k are permuted
    qwen3    the same with norms of queries and keys; rotates halves, as our decoder
    bitnet   the same with norms before the output and down projections; tied head only

Read off the graphs of llama.cpp (as vendored in llama-cpp-python 0.3.36). All three have SiLU built
in: a model with another activation would load and compute something else, so it is refused.

Shapes: D model width, E head width, F rows.
"""

import re
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from bitscale.config import ModelConfig
from bitscale.convert.model_source import ModelSource
from bitscale.errors import CheckpointError
from bitscale.model.layers import rotary_frequencies

Architecture = Literal["llama", "qwen3", "bitnet"]
ARCHITECTURES: tuple[Architecture, ...] = ("llama", "qwen3", "bitnet")
OTHER_TARGETS = "the formats packed and compact hold it"

_OUTSIDE = {"embed": "token_embd", "norm": "output_norm", "head": "output"}
_INSIDE = {
    "attn_norm": "attn_norm",
    "attn.q": "attn_q",
    "attn.k": "attn_k",
    "attn.v": "attn_v",
    "attn.o": "attn_output",
    "attn.q_norm": "attn_q_norm",
    "attn.k_norm": "attn_k_norm",
    "attn.sub_norm": "attn_sub_norm",
    "mlp_norm": "ffn_norm",
    "mlp.gate": "ffn_gate",
    "mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
    "mlp.sub_norm": "ffn_sub_norm",
}
_OUTSIDE_BACK = {theirs: ours for ours, theirs in _OUTSIDE.items()}
_INSIDE_BACK = {theirs: ours for ours, theirs in _INSIDE.items()}
ROPE_FACTORS = "rope_freqs.weight"
_SMALLEST_FP16 = 2.0**-24


def to_gguf(name: str) -> str:
    """GGUF's name of our parameter `name`."""
    module, _, parameter = name.rpartition(".")
    block = re.match(r"layers\.(\d+)\.(.+)", module)
    if block is None:
        return f"{_OUTSIDE[module]}.{parameter}"
    return f"blk.{block[1]}.{_INSIDE[block[2]]}.{parameter}"


def from_gguf(name: str) -> str | None:
    """Our name of GGUF's tensor `name`; None if we have no such thing."""
    module, _, parameter = name.rpartition(".")
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)", module)
    if block is None:
        ours = _OUTSIDE_BACK.get(module)
        return None if ours is None else f"{ours}.{parameter}"
    ours = _INSIDE_BACK.get(block[2])
    return None if ours is None else f"layers.{block[1]}.{ours}.{parameter}"


def choose_architecture(source: ModelSource) -> Architecture:
    """The architecture that computes the model. CheckpointError, naming the key, if none does."""
    m = source.model
    architecture: Architecture = "bitnet" if m.sub_norm else "qwen3" if m.qk_norm else "llama"
    biases = bool(m.bias) or bool(source.spec.deadzone_bias)
    if architecture == "qwen3" and m.bias == "qkv" and not source.spec.deadzone_bias:
        biases = False  # it has those of queries, keys and values
    linear = m.rope_scaling is None or m.rope_scaling.type == "linear"
    reasons = {
        f"model.norm={m.norm!r}; they compute RMSNorm": m.norm != "rmsnorm",
        f"model.mlp={m.mlp!r}; they compute SwiGLU": m.mlp != "swiglu",
        "model.head_bits=8; they compute a floating-point head": m.head_bits == 8,
        "a norm or rotation inside the quantizer": source.spec.norm != "none"
        or source.spec.hadamard is not None,
        "a SubLN that is still coming in (model.sub_norm='transition' in its ramp)": m.sub_norm
        == "transition",
        "model.post_norm": m.post_norm,
        "model.qk_norm='width'; they norm each head": m.qk_norm == "width",
        "both model.sub_norm and model.qk_norm": bool(m.qk_norm and m.sub_norm),
        "model.sub_norm with an untied head (bitnet shares the embedding)": bool(m.sub_norm)
        and not m.tie_embeddings,
        f"biases in a model that needs {architecture!r}": biases and architecture != "llama",
        f"rope_scaling llama3 in a model that needs {architecture!r}": not linear
        and architecture != "llama",
    }
    for reason, applies in reasons.items():
        if applies:
            raise CheckpointError(
                f"{source.path}: no GGUF architecture among {', '.join(ARCHITECTURES)} has "
                f"{reason}; {OTHER_TARGETS}"
            )
    return architecture


def hyperparameters(m: ModelConfig, seq_len: int, architecture: Architecture) -> dict[str, Any]:
    """Metadata by key; ints, floats and strings."""
    head_width = m.d_model // m.num_heads
    values: dict[str, Any] = {
        "vocab_size": m.vocab_size,
        "context_length": seq_len,
        "embedding_length": m.d_model,
        "block_count": m.num_layers,
        "feed_forward_length": m.d_ff,
        "attention.head_count": m.num_heads,
        "attention.head_count_kv": m.num_kv_heads or m.num_heads,
        "attention.key_length": head_width,
        "attention.value_length": head_width,
        "attention.layer_norm_rms_epsilon": m.norm_eps,
        "rope.dimension_count": head_width,
        "rope.freq_base": m.rope_theta,
    }
    if m.rope_scaling is not None and m.rope_scaling.type == "linear":
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": m.rope_scaling.factor}
    return {f"{architecture}.{key}": value for key, value in values.items()}


def rope_factors(m: ModelConfig) -> Tensor | None:
    """fp32 [E/2] by which llama.cpp divides each rotary frequency (Llama 3.1), or None."""
    if m.rope_scaling is None or m.rope_scaling.type != "llama3":
        return None
    head_width = m.d_model // m.num_heads
    plain = rotary_frequencies(head_width, m.rope_theta, None)
    return (plain / rotary_frequencies(head_width, m.rope_theta, m.rope_scaling)).float()


class Rows(NamedTuple):
    """How many heads the rows of a matrix or bias belong to, if they are stored permuted."""

    num_heads: int

    def to_gguf(self, rows: Tensor) -> Tensor:
        """[F, ...] whose halves of a head are rotated -> neighbours are."""
        halves = rows.reshape(self.num_heads, 2, -1, *rows.shape[1:])
        return halves.transpose(1, 2).reshape(rows.shape)

    def from_gguf(self, rows: Tensor) -> Tensor:
        pairs = rows.reshape(self.num_heads, -1, 2, *rows.shape[1:])
        return pairs.transpose(1, 2).reshape(rows.shape)


def permuted_rows(name: str, m: ModelConfig, architecture: Architecture) -> Rows | None:
    """The permutation of our parameter `name`; None if it is stored as it is."""
    layer = name.rpartition(".")[0]
    if architecture != "llama" or not layer.endswith(("attn.q", "attn.k")):
        return None
    return Rows(m.num_heads if layer.endswith("q") else m.num_kv_heads or m.num_heads)


def split_scale(scale: float) -> tuple[float, float]:
    """(d, rest): d representable in fp16, fp32(d · rest) == scale exactly, d about scale.

    Readers that know no `.scale` tensors use d alone, which is right to 2^-11. d is rounded to
    nearest where that leaves such a rest, else up: a rest below 1 is spaced finely enough.
    """
    target = torch.tensor(scale, dtype=torch.float32)
    if not _SMALLEST_FP16 / 2 <= scale <= torch.finfo(torch.float16).max:
        raise CheckpointError(
            f"a weight scale of {scale:g} is outside what GGUF's fp16 block scales reach (3e-8 to "
            f"65504); {OTHER_TARGETS}"
        )
    nearest = target.to(torch.float16)
    up = nearest if nearest >= target else _next(nearest, torch.inf)
    for d in (nearest, up, _next(up, torch.inf)):
        if float(d) == 0.0 or not bool(d.isfinite()):
            continue
        rest = target / d.float()
        for candidate in (rest, _next(rest, 0.0), _next(rest, torch.inf)):
            if float(d.float() * candidate) == float(target):
                return float(d), float(candidate)
    raise AssertionError(f"{scale} has no rest")  # a rest below 1 exists for d > scale


def _next(t: Tensor, towards: float) -> Tensor:
    """nextafter, which torch lacks for fp16 on the CPU."""
    if t.dtype == torch.float16:
        step = 1 if towards > float(t) else -1
        return (t.view(torch.int16) + step).view(torch.float16)  # positive numbers only
    return torch.nextafter(t, torch.tensor(towards, dtype=t.dtype))
