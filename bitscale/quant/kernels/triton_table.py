"""The Triton kernels as a table: `kernel: triton`."""

import torch
from torch import Tensor

from bitscale.quant.kernels import (
    triton_activation,
    triton_gemm,
    triton_gradient_gemm,
    triton_norm,
    triton_weight,
)
from bitscale.quant.kernels.table import GradientBits, Kernels
from bitscale.quant.reference import Int8Rows, Ternary


def _input_grad(grad_TF: Tensor, weight: Ternary, bits: GradientBits) -> Tensor:
    if bits is None:
        return triton_gemm.input_grad(grad_TF, weight)
    return triton_gradient_gemm.input_grad(grad_TF, weight, bits)


def _weight_grad(
    grad_TF: Tensor,
    x: Int8Rows,
    dtype: torch.dtype,
    main_grad_FD: Tensor | None,
    bits: GradientBits,
) -> Tensor:
    if bits is None:
        return triton_gemm.weight_grad(grad_TF, x, dtype, main_grad_FD)
    return triton_gradient_gemm.weight_grad(grad_TF, x, dtype, main_grad_FD, bits)


KERNELS = Kernels(
    name="triton",
    ternarize=triton_weight.ternarize,
    quantize_rows=triton_activation.quantize_rows,
    rms_norm_quantize_rows=triton_activation.rms_norm_quantize_rows,
    integer_linear=triton_gemm.integer_linear,
    input_grad=_input_grad,
    weight_grad=_weight_grad,
    rms_norm_grad=triton_norm.rms_norm_grad,
    blend_weight=triton_weight.blend_weight,
    blend_rows=triton_activation.blend_rows,
)
