"""Rotary embedding, attention and feed-forward of the decoder.

Shapes: B batch, S sequence, D model width, H heads, K key/value heads, E head width,
F feed-forward width.
"""

import math
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitscale.config import ModelConfig, QuantConfig, RopeScaling, has_bias
from bitscale.mesh import Mesh
from bitscale.model.bitlinear import BitLinear, QuantizedInput, shared_input
from bitscale.model.collectives import ONE_RANK, TensorGroup
from bitscale.model.norms import RMSNorm, make_sub_norm
from bitscale.model.parallel import ColumnBitLinear, RowBitLinear
from bitscale.quant.reference import Quant


class Rotary(nn.Module):
    """cos and sin tables [S, E] in fp32 for the half-split ("NeoX", Hugging Face) rotation."""

    def __init__(self, head_width: int, theta: float, scaling: RopeScaling | None) -> None:
        super().__init__()
        self.head_width, self.theta, self.scaling = head_width, theta, scaling
        self._tables: tuple[Tensor, Tensor] | None = None  # not state: follows from the above

    def forward(self, seq_len: int, device: torch.device) -> tuple[Tensor, Tensor]:
        tables = self._tables
        if tables is None or tables[0].shape[0] < seq_len or tables[0].device != device:
            frequencies = rotary_frequencies(self.head_width, self.theta, self.scaling)
            positions = torch.arange(seq_len, dtype=torch.float64)
            angles = torch.outer(positions, frequencies).repeat(1, 2)
            tables = (angles.cos().float().to(device), angles.sin().float().to(device))
            self._tables = tables
        return tables[0][:seq_len], tables[1][:seq_len]


def rotary_frequencies(head_width: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Angle per position, fp64 [E/2]: θ^(−2i/E), with linear or Llama-3.1 scaling."""
    exponents = torch.arange(0, head_width, 2, dtype=torch.float64) / head_width
    frequencies = theta**-exponents
    if scaling is None:
        return frequencies
    if scaling.type == "linear":
        return frequencies / scaling.factor
    # Llama 3.1: long wavelengths are stretched, short ones kept, those between interpolated.
    turns = scaling.original_context * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (keep + (1 - keep) / scaling.factor)


def rotate(x_BHSE: Tensor, cos_SE: Tensor, sin_SE: Tensor) -> Tensor:
    """Rotate pairs (i, i + E/2) of the head width by the position's angle."""
    x = x_BHSE.float()
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x * cos_SE + turned * sin_SE).to(x_BHSE.dtype)


class Ranks(NamedTuple):
    """With whom this rank shares the layers; the default is one rank."""

    tp: TensorGroup = ONE_RANK
    # The tensor-parallel ranks that hold the same key/value head, if there are fewer than ranks.
    kv_replicas: TensorGroup = ONE_RANK


def ranks_of(mesh: Mesh, *, sequence_parallel: bool) -> Ranks:
    """The groups of this rank in the mesh."""
    tp = TensorGroup(mesh.tp_group, mesh.tp_rank, mesh.tp_size, sequence_parallel)
    replicas = mesh.kv_replicas
    return Ranks(tp, TensorGroup(mesh.kv_group, mesh.tp_rank % replicas, replicas))


def column_linear(
    d_in: int,
    d_out: int,
    quant: Quant,
    tp: TensorGroup,
    bias: bool,
    replicas: TensorGroup = ONE_RANK,
) -> nn.Module:
    """The layer, or this rank's outputs of it."""
    if tp.size == 1:
        return BitLinear(d_in, d_out, quant, bias=bias)
    return ColumnBitLinear(d_in, d_out, quant, tp, bias=bias, replicas=replicas)


def row_linear(d_in: int, d_out: int, quant: Quant, tp: TensorGroup, bias: bool) -> nn.Module:
    """The layer, or the part of it that reads this rank's columns."""
    if tp.size == 1:
        return BitLinear(d_in, d_out, quant, bias=bias)
    return RowBitLinear(d_in, d_out, quant, tp, bias=bias)


