"""The kernels' specification in plain PyTorch: `kernel: reference`. Backward: plain_backward.py.

Shapes: T tokens (all leading dimensions), D inputs, F outputs of a linear layer. The formulas of
codes and scales are those of `bitscale.quant.reference`; here is what training does with them.
"""

import torch
from torch import Tensor

from bitscale.config.spec import CodeSpec
from bitscale.quant import reference
from bitscale.quant.kernels.plain_backward import input_grad, rms_norm_grad, weight_grad
from bitscale.quant.kernels.table import Kernels, Measure, NormedRows
from bitscale.quant.quantizer import quantize
from bitscale.quant.reference import Int8Rows, Ternary
from bitscale.quant.surroundings import matmul


def ternarize(w_FD: Tensor, measure: Measure, eps: float) -> Ternary:
    """Ternary codes and scale of one logical matrix, fp32 or 16 bit, of any shape."""
    return Ternary(*quantize(w_FD, CodeSpec(measure=measure, statistics="fp64", eps=eps)))


def quantize_rows(x_TD: Tensor, eps: float) -> Int8Rows:
    """Int8 codes of each row by its own absolute maximum, which counts as at least eps."""
    return reference.quantize_rows(x_TD, eps)


def rms_norm_quantize_rows(
    x_TD: Tensor, weight_D: Tensor | None, norm_eps: float, eps: float
) -> NormedRows:
    """`quantize_rows` of RMSNorm(x), as `bitscale.model.layers.RMSNorm` computes it."""
    rstd_T1 = torch.rsqrt(x_TD.float().square().mean(dim=-1, keepdim=True) + norm_eps)
    return NormedRows(*quantize_rows(apply_rms_norm(x_TD, rstd_T1, weight_D), eps), rstd_T1)


def apply_rms_norm(x_TD: Tensor, rstd_T1: Tensor, weight_D: Tensor | None) -> Tensor:
    """x · rstd in the dtype of x, then · weight in the dtype that both promote to."""
    h_TD = (x_TD.float() * rstd_T1).to(x_TD.dtype)
    return h_TD if weight_D is None else h_TD * weight_D


def integer_linear(
    x: Int8Rows, weight: Ternary, bias_F: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """(Σ int8 · code) · r · s + bias in fp32, rounded once to `dtype`: [T, F]."""
    # Integers in fp32: exact in any order for D <= 131,072.
    sums_TF = matmul(x.codes_TD.float(), weight.codes_FD.float().T)
    y_TF = sums_TF * x.scale_T1 * weight.scale
    return (y_TF if bias_F is None else y_TF + bias_F.float()).to(dtype)


def blend_weight(w_FD: Tensor, measure: Measure, eps: float, strength: float) -> Tensor:
    """w + λ (ŵ − w) in fp32, in the dtype of `w_FD`; λ in (0, 1]."""
    codes_FD, scale = ternarize(w_FD, measure, eps)
    return _blend(w_FD, codes_FD.float() * scale, strength)


def blend_rows(x_TD: Tensor, eps: float, strength: float) -> Tensor:
    """x + λ (x̂ − x) in fp32, in the dtype of `x_TD`; λ in (0, 1]."""
    codes_TD, scale_T1 = quantize_rows(x_TD, eps)
    return _blend(x_TD, codes_TD.float() * scale_T1, strength)


def _blend(latent: Tensor, quantized: Tensor, strength: float) -> Tensor:
    return torch.lerp(latent.float(), quantized, strength).to(latent.dtype)


KERNELS = Kernels(
    name="reference",
    ternarize=ternarize,
    quantize_rows=quantize_rows,
    rms_norm_quantize_rows=rms_norm_quantize_rows,
    integer_linear=integer_linear,
    input_grad=input_grad,
    weight_grad=weight_grad,
    rms_norm_grad=rms_norm_grad,
    blend_weight=blend_weight,
    blend_rows=blend_rows,
)
