"""Rotary embedding, attention and feed-forward of the decoder.

Shapes: B batch, S sequence, D model width, H heads, K key/value heads, E head width,
F feed-forward width.
"""

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitscale.config import ModelConfig, QuantConfig, RopeScaling
from bitscale.model.bitlinear import BitLinear, QuantizedInput, shared_input
from bitscale.model.norms import RMSNorm


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


class Attention(nn.Module):
    """Grouped-query self-attention, causal, optionally within documents only."""

    def __init__(self, m: ModelConfig, quant: QuantConfig) -> None:
        super().__init__()
        kv_heads = m.num_kv_heads or m.num_heads
        self.num_heads, self.num_kv_heads = m.num_heads, kv_heads
        self.head_width = m.d_model // m.num_heads
        kv_width = kv_heads * self.head_width
        self.q = BitLinear(m.d_model, m.d_model, quant, bias=m.bias)
        self.k = BitLinear(m.d_model, kv_width, quant, bias=m.bias)
        self.v = BitLinear(m.d_model, kv_width, quant, bias=m.bias)
        self.o = BitLinear(m.d_model, m.d_model, quant, bias=m.bias)
        self.q_norm = RMSNorm(self.head_width, m.norm_eps) if m.qk_norm else None
        self.k_norm = RMSNorm(self.head_width, m.norm_eps) if m.qk_norm else None
        self.sub_norm = RMSNorm(m.d_model, m.norm_eps) if m.sub_norm else None

    def readers(self) -> tuple[nn.Module, ...]:
        """The layers that read the block's normed input."""
        return self.q, self.k, self.v

    def forward(
        self, x: Tensor | QuantizedInput, cos_SE: Tensor, sin_SE: Tensor, mask_B1SS: Tensor | None
    ) -> Tensor:
        """`x` [B, S, D], as `shared_input` gives it to `readers()`."""
        batch, seq_len, _ = (x if isinstance(x, Tensor) else x.x_TD).shape

        def split(y: Tensor, heads: int) -> Tensor:
            return y.view(batch, seq_len, heads, self.head_width)

        q_BSHE = split(self.q(x), self.num_heads)
        k_BSKE = split(self.k(x), self.num_kv_heads)
        v_BSKE = split(self.v(x), self.num_kv_heads)
        if self.q_norm is not None and self.k_norm is not None:
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
        out_BSD = out_BHSE.transpose(1, 2).reshape(batch, seq_len, -1)
        return cast(Tensor, self.o(shared_input(out_BSD, self.sub_norm, self.o)))


class MLP(nn.Module):
    """Feed-forward: SwiGLU, gated squared ReLU (BitNet b1.58 2B4T), or plain squared ReLU."""

    def __init__(self, m: ModelConfig, quant: QuantConfig) -> None:
        super().__init__()
        self.kind = m.mlp
        gated = m.mlp != "relu2"
        self.gate = BitLinear(m.d_model, m.d_ff, quant, bias=m.bias) if gated else None
        self.up = BitLinear(m.d_model, m.d_ff, quant, bias=m.bias)
        self.down = BitLinear(m.d_ff, m.d_model, quant, bias=m.bias)
        self.sub_norm = RMSNorm(m.d_ff, m.norm_eps) if m.sub_norm else None

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
