"""RMSNorm and LayerNorm.

Shapes: D width.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitscale.config import ModelConfig
from bitscale.model.collectives import (
    ONE_RANK,
    TensorGroup,
    all_reduce,
    copy_to_group,
    mark_shard,
)
from bitscale.quant.kernels import Kernels
from bitscale.quant.kernels.linear import NormedInput, rms_norm_rows


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight, the statistics in fp32 (arXiv:1910.07467)."""

    def __init__(
        self, width: int, eps: float, *, affine: bool = True, tp: TensorGroup = ONE_RANK
    ) -> None:
        super().__init__()
        self.eps, self.tp = eps, tp
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
            return rms_norm_rows(x, self._weight(), self.eps, eps, kernels)
        h = x.float()
        h = (h * torch.rsqrt(h.square().mean(dim=-1, keepdim=True) + self.eps)).to(x.dtype)
        weight = self._weight()
        return h if weight is None else h * weight

    def _weight(self) -> Tensor | None:
        # Ranks that norm different tokens or heads each have a part of the weight's gradient.
        return None if self.weight is None else copy_to_group(self.weight, self.tp)


class ShardedRMSNorm(nn.Module):
    """RMSNorm of rows whose columns are spread over the ranks (before a row-parallel layer).

    The sum of squares is taken in fp64 over the group; it differs from one rank's fp32 mean by
    rounding.
    """

    def __init__(self, width: int, eps: float, tp: TensorGroup) -> None:
        super().__init__()
        self.width, self.eps, self.tp = width, eps, tp
        self.weight = nn.Parameter(torch.ones(width // tp.size))
        mark_shard(self.weight, 0, tp.rank, tp.size)

    def forward(self, x: Tensor) -> Tensor:
        h = _ShardedNorm.apply(x, self.width, self.eps, self.tp)  # type: ignore[no-untyped-call]
        return cast(Tensor, h) * self.weight


class _ShardedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, width: int, eps: float, tp: TensorGroup) -> Tensor:
        squares = all_reduce(x.double().square().sum(dim=-1, keepdim=True), tp.group)
        rstd = torch.rsqrt(squares / width + eps).float()
        ctx.save_for_backward(x, rstd)
        ctx.width, ctx.tp = width, tp
        return (x.float() * rstd).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        x, rstd = ctx.saved_tensors
        n, grad = x.float() * rstd, grads[0].float()
        mean = all_reduce((grad * n).sum(dim=-1, keepdim=True), ctx.tp.group) / ctx.width
        return (rstd * (grad - n * mean)).to(x.dtype), None, None, None


class LayerNorm(nn.Module):
    """(x − mean) / sqrt(var + eps) · weight, no bias; without weight it is OLMo-1B's norm."""

    def __init__(self, width: int, eps: float, *, affine: bool, tp: TensorGroup = ONE_RANK) -> None:
        super().__init__()
        self.eps, self.tp = eps, tp
        self.weight = nn.Parameter(torch.ones(width)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        h = F.layer_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)
        return h if self.weight is None else h * copy_to_group(self.weight, self.tp)


def make_norm(m: ModelConfig, tp: TensorGroup = ONE_RANK) -> nn.Module:
    """A norm of the residual stream, whose tokens sequence parallelism spreads over the ranks."""
    tp = tp if tp.sequence_parallel else ONE_RANK
    if m.norm == "layernorm":
        return LayerNorm(m.d_model, m.norm_eps, affine=m.norm_affine, tp=tp)
    return RMSNorm(m.d_model, m.norm_eps, affine=m.norm_affine, tp=tp)


def make_sub_norm(width: int, eps: float, tp: TensorGroup) -> nn.Module:
    """The SubLN before a projection back into the residual stream."""
    return RMSNorm(width, eps) if tp.size == 1 else ShardedRMSNorm(width, eps, tp)
