"""RMSNorm and LayerNorm.

Shapes: D width.
"""

import functools
from collections.abc import Callable
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
from bitscale.quant.learned import with_zero_gradient


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


class BlendedNorm:
    """A norm that comes in with λ: x + λ (norm(x) − x), which is x itself, bit for bit, at λ = 0.

    Its weight exists from the start, so that the optimizer owns it, and has a gradient of 0 at
    λ = 0: it stays at 1 and its moments at 0 until the transition begins.
    """

    strength = 0.0  # λ of the weights, see `set_strength`

    def blend(self, x: Tensor, weight: Tensor | None, norm: Callable[[Tensor], Tensor]) -> Tensor:
        if self.strength == 0.0:
            assert weight is not None
            return with_zero_gradient(x, weight)
        blended = torch.lerp(x.float(), norm(x).float(), self.strength)
        return blended.to(x.dtype)


class BlendedRMSNorm(BlendedNorm, RMSNorm):
    """The SubLN that comes in with λ."""

    def forward(
        self, x: Tensor, codes_by: tuple[Kernels, float] | None = None
    ) -> Tensor | NormedInput:
        if self.strength == 1.0:
            return RMSNorm.forward(self, x, codes_by)
        assert codes_by is None, "integers are multiplied at λ = 1 only"
        return self.blend(x, self.weight, lambda x: cast(Tensor, RMSNorm.forward(self, x)))


class BlendedShardedRMSNorm(BlendedNorm, ShardedRMSNorm):
    """Of ranks that share the columns, the SubLN that comes in with λ."""

    def forward(self, x: Tensor) -> Tensor:
        norm = functools.partial(ShardedRMSNorm.forward, self)
        return norm(x) if self.strength == 1.0 else self.blend(x, self.weight, norm)


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


def make_sub_norm(m: ModelConfig, width: int, tp: TensorGroup) -> nn.Module | None:
    """The SubLN before a projection back into the residual stream, if the model has one."""
    if not m.sub_norm:
        return None
    if m.sub_norm == "transition":
        if tp.size == 1:
            return BlendedRMSNorm(width, m.norm_eps)
        return BlendedShardedRMSNorm(width, m.norm_eps, tp)
    return RMSNorm(width, m.norm_eps) if tp.size == 1 else ShardedRMSNorm(width, m.norm_eps, tp)


def is_sub_norm(parameter_name: str) -> bool:
    """Whether the parameter is the weight of a SubLN."""
    return parameter_name.endswith(".sub_norm.weight")
