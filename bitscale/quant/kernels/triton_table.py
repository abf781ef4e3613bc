"""The Triton kernels as a table: `kernel: triton`."""

from bitscale.quant.kernels import plain_backward, triton_activation, triton_gemm, triton_weight
from bitscale.quant.kernels.table import Kernels

KERNELS = Kernels(
    name="triton",
    ternarize=triton_weight.ternarize,
    quantize_rows=triton_activation.quantize_rows,
    rms_norm_quantize_rows=triton_activation.rms_norm_quantize_rows,
    integer_linear=triton_gemm.integer_linear,
    input_grad=triton_gemm.input_grad,
    weight_grad=triton_gemm.weight_grad,
    rms_norm_grad=plain_backward.rms_norm_grad,
    blend_weight=triton_weight.blend_weight,
    blend_rows=triton_activation.blend_rows,
)