class Attention(nn.Module):
    """Grouped-query self-attention, causal, optionally within documents only."""

    def __init__(self, m: ModelConfig, quant: QuantConfig, ranks: Ranks | None = None) -> None:
        super().__init__()
        ranks = ranks or Ranks()
        tp, kv_heads = ranks.tp, m.num_kv_heads or m.num_heads
        self.num_heads = m.num_heads // tp.size  # of this rank
        self.num_kv_heads = max(kv_heads // tp.size, 1)
        self.head_width = m.d_model // m.num_heads
        self.sequence_first = tp.sequence_parallel
        kv_width, replicas = kv_heads * self.head_width, ranks.kv_replicas
        self.q = column_linear(m.d_model, m.d_model, quant, tp, has_bias(m, "q"))
        self.k = column_linear(m.d_model, kv_width, quant, tp, has_bias(m, "k"), replicas)
        self.v = column_linear(m.d_model, kv_width, quant, tp, has_bias(m, "v"), replicas)
        self.o = row_linear(m.d_model, m.d_model, quant, tp, has_bias(m, "o"))
        self.norms_heads = m.qk_norm is True  # each rank norms its own
        q_width, k_width = (self.head_width,) * 2 if self.norms_heads else (m.d_model, kv_width)
        self.q_norm = RMSNorm(q_width, m.norm_eps, tp=tp) if m.qk_norm else None
        self.k_norm = RMSNorm(k_width, m.norm_eps, tp=tp) if m.qk_norm else None
        self.sub_norm = make_sub_norm(m.d_model, m.norm_eps, tp) if m.sub_norm else None

    def readers(self) -> tuple[nn.Module, ...]:
        """The layers that read the block's normed input."""
        return self.q, self.k, self.v

    def forward(
        self, x: Tensor | QuantizedInput, cos_SE: Tensor, sin_SE: Tensor, mask_B1SS: Tensor | None
    ) -> Tensor:
        """`x` [B, S, D], as `shared_input` gives it to `readers()`; sequence parallelism has
        [S, B, D] throughout."""

        def split(y: Tensor, heads: int) -> Tensor:
            """[B, S, heads, E]"""
            y = y.view(*y.shape[:-1], heads, self.head_width)
            return y.transpose(0, 1) if self.sequence_first else y

        q, k = self.q(x), self.k(x)
        if self.q_norm is not None and self.k_norm is not None and not self.norms_heads:
            q, k = self.q_norm(q), self.k_norm(k)
        q_BSHE, k_BSKE = split(q, self.num_heads), split(k, self.num_kv_heads)
        v_BSKE = split(self.v(x), self.num_kv_heads)
        if self.q_norm is not None and self.k_norm is not None and self.norms_heads:
            q_BSHE, k_BSKE = self.q_norm(q_BSHE), self.k_norm(k_BSKE)
        q_BHSE = rotate(q_BSHE.transpose(1, 2), cos_SE, sin_SE)
        k_BKSE = rotate(k_BSKE.transpose(1, 2), cos_SE, sin_SE)
        out_BHSE = F.scaled_dot_product_attention(
            q_BHSE,
            k_BKSE,
            v_BSKE.transpose(1, 2),
            attn_mask=mask_B1SS,
            is_causal=mask_B1SS is None,
            enable_gqa=self.num_kv_heads != self.num_heads,
        )
        out_BSHE = out_BHSE.transpose(1, 2)
        out = (out_BSHE.transpose(0, 1) if self.sequence_first else out_BSHE).flatten(-2)
        return cast(Tensor, self.o(shared_input(out, self.sub_norm, self.o)))


class MLP(nn.Module):
    """Feed-forward: SwiGLU, gated squared ReLU (BitNet b1.58 2B4T), or plain squared ReLU."""

    def __init__(self, m: ModelConfig, quant: QuantConfig, tp: TensorGroup = ONE_RANK) -> None:
        super().__init__()
        self.kind = m.mlp
        gated = m.mlp != "relu2"
        bias = has_bias(m, "up")
        self.gate = column_linear(m.d_model, m.d_ff, quant, tp, bias) if gated else None
        self.up = column_linear(m.d_model, m.d_ff, quant, tp, bias)
        self.down = row_linear(m.d_ff, m.d_model, quant, tp, has_bias(m, "down"))
        self.sub_norm = make_sub_norm(m.d_ff, m.norm_eps, tp) if m.sub_norm else None

    def readers(self) -> tuple[nn.Module, ...]:
        """The layers that read the block's normed input."""
        return (self.up,) if self.gate is None else (self.gate, self.up)

    def forward(self, x: Tensor | QuantizedInput) -> Tensor:
        """`x` [B, S, D], as `shared_input` gives it to `readers()`."""
        up_BSF = self.up(x)
        if self.gate is None:
            h_BSF = F.relu(up_BSF).square()
        elif self.kind == "swiglu":
            h_BSF = F.silu(self.gate(x)) * up_BSF
        else:
            h_BSF = F.relu(self.gate(x)).square() * up_BSF
        return cast(Tensor, self.down(shared_input(h_BSF, self.sub_norm, self.down)))
