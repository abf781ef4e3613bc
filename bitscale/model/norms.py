"""RMSNorm and LayerNorm.

Shapes: D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitscale.config import ModelConfig
from bitscale.quant.kernels import Kernels
from bitscale.quant.kernels.linear import NormedInput, rms_norm_rows


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight, the statistics in fp32 (arXiv:1910.07467)."""

    def __init__(self, width: int, eps: float, *, affine: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width)) if affine else None

    def forward(
        self, x: Tensor, codes_by: tuple[Kernels, float] | None = None
    ) -> Tensor | NormedInput:
        """norm(x), or its int8 codes by (kernels, eps), in one pass.

        Codes too are computed in here, and not by whoever holds the weight: ZeRO-3 gathers a
        module's parameters around its own forward and backward pass.
        """
        if codes_by is not None:
            kernels, eps = codes_by
            return rms_norm_rows(x, self.weight, self.eps, eps, kernels)
        h = x.float()
        h = (h * torch.rsqrt(h.square().mean(dim=-1, keepdim=True) + self.eps)).to(x.dtype)
        return h if self.weight is None else h * self.weight


class LayerNorm(nn.Module):
    """(x − mean) / sqrt(var + eps) · weight, no bias; without weight it is OLMo-1B's norm."""

    def __init__(self, width: int, eps: float, *, affine: bool) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        h = F.layer_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)
        return h if self.weight is None else h * self.weight


def make_norm(m: ModelConfig) -> nn.Module:
    if m.norm == "layernorm":
        return LayerNorm(m.d_model, m.norm_eps, affine=m.norm_affine)
    return RMSNorm(m.d_model, m.norm_eps, affine=m.norm_affine)
