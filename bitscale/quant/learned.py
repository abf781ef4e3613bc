"""Scales that are parameters of the layer: α of ParetoQ's stretched elastic quantizer.

Shapes: F outputs, D inputs. α_F is one scale for each row, ŵ = max(α, eps) / n · code with the
codes of `quantizer.quantize`. Gradients after LSQ (arXiv:1902.08153, section 2.2), with q = w / α:

    ∂ŵ/∂w = 1 where |q| <= 0.99, else 0
    ∂ŵ/∂α = code / n − q where |q| <= 0.99, else code / n;  times g = 1 / sqrt(weights · code_max)

The clip of 0.99 and g are ParetoQ's (arXiv:2502.02631). α below eps keeps its gradient, or it could
never leave.
"""

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from bitscale.config.spec import CodeSpec

_CLIP = 0.99  # of α: weights beyond it have no gradient


def initial_scale(w_FD: Tensor) -> Tensor:
    """α [F] of a weight that is to be quantized from now on: max|w| of each row, fp32."""
    return w_FD.detach().float().abs().amax(dim=1)


def inside_clip(w_FD: Tensor, alpha_F: Tensor, part: CodeSpec) -> Tensor:
    """bool [F, D]: where the gradient of w passes."""
    # Not <=, which would hide a NaN's gradient.
    return ~(_ratio(w_FD.detach(), alpha_F.detach(), part).abs() > _CLIP)


def with_scale_gradient(
    quantized_FD: Tensor,
    alpha_F: Tensor,
    w_FD: Tensor,
    codes_FD: Tensor,
    part: CodeSpec,
    *,
    strength: float,
    rows: Sequence[int] | None,
) -> Tensor:
    """`quantized_FD` = w + λ (ŵ − w), through which α gets λ times its gradient.

    `rows`: of each logical matrix, whose weights g counts; None: one matrix.
    """
    columns = w_FD.shape[1]
    counts = rows or (w_FD.shape[0],)
    factors = [strength / math.sqrt(max(count * columns * part.code_max, 1)) for count in counts]
    # Made on the device: a copy from the host would be waited for.
    factor_F = torch.cat(
        [
            alpha_F.new_full((count,), factor, dtype=torch.float32)
            for count, factor in zip(counts, factors, strict=True)
        ]
    )
    out = _ScaleGradient.apply(  # type: ignore[no-untyped-call]
        quantized_FD, alpha_F, w_FD.detach(), codes_FD, factor_F, part
    )
    return cast(Tensor, out)


def with_zero_gradient(x: Tensor, parameter: Tensor) -> Tensor:
    """`x` itself, through which a parameter that has yet to act gets a gradient of 0, not none.

    AdamW skips a parameter without a gradient, so that its state would differ from that under
    ZeRO, which keeps all parameters in one flat tensor.
    """
    return cast(Tensor, _ZeroGradient.apply(x, parameter))  # type: ignore[no-untyped-call]


def _ratio(w_FD: Tensor, alpha_F: Tensor, part: CodeSpec) -> Tensor:
    """q = w / α, fp32."""
    return w_FD.float() / alpha_F.float().clamp(min=part.eps)[:, None]


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        quantized_FD: Tensor,
        alpha_F: Tensor,
        w_FD: Tensor,
        codes_FD: Tensor,
        factor_F: Tensor,
        part: CodeSpec,
    ) -> Tensor:
        ctx.save_for_backward(alpha_F, w_FD, codes_FD, factor_F)
        ctx.part = part  # type: ignore[attr-defined]
        return quantized_FD.view_as(quantized_FD)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, *grads: Tensor
    ) -> tuple[Tensor, Tensor | None, None, None, None, None]:
        if not ctx.needs_input_grad[1]:  # type: ignore[attr-defined]
            return grads[0], None, None, None, None, None
        alpha_F, w_FD, codes_FD, factor_F = ctx.saved_tensors  # type: ignore[attr-defined]
        part: CodeSpec = ctx.part  # type: ignore[attr-defined]
        ratio_FD = _ratio(w_FD, alpha_F, part)
        slope_FD = codes_FD / part.numerator - ratio_FD.masked_fill(ratio_FD.abs() > _CLIP, 0.0)
        grad_F = (grads[0].float() * slope_FD).sum(dim=1) * factor_F
        return grads[0], grad_F.to(alpha_F.dtype), None, None, None, None


class _ZeroGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, parameter: Tensor) -> Tensor:
        ctx.save_for_backward(parameter)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (parameter,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return grads[0], torch.zeros_like(parameter)
